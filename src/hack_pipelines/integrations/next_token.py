"""
Pictures from next-token image models of transformers: Janus, Emu3, and Llama models of the codes of a picture.

Each model is drawn with as its library says, with a [`HeadKVCache`] and with random numbers of each picture's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    Cache,
    Emu3ForConditionalGeneration,
    JanusForConditionalGeneration,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from ..cache.report import CacheReport
from ..hub.checks import stored_shapes
from ..hub.client import snapshot
from ..hub.errors import explained
from ..hub.files import DOWNLOAD_AGAIN, read_json
from ..hub.sources import DEMO_FOLDER
from ..methods import Method
from ..models.autoencoder_msvq import MultiScaleVQModel
from ..pipelines.class_labels import class_ids
from ..pipelines.sampling import filter_logits, guide, gumbel_softmax
from ..pipelines.settings import per_scale
from ..schedule import Schedule
from .transformers import HeadKVCache, compressed_guidance, head_attention


logger = logging.get_logger(__name__)

DEMO = "demo"
# Pixels of a picture where its processor does not say: those of some releases of the library only take it with each call.
EMU3_AREA = 720 * 720
# Pickle files and code are never asked for.
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class CodeSampling:
    """
    How a code is drawn from logits.

    Args:
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Weight of the prompt or class; 1 is no guidance.
        temperature (`float`, *optional*, defaults to 1.0):
            Divisor of the guided logits.
        top_k (`int`, *optional*, defaults to 0):
            Codes to draw from; 0 is all, 1 is greedy.
        top_p (`float`, *optional*, defaults to 1.0):
            Probability mass to draw from; 1 is all.

    Raises:
        `ValueError`: if a value is out of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        per_scale("guidance_scale", self.guidance_scale, 1, 0, 1000)
        per_scale("temperature", self.temperature, 1, 0, 1000, open_lower=True)
        per_scale("top_k", self.top_k, 1, 0, 2**31, whole=True)
        per_scale("top_p", self.top_p, 1, 0, 1, open_lower=True)

    def draw(self, logits: torch.Tensor, paired: bool = False, generator: Generators = None) -> torch.Tensor:
        """
        Draw a code for each picture: the largest of its logits with Gumbel noise added, which is a sample from their softmax.
        Runs with the same seed share their noise, and differ only where another code becomes the largest.

        Args:
            logits (`torch.Tensor`):
                `[rows, codes]`.
            paired (`bool`, *optional*, defaults to `False`):
                Whether each picture has a conditional and an unconditional row, all conditional ones first.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all pictures, or one a picture, which makes a picture independent of its batch.

        Returns:
            `torch.Tensor`: codes `[pictures]`.
        """
        logits = guide(logits.float(), self.guidance_scale, paired) / self.temperature
        logits = filter_logits(logits, min(self.top_k, logits.shape[-1]), self.top_p)
        return gumbel_softmax(logits[:, None], 1.0, generator)[:, 0].argmax(-1)


class CodeChoice(LogitsProcessor):
    """
    Lets `generate(do_sample=False)` take the codes that a [`CodeSampling`] draws: their score is 0, all others are minus
    infinity. `generate` samples a batch from one random state instead, by which a picture depends on its neighbours.

    Serves one generation.

    Args:
        sampling ([`CodeSampling`]):
            How codes are drawn.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            As of [`~CodeSampling.draw`].
        codes (`torch.Tensor`, *optional*):
            Which tokens of the vocabulary are codes, `[codes]`; by default all are.
        paired (`bool`, *optional*, defaults to `False`):
            Whether scores of unconditional rows come below the conditional ones.
        line_end (`tuple[int, int]`, *optional*):
            The token that ends a line, and the tokens of a line, it included.
        on_step (`Callable`, *optional*):
            Called at every token.
    """

    def __init__(
        self,
        sampling: CodeSampling,
        generator: Generators = None,
        codes: torch.Tensor | None = None,
        paired: bool = False,
        line_end: tuple[int, int] | None = None,
        on_step: Callable[[], Any] | None = None,
    ):
        self.sampling = sampling
        self.generator = generator
        self.codes = codes
        self.paired = paired
        self.line_end = line_end
        self.on_step = on_step
        self.chosen = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor`):
                Not looked at.
            scores (`torch.Tensor`):
                `[rows, vocabulary]`.

        Returns:
            `torch.Tensor`: `[pictures, vocabulary]`.
        """
        self.chosen += 1
        if self.line_end is not None and self.chosen % self.line_end[1] == 0:
            tokens = torch.full_like(scores[:, 0], self.line_end[0], dtype=torch.long)
        else:
            logits = scores if self.codes is None else scores[:, self.codes]
            tokens = self.sampling.draw(logits, self.paired, self.generator)
            if self.codes is not None:
                tokens = self.codes[tokens]
        if self.on_step is not None:
            self.on_step()
        choice = scores.new_full((len(tokens), scores.shape[1]), -torch.inf)
        return choice.scatter_(1, tokens[:, None], 0)


@dataclass
class NextTokenOutput(BaseOutput):
    """
    Output of a [`NextTokenPipeline`].

    Args:
        images (`list[PIL.Image.Image]`):
            The pictures.
        tokens (`torch.Tensor`):
            What was drawn, line by line, `[pictures, tokens]`, line ends included where a model has them.
        cache_report ([`CacheReport`]):
            What the cache held, measured from its tensors.
        unconditional_cache_report ([`CacheReport`], *optional*):
            Likewise, of a second cache that the rows without the prompt have, as with Emu3.
    """

    images: list[Image.Image]
    tokens: torch.Tensor
    cache_report: CacheReport
    unconditional_cache_report: CacheReport | None = None


class NextTokenPipeline(ABC):
    """
    Draws pictures with a next-token model, keeping as much of the key/value cache as a budget allows.

    Args:
        model (`PreTrainedModel`):
            The model, with `attn_implementation="sdpa"`.

    Example:

    ```python
    >>> from hack_pipelines.integrations.next_token import NextTokenPipeline

    >>> pipe = NextTokenPipeline.from_pretrained("deepseek-community/Janus-Pro-1B", dtype=torch.bfloat16).to("cuda")
    >>> output = pipe(["a lighthouse in a storm"], kv_budget=1 / 6, generator=[torch.Generator().manual_seed(0)])
    >>> output.images[0].save("lighthouse.png")
    >>> print(output.cache_report)
    ```
    """

    family: ClassVar[str]
    """The type of its model's configuration."""
    model_class: ClassVar[type[PreTrainedModel]]
    """Class of the model."""
    default_sampling: ClassVar[CodeSampling]
    """How pictures are drawn where a call does not say it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self._progress: dict[str, Any] = {}

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = None,
    ) -> "NextTokenPipeline":
        """
        Open a model, and fetch it if it is not here. Only safetensors are read, and no code.

        Args:
            name_or_path (`str` or `Path`):
                A folder of transformers with the processor beside the model, `"demo"` for the small class-conditional model
                inside the package, or a Hub repo.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Of the weights.
            revision (`str`, *optional*):
                Branch, tag or commit of a Hub repo.
            token (`str` or `bool`, *optional*):
                For private repos; by default the one of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*):
                Where downloads are kept instead of the cache of the Hub's client.
            local_files_only (`bool`, *optional*):
                Whether to do without the network.

        Raises:
            `ValueError`: if there is no such model, or pictures cannot be drawn with it here.
            `ConnectionError`: if the Hub cannot be reached and the cache does not have the model.
        """
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": bool(local_files_only),
        }
        folder = find_folder(name_or_path, options)
        pipeline = pipeline_class(folder)
        # Looks at the files' headers: the library's own errors about damaged ones do not say which file it is.
        stored_shapes(folder, None, "model")
        loaded: Any = pipeline.model_class.from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
        if info["missing_keys"]:
            # The library would draw with random numbers in their place.
            raise ValueError(
                f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...: {DOWNLOAD_AGAIN}."
            )
        return pipeline.load(folder, model)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of a picture."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, model: Any) -> "NextTokenPipeline":
        """The pipeline of a model, with what else a folder has."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> NextTokenOutput:
        """Draw pictures."""

    def to(self, device: str | torch.device) -> "NextTokenPipeline":
        """Move the model."""
        self.model.to(device)
        return self

    def set_progress_bar_config(self, **kwargs: Any):
        """What `tqdm` is given for the bar that counts tokens."""
        self._progress = kwargs

    def prepare_sampling(self, **given: float | int | None) -> CodeSampling:
        """
        How codes are drawn, with the model's own values for what is `None`.

        Raises:
            `ValueError`: if a value is out of its range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        return CodeSampling(**{**vars(self.default_sampling), **chosen})

    @contextmanager
    def _drawing(self, total: int) -> Iterator[Callable[[], Any]]:
        """Attention over head groups, and a bar that goes on at every call of what is given."""
        with torch.no_grad(), head_attention(self.model), tqdm(total=total, **self._progress) as bar:
            yield bar.update


class JanusPipeline(NextTokenPipeline):
    """
    Pictures of prompts with Janus and Janus-Pro.

    Args:
        model (`JanusForConditionalGeneration`):
            The model.
        processor (`ProcessorMixin`):
            Its processor.
    """

    family = "janus"
    model_class = JanusForConditionalGeneration
    default_sampling = CodeSampling(guidance_scale=5.0)

    def __init__(self, model: JanusForConditionalGeneration, processor: ProcessorMixin):
        super().__init__(model)
        self.processor: Any = processor
        generation: Any = model.generation_config
        if not getattr(generation, "generation_kwargs", None):
            # The library loses it where a configuration came from a model's, and fails without it.
            generation.generation_kwargs = {"boi_token_id": self.processor.tokenizer.boi_token_id}

    @classmethod
    def load(cls, folder: Path, model: Any) -> "JanusPipeline":
        return cls(model, AutoProcessor.from_pretrained(folder))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.model.config.vq_config.num_patches
        return side, side

    def __call__(
        self,
        prompt: str | Sequence[str],
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        kv_budget: float | int | str | None = None,
        method: str | Method | None = None,
    ) -> NextTokenOutput:
        """
        Draw a picture of each prompt.

        Args:
            prompt (`str` or `list[str]`):
                What to draw.
            guidance_scale (`float`, *optional*, defaults to 5.0):
                Weight of the prompt; 1 is no guidance, at the same cost.
            temperature (`float`, *optional*, defaults to 1.0):
                Divisor of the guided logits.
            top_k (`int`, *optional*, defaults to 0):
                Codes to draw from; 0 is all, 1 is greedy.
            top_p (`float`, *optional*, defaults to 1.0):
                Probability mass to draw from; 1 is all.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one a picture, which makes a picture independent of its batch.
            kv_budget (`float`, `int` or `str`, *optional*):
                As of [`HeadKVCache`]; `None` keeps everything.
            method (`str` or [`Method`], *optional*, defaults to `"headkv_ar"`):
                Likewise.

        Raises:
            `ValueError`: if an argument is out of its range.
        """
        sampling = self.prepare_sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        cache = HeadKVCache.from_model(self.model, kv_budget, method=method)
        inputs = self._encode([prompt] if isinstance(prompt, str) else list(prompt))
        lines, width = self.grid
        with self._drawing(lines * width) as on_step:
            choice = CodeChoice(sampling, generator, paired=True, on_step=on_step)
            # At 1 the library leaves the rows without a prompt to the processor, which merges them.
            tokens = self.model.generate(
                **inputs,
                generation_mode="image",
                guidance_scale=1.0,
                do_sample=False,
                num_return_sequences=1,
                logits_processor=LogitsProcessorList([choice]),
                past_key_values=cache,
            )
            pixels = self.model.decode_image_tokens(tokens).movedim(-1, 1)
        return NextTokenOutput(to_images(pixels, self.processor), tokens, cache.report())

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Tokens and mask of prompts as a conversation, where the model knows the form of one."""
        if self.processor.chat_template is not None:
            turns = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
            prompts = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(
            text=prompts, generation_mode="image", padding=True, padding_side="left", return_tensors="pt"
        )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class Emu3Pipeline(NextTokenPipeline):
    """
    Pictures of prompts with Emu3. Guidance runs the model a second time at every token, with a second cache of the same budget.

    Args:
        model (`Emu3ForConditionalGeneration`):
            The model.
        processor (`ProcessorMixin`):
            Its processor.
    """

    family = "emu3"
    model_class = Emu3ForConditionalGeneration
    default_sampling = CodeSampling(guidance_scale=3.0, top_k=2048)

    def __init__(self, model: Emu3ForConditionalGeneration, processor: ProcessorMixin):
        super().__init__(model)
        self.processor: Any = processor

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Emu3Pipeline":
        return cls(model, AutoProcessor.from_pretrained(folder))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes where a call does not say it."""
        return self.resolve_grid()

    def resolve_grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """
        The grid of codes nearest to a size in pixels, rows and columns. A side that is missing is as long as the other; with
        neither the picture is a square of the processor's own area.

        Raises:
            `ValueError`: if a side is no positive whole number.
        """
        for name, value in (("height", height), ("width", width)):
            if value is not None:
                per_scale(name, value, 1, 1, 2**16, whole=True)
        pixels, own = self.processor.downsample_ratio, isqrt(getattr(self.processor, "image_area", EMU3_AREA))
        asked = height or width or own, width or height or own
        rows, columns = (max(1, round(side / pixels)) for side in asked)
        if (rows * pixels, columns * pixels) != asked:
            logger.warning(
                f"The nearest to {asked[0]}x{asked[1]} pixels is drawn: {rows * pixels}x{columns * pixels}."
            )
        return rows, columns

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        grid: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        kv_budget: float | int | str | None = None,
        method: str | Method | None = None,
    ) -> NextTokenOutput:
        """
        Draw a picture of each prompt.

        Args:
            prompt (`str` or `list[str]`):
                What to draw.
            negative_prompt (`str`, *optional*):
                What guidance steers away from; no text by default.
            grid (`tuple[int, int]`, *optional*):
                Rows and columns of codes, see [`~Emu3Pipeline.resolve_grid`]; 90 x 90 by default for released models.
            guidance_scale (`float`, *optional*, defaults to 3.0):
                Weight of the prompt; 1 is no guidance.
            temperature (`float`, *optional*, defaults to 1.0):
                Divisor of the guided logits.
            top_k (`int`, *optional*, defaults to 2048):
                Codes to draw from; 0 is all, 1 is greedy.
            top_p (`float`, *optional*, defaults to 1.0):
                Probability mass to draw from; 1 is all.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one a picture, which makes a picture independent of its batch.
            kv_budget (`float`, `int` or `str`, *optional*):
                As of [`HeadKVCache`], for each of the two caches; `None` keeps everything.
            method (`str` or [`Method`], *optional*, defaults to `"headkv_ar"`):
                Likewise.

        Raises:
            `ValueError`: if an argument is out of its range.
        """
        sampling = self.prepare_sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        rows, columns = self.grid if grid is None else grid
        line, count = columns + 1, 1 if isinstance(prompt, str) else len(prompt)
        cache, other = (HeadKVCache.from_model(self.model, kv_budget, (rows, line), method=method) for _ in range(2))
        inputs = self._encode([prompt] if isinstance(prompt, str) else list(prompt), rows, columns)
        vocabulary = self.model.model.vocabulary_mapping
        with self._drawing(rows * line) as on_step:
            choice = CodeChoice(
                sampling,
                generator,
                codes=torch.tensor(vocabulary.image_tokens, device=self.model.device),
                line_end=(vocabulary.eol_token_id, line),
                on_step=on_step,
            )
            processors: list[LogitsProcessor] = [choice]
            if sampling.guidance_scale != 1:
                negative = self._encode([negative_prompt or ""] * count, rows, columns)
                processors.insert(
                    0,
                    compressed_guidance(
                        self.model,
                        sampling.guidance_scale,
                        negative["input_ids"],
                        other,
                        negative["attention_mask"],
                    ),
                )
            # The tokens that close a picture tell nothing of it, so they are not drawn.
            sequences = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=rows * line,
                logits_processor=LogitsProcessorList(processors),
                past_key_values=cache,
            )
            tokens = sequences[:, -rows * line :]
            # The library cuts off three of them.
            closed = torch.cat((tokens, tokens[:, -3:]), dim=1)
            pixels = self.model.decode_image_tokens(image_tokens=closed, height=rows, width=columns)
        report = other.report() if sampling.guidance_scale != 1 else None
        return NextTokenOutput(to_images(pixels, self.processor), tokens, cache.report(), report)

    def _encode(self, prompts: list[str], rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Tokens and mask of prompts, each with the grid and the start of a picture behind it."""
        # A ratio and an area from which the processor finds exactly this grid.
        inputs = self.processor(
            text=prompts,
            return_for_image_generation=True,
            ratio=f"{columns}:{rows}",
            image_area=rows * columns * self.processor.downsample_ratio**2,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class CodeClassPipeline(NextTokenPipeline):
    """
    Pictures of classes with a Llama model of raster codes, such as the small one that `examples/train_demo` trains.

    Args:
        model (`LlamaForCausalLM`):
            Its configuration has `num_codes`, names of the classes in `id2label`, and as `max_position_embeddings` the
            codes of a picture, which is a square, and the class.
        vae ([`MultiScaleVQModel`]):
            The image tokenizer.

    Raises:
        `ValueError`: if the configuration has no such things.
    """

    family = "llama"
    model_class = LlamaForCausalLM
    # Judged on sheets of samples of the small model.
    default_sampling = CodeSampling(guidance_scale=2.0, top_k=100)

    def __init__(self, model: LlamaForCausalLM, vae: MultiScaleVQModel):
        super().__init__(model)
        self.vae = vae.eval()
        total = model.config.max_position_embeddings - 1
        if not hasattr(model.config, "num_codes") or isqrt(total) ** 2 != total:
            raise ValueError(
                "A Llama model must have `num_codes` in its configuration, and as `max_position_embeddings` one more than the "
                "codes of a square picture, to be drawn with."
            )

    @classmethod
    def load(cls, folder: Path, model: Any) -> "CodeClassPipeline":
        return cls(model, MultiScaleVQModel.from_pretrained(folder / "vae", torch_dtype=model.dtype))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = isqrt(self.model.config.max_position_embeddings - 1)
        return side, side

    @property
    def id2label(self) -> dict[str, str]:
        """Names of the classes by id; several names of one class are separated by commas."""
        return {str(key): names for key, names in self.model.config.id2label.items()}

    @property
    def num_classes(self) -> int:
        """Classes, without the one for none."""
        return len(self.model.config.id2label)

    def to(self, device: str | torch.device) -> "CodeClassPipeline":
        """Move the model and the tokenizer."""
        self.vae.to(device)
        super().to(device)
        return self

    def encode_class_labels(
        self, class_labels: Sequence[int | str] | None, generator: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Class ids `[pictures]`, the null class as the number of classes.

        Args:
            class_labels (list of `int` or `str`, *optional*):
                Ids or names; -1 is the null class. `None` draws one with each generator.
            generator (`list[torch.Generator]`, *optional*):
                Draw classes.

        Raises:
            `ValueError`: if there is no such class.
        """
        if class_labels is None:
            return torch.cat([torch.randint(self.num_classes, (1,), generator=entry) for entry in generator or []])
        return torch.tensor(class_ids(class_labels, self.id2label, self.num_classes))

    def __call__(
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        kv_budget: float | int | str | None = None,
        method: str | Method | None = None,
    ) -> NextTokenOutput:
        """
        Draw a picture of each class.

        Args:
            class_labels (list of `int` or `str`):
                Ids or names; -1 is the null class.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                Weight of the class; 1 is no guidance.
            temperature (`float`, *optional*, defaults to 1.0):
                Divisor of the guided logits.
            top_k (`int`, *optional*, defaults to 100):
                Codes to draw from; 0 is all, 1 is greedy.
            top_p (`float`, *optional*, defaults to 1.0):
                Probability mass to draw from; 1 is all.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one a picture, which makes a picture independent of its batch.
            kv_budget (`float`, `int` or `str`, *optional*):
                As of [`HeadKVCache`]; `None` keeps everything.
            method (`str` or [`Method`], *optional*, defaults to `"headkv_ar"`):
                Likewise.

        Raises:
            `ValueError`: if an argument is out of its range.
        """
        sampling = self.prepare_sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        rows_per_image = 1 if sampling.guidance_scale == 1 else 2
        cache = HeadKVCache.from_model(self.model, kv_budget, self.grid, rows_per_image=rows_per_image, method=method)
        classes = self.encode_class_labels(class_labels).to(self.model.device)
        total = self.grid[0] * self.grid[1]
        with self._drawing(total) as on_step:
            tokens = draw_codes(self.model, classes, total, sampling, cache, generator, on_step)
            images = decode_codes(self.vae, tokens)
        return NextTokenOutput(images, tokens, cache.report())


def class_tokens(model: LlamaForCausalLM, classes: torch.Tensor) -> torch.Tensor:
    """
    First tokens of sequences of codes: classes follow the codes in the vocabulary, and the null class comes last.

    Args:
        model (`LlamaForCausalLM`):
            Its configuration has `num_codes` and, in `id2label`, the names of the classes.
        classes (`torch.Tensor`):
            Class ids `[pictures]`, the null class as the number of classes.

    Returns:
        `torch.Tensor`: `[pictures]` int64.

    Raises:
        `ValueError`: if a class does not exist.
    """
    num_classes = len(model.config.id2label or {})
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) <= num_classes:
        raise ValueError(f"Classes must be from 0 to {num_classes} but are {classes.tolist()}.")
    return model.config.num_codes + classes


def next_logits(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits `[rows, num_codes]` of the codes that follow `ids` `[rows]`, one token a row; the cache grows by them."""
    logits = model(input_ids=ids[:, None], past_key_values=cache, use_cache=True).logits
    return logits[:, -1, : model.config.num_codes].float()


@torch.no_grad()
def draw_codes(
    model: LlamaForCausalLM,
    classes: torch.Tensor,
    total: int,
    sampling: CodeSampling,
    cache: Cache,
    generator: Generators = None,
    on_step: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """
    Draw the codes of pictures, one for each class.

    Args:
        model (`LlamaForCausalLM`):
            The transformer.
        classes (`torch.Tensor`):
            Class ids `[pictures]`, the null class as the number of classes.
        total (`int`):
            Codes of a picture.
        sampling ([`CodeSampling`]):
            How codes are drawn. With guidance, each picture has two rows in the batch, and those with a class come first.
        cache (`Cache`):
            An empty cache.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            One for all pictures, or one a picture, which makes a picture independent of its batch.
        on_step (`Callable`, *optional*):
            Called at every code.

    Returns:
        `torch.Tensor`: codes `[pictures, total]`, line by line.

    Raises:
        `ValueError`: if a class does not exist.
    """
    paired = sampling.guidance_scale != 1
    ids = class_tokens(model, classes)
    if paired:
        nothing = torch.full_like(classes, len(model.config.id2label or {}))
        ids = torch.cat((ids, class_tokens(model, nothing)))
    drawn = []
    for _ in range(total):
        codes = sampling.draw(next_logits(model, ids, cache), paired, generator)
        ids = codes.repeat(2) if paired else codes
        drawn.append(codes)
        if on_step is not None:
            on_step()
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def decode_codes(vae: MultiScaleVQModel, codes: torch.Tensor) -> list[Image.Image]:
    """Pictures of codes `[pictures, codes]` of square pictures, line by line."""
    schedule = Schedule.from_sides((isqrt(codes.shape[1]),))
    images = vae.decode(vae.quantizer.upsample(codes.long(), 0, schedule))
    return VaeImageProcessor().postprocess(images, output_type="pil")


def to_images(pixels: torch.Tensor, processor: Any) -> list[Image.Image]:
    """Pictures of a decoder's output `[pictures, 3, height, width]`, which is in the scale that a processor gives its inputs."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((pixels.float() * std + mean).clamp(0, 1)))


def find_folder(name_or_path: str | Path, options: dict[str, Any] | None = None) -> Path:
    """
    The folder of a model of transformers, fetched if it is not here.

    Args:
        name_or_path (`str` or `Path`):
            A folder, `"demo"` for the small model inside the package, or a Hub repo.
        options (`dict[str, Any]`, *optional*):
            `revision`, `token`, `cache_dir` and `local_files_only`.

    Raises:
        `ValueError`: if there is no such model.
        `ConnectionError`: if the Hub cannot be reached and the cache does not have it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file: give the folder of the model.")
    name, options = str(name_or_path), options or {}
    if name == DEMO:
        return DEMO_FOLDER / "raster"
    with explained(name, options.get("revision")):
        return snapshot(name, FILES, [], options)


PIPELINES: dict[str, type[NextTokenPipeline]] = {
    pipeline.family: pipeline for pipeline in (JanusPipeline, Emu3Pipeline, CodeClassPipeline)
}


def pipeline_class(folder: Path) -> type[NextTokenPipeline]:
    """
    The pipeline for the model in a folder.

    Raises:
        `ValueError`: if there is none.
    """
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is a pipeline in diffusers layout: open it with `HackVARPipeline.from_pretrained`, on the command line "
            "with `--backend diffusers`."
        )
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in PIPELINES:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, but pictures are drawn with {', '.join(map(repr, PIPELINES))} "
            "only. For others, write their loop around a `HeadKVCache`, as examples/chameleon_loop.py does."
        )
    return PIPELINES[model_type]
