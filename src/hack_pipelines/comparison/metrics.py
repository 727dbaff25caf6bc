"""Measures of pictures that need networks of others: libraries of the `eval` extra, and weights from the net."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image


CLIP_MODEL = "openai/clip-vit-base-patch16"
INSTALL = "pip install 'hack_pipelines[eval]'"
FORMATS = (".png", ".jpg", ".jpeg", ".webp")


class PictureMetric(ABC):
    """
    A measure of the pictures of a run.

    Args:
        device (`str`):
            Where its network runs.
    """

    name: ClassVar[str]
    """What `--metrics` calls it; its columns, too."""
    needs_prompts: ClassVar[bool] = False
    """Whether it reads what was asked for."""
    needs_images: ClassVar[bool] = False
    """Whether it compares with a folder of images."""
    against_full: ClassVar[bool] = False
    """Whether it compares with the full cache's pictures, so that these have none of their own."""

    def __init__(self, device: str):
        self.device = device

    @abstractmethod
    def measure(self, pictures: torch.Tensor, full: torch.Tensor, inputs: Sequence[str]) -> torch.Tensor:
        """
        Values `[images]`, or one `[]` of the whole set.

        Args:
            pictures (`torch.Tensor`):
                `[images, 3, height, width]` in uint8.
            full (`torch.Tensor`):
                Those of the full cache from the same noise.
            inputs (`Sequence[str]`):
                What each picture should show.
        """


class FID(PictureMetric):
    """
    Fréchet Inception distance to a folder of real images (arXiv 1706.08500), as `torchmetrics` computes it.

    Args:
        device (`str`):
            Where the network runs.
        folder (`Path`):
            The images; they are read once.
    """

    name = "fid"
    needs_images = True

    def __init__(self, device: str, folder: Path):
        super().__init__(device)
        from torchmetrics.image.fid import FrechetInceptionDistance

        # The real images' statistics outlive `reset`.
        self.network = FrechetInceptionDistance(feature=2048, reset_real_features=False, normalize=False).to(device)
        for picture in read_images(folder):
            self.network.update(picture[None].to(device), real=True)

    @torch.no_grad()
    def measure(self, pictures, full, inputs):
        self.network.reset()
        for picture in pictures.split(1):
            self.network.update(picture.to(self.device), real=False)
        return self.network.compute().cpu()


class LPIPS(PictureMetric):
    """Learned perceptual distance to the full cache's picture (arXiv 1801.03924, AlexNet), as `torchmetrics` computes it."""

    name = "lpips"
    against_full = True

    def __init__(self, device: str):
        super().__init__(device)
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def measure(self, pictures, full, inputs):
        values = []
        for pair in zip(pictures.split(1), full.split(1)):
            self.network.reset()
            values.append(self.network(*(picture.to(self.device) / 255 for picture in pair)).cpu())
        return torch.stack(values)


class CLIPScore(PictureMetric):
    """`max(100 cos(image, prompt), 0)` of CLIP's embeddings (arXiv 2104.08718), with the network of `transformers`."""

    name = "clip"
    needs_prompts = True

    def __init__(self, device: str, model: str = CLIP_MODEL):
        super().__init__(device)
        from transformers import CLIPModel, CLIPProcessor

        self.network: Any = CLIPModel.from_pretrained(model).eval().to(device)
        self.processor: Any = CLIPProcessor.from_pretrained(model)

    @torch.no_grad()
    def measure(self, pictures, full, inputs):
        values = []
        for picture, prompt in zip(pictures, inputs):
            # What lies beyond the text that CLIP reads is cut, as in other implementations.
            batch = self.processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
            output = self.network(**batch.to(self.device))
            cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
            values.append(100 * cosine[0].clamp_min(0).cpu())
        return torch.stack(values)


METRICS: dict[str, type[PictureMetric]] = {metric.name: metric for metric in (FID, LPIPS, CLIPScore)}


def load_metrics(names: Sequence[str], device: str, reference_images: Path | None) -> list[PictureMetric]:
    """
    Measures with their networks, which are downloaded where they are not there yet.

    Args:
        names (`Sequence[str]`):
            Out of `METRICS`.
        device (`str`):
            Where the networks run.
        reference_images (`Path`, *optional*):
            Folder of real images.

    Raises:
        `ValueError`: if a library or the folder is missing; the message says how to get it.
        `OSError`: if weights cannot be downloaded, or images not be read.
    """
    wanted = [METRICS[name] for name in dict.fromkeys(names)]
    if (reference_images is not None) != any(metric.needs_images for metric in wanted):
        raise ValueError("`--reference-images` names the real images of `--metrics fid`: give both or neither.")
    result: list[PictureMetric] = []
    for metric in wanted:
        options: dict[str, Any] = {"folder": reference_images} if metric.needs_images else {}
        try:
            result.append(metric(device, **options))
        except ImportError as error:
            raise ValueError(
                f"`--metrics {metric.name}` needs libraries that are missing: {INSTALL}. {error}"
            ) from error
    return result


def read_images(folder: Path) -> Iterator[torch.Tensor]:
    """
    The images of a folder and of those in it, `[3, height, width]` in uint8, in the order of their names.

    Raises:
        `ValueError`: if there are fewer than two.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS)
    if len(paths) < 2:
        raise ValueError(
            f"`--reference-images` must hold at least two images ({', '.join(FORMATS)}), but {folder} has {len(paths)}."
        )
    for path in paths:
        with Image.open(path) as image:
            yield torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
