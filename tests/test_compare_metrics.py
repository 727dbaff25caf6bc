"""Measures that need networks of others: that they are called as documented, with small networks in their place."""

import csv
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hack_pipelines.cli import compare as compare_module
from hack_pipelines.cli import main
from hack_pipelines.comparison.metrics import FID, LPIPS, METRICS, CLIPScore, load_metrics, read_images
from hack_pipelines.evaluation import frechet_distance

from .components import tiny_pipeline, tiny_text_pipeline


def features(images: torch.Tensor) -> torch.Tensor:
    """What stands in for Inception: the mean colour."""
    return images.double().mean((2, 3))


class FakeFID:
    """torchmetrics.image.fid.FrechetInceptionDistance, with a network that sees mean colours."""

    def __init__(self, feature=2048, reset_real_features=True, normalize=False):
        assert feature == 2048
        self.reset_real_features, self.normalize = reset_real_features, normalize
        self.real, self.fake = [], []

    def to(self, device):
        return self

    def update(self, imgs: torch.Tensor, real: bool):
        assert imgs.ndim == 4 and imgs.dtype == (torch.float32 if self.normalize else torch.uint8)
        (self.real if real else self.fake).append(features(imgs))

    def compute(self) -> torch.Tensor:
        return torch.tensor(frechet_distance(torch.cat(self.fake), torch.cat(self.real)))

    def reset(self):
        self.fake = []
        if self.reset_real_features:
            self.real = []


class FakeLPIPS:
    """torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity, with the mean absolute difference for a network."""

    def __init__(self, net_type="alex", reduction="mean", normalize=False):
        assert net_type in ("vgg", "alex", "squeeze") and reduction == "mean"
        self.normalize = normalize

    def to(self, device):
        return self

    def __call__(self, img1: torch.Tensor, img2: torch.Tensor) -> torch.Tensor:
        low = 0 if self.normalize else -1
        assert all(img.is_floating_point() and img.min() >= low and img.max() <= 1 for img in (img1, img2))
        return (img1 - img2).abs().mean()

    def reset(self):
        pass


@pytest.fixture
def torchmetrics(monkeypatch):
    """Modules of the library's names."""
    fid, lpip = ModuleType("torchmetrics.image.fid"), ModuleType("torchmetrics.image.lpip")
    fid.FrechetInceptionDistance, lpip.LearnedPerceptualImagePatchSimilarity = FakeFID, FakeLPIPS
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fid.__name__, fid)
    monkeypatch.setitem(sys.modules, lpip.__name__, lpip)


@pytest.fixture
def images(tmp_path):
    """A folder of real images of different sizes and kinds."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    choice = np.random.default_rng(0)
    for name, shape, mode in (
        ("b.png", (9, 8, 3), "RGB"),
        ("a.PNG", (8, 8, 4), "RGBA"),
        ("more/c.jpg", (12, 10), "L"),
    ):
        Image.fromarray(choice.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A small CLIP, and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "red</w>", *"acterd"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config={**shape, **text, "pad_token_id": 1},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def pictures(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)


def test_the_command_line_knows_all_measures():
    assert compare_module.METRICS == tuple(METRICS)


def test_images_of_a_folder_are_read_as_colours(images):
    read = list(read_images(images))
    assert [tuple(image.shape) for image in read] == [(3, 8, 8), (3, 9, 8), (3, 12, 10)]
    assert all(image.dtype == torch.uint8 for image in read) and torch.equal(read[2][0], read[2][1])
    expected = np.asarray(Image.open(images / "b.png"))
    assert np.array_equal(read[1].permute(1, 2, 0).numpy(), expected)


def test_fid_keeps_the_real_images_between_runs(torchmetrics, images):
    metric = FID("cpu", images)
    real = torch.cat([features(image[None]) for image in read_images(images)])
    for seed in (0, 1):
        drawn = pictures(4, seed)
        value = metric.measure(drawn, drawn, [""] * 4)
        assert value.shape == () and value.item() == pytest.approx(frechet_distance(features(drawn), real))


def test_lpips_is_measured_picture_by_picture(torchmetrics):
    drawn, full = pictures(3, 0), pictures(3, 1)
    expected = (drawn / 255 - full / 255).abs().mean((1, 2, 3))
    torch.testing.assert_close(LPIPS("cpu").measure(drawn, full, [""] * 3), expected)


def test_clip_score_is_the_cosine_of_the_embeddings(clip):
    metric, drawn = CLIPScore("cpu", clip), pictures(4, 0)
    prompts = ["a cat", "a red cat", "red", "a red cat a red cat a red cat"]
    network, processor = metric.network, metric.processor
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(drawn, prompts):
            batch = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True, max_length=8)
            image = network.visual_projection(network.vision_model(batch["pixel_values"]).pooler_output)
            text = network.text_projection(network.text_model(batch["input_ids"]).pooler_output)
            expected.append(100 * (image @ text.T).item() / (image.norm() * text.norm()).item())
    assert min(expected) < 0 < max(expected)
    got = metric.measure(drawn, drawn, prompts)
    assert got.tolist() == pytest.approx([max(value, 0) for value in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        (["fid"], False, "`--reference-images` names the real images of `--metrics fid`: give both or neither"),
        (["lpips"], True, "give both or neither"),
        ([], True, "give both or neither"),
    ],
)
def test_real_images_are_for_fid(torchmetrics, images, names, folder, message):
    with pytest.raises(ValueError, match=message):
        load_metrics(names, "cpu", images if folder else None)


def test_a_folder_without_images_is_refused(torchmetrics, tmp_path):
    with pytest.raises(ValueError, match="must hold at least two images"):
        load_metrics(["fid"], "cpu", tmp_path)


@pytest.mark.parametrize("name", ["fid", "lpips"])
def test_missing_libraries_are_named_before_a_model_is_loaded(images, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    argv = ["compare", "--model", "missing", "-o", str(tmp_path / "results"), "--metrics", name]
    if name == "fid":
        argv += ["--reference-images", str(images)]
    assert main(argv) == 2
    assert f"`--metrics {name}` needs libraries that are missing: pip install 'hack_pipelines[eval]'." in (
        capsys.readouterr().err
    )


def test_measures_of_a_comparison(torchmetrics, images, clip, tmp_path, monkeypatch):
    tiny_text_pipeline().save_pretrained(tmp_path / "text")
    monkeypatch.setattr(CLIPScore.__init__, "__defaults__", (clip,))
    folder = tmp_path / "results"
    argv = ["compare", "a red cat", "a cat", "--model", str(tmp_path / "text"), "-o", str(folder), "--images", "3"]
    argv += ["--methods", "random", "--budgets", "0.3", "--reference-images", str(images)]
    assert main([*argv, "--metrics", "fid", "lpips", "clip"]) == 0
    with open(folder / "results.csv", newline="") as file:
        full, row = csv.DictReader(file)
    assert full["lpips"] == "" and float(row["lpips"]) > 0 and float(row["lpips_se"]) > 0
    assert float(full["fid"]) > 0 and "fid_se" not in row and float(row["clip_se"]) >= 0
    heads = (folder / "results.md").read_text()
    assert all(head in heads for head in ("FID (reference images)", "LPIPS (full cache)", "CLIP score (prompts)"))
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["reference_images"] == str(images) and settings["metrics"] == ["fid", "lpips", "clip"]


def test_classes_have_no_clip_score(clip, tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(CLIPScore.__init__, "__defaults__", (clip,))
    argv = ["compare", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "results"), "--metrics", "clip"]
    assert main(argv) == 2
    assert "`--metrics clip` compares pictures with prompts" in capsys.readouterr().err
    assert main([*argv, "--no-pictures"]) == 2
    assert "`--no-pictures` has none drawn" in capsys.readouterr().err
