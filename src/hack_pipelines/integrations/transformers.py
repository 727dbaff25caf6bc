"""
Head-aware caches for next-token image models of transformers: Janus, Emu3, and Llama-like models of raster tokens.

Nothing of the library is patched. Its attention modules hand keys and values to the cache and what comes back to an
attention function that is found by name; the cache gives back a handle where it has to see the query, and the function
[`head_attention`] switches on knows handles.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from ..cache.raster import RasterCache, RasterLayer
from ..cache.report import CacheReport
from ..methods import Method


logger = logging.get_logger(__name__)

ATTENTION_NAME = "head_kv"
# Before it, images of Janus are drawn from the prompt's tokens instead of those just drawn.
LEAST_VERSION = (5, 5)
HOW_TO = "with head_attention(model): model.generate(..., past_key_values=cache)"
# What may be asked of a handle: its form, which the library reads before it calls the attention function.
SHAPE_QUESTIONS = frozenset(
    {
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
    }
)


class KeyHandle(torch.Tensor):
    """
    What a cache gives back instead of keys and values that lie in groups: their form, and the layer that has them.

    It answers questions about its form and refuses everything else, so that an attention function that does not know it
    fails instead of attending to nothing.
    """

    layer: RasterLayer

    @classmethod
    def of(cls, layer: RasterLayer, key: torch.Tensor) -> "KeyHandle":
        """The handle of a layer that has just taken `key`."""
        rows, heads, _, head_dim = key.shape
        handle = key.new_empty(1).expand(rows, heads, layer.seen, head_dim).as_subclass(cls)
        handle.layer = layer
        return handle

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in SHAPE_QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(
            f"Attention met keys that lie in head groups ({getattr(func, '__name__', func)} was called on them), which only "
            f"works inside of `head_attention`: `{HOW_TO}`."
        )


class HeadLayer(DynamicLayer):
    """One layer of a [`HeadKVCache`], as the library sees it."""

    def __init__(self, layer: RasterLayer):
        super().__init__()
        self.raster = layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values; give back all of them, or a handle where the query is needed."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        present = self.raster.append(key_states, value_states)
        if present is not None:
            return present
        handle = KeyHandle.of(self.raster, key_states)
        return handle, handle

    def get_seq_length(self) -> int:
        """Tokens that were seen, which positions and masks count with."""
        return self.raster.seen

    def crop(self, *args: Any) -> None:
        """Not possible: tokens that have left cannot be brought back."""
        raise ValueError("A compressed cache cannot be cropped: use neither assisted decoding nor contrastive search.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not possible: what a row holds was chosen for that row."""
        raise ValueError("A compressed cache cannot be reordered: use greedy search or sampling instead of beams.")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible, see [`~HeadLayer.reorder_cache`]."""
        raise ValueError("A compressed cache cannot be repeated over the batch: repeat the inputs instead.")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not possible, see [`~HeadLayer.reorder_cache`]."""
        raise ValueError("Rows cannot be taken out of a compressed cache: make one for each batch.")


class HeadKVCache(Cache):
    """
    A cache for `generate(..., past_key_values=...)` of next-token image models, inside of [`head_attention`]. It keeps what
    its method chooses of every head; by default that is HeadKV's rule (arXiv 2605.20600).

    One cache serves one generation. While nothing has to go, tokens are those of `DynamicCache`.

    Args:
        grid (`tuple[int, int]`):
            Lines of the image, and tokens of a line, that which ends it included: `(24, 24)` for Janus, `(90, 91)` for Emu3 at
            720 pixels.
        kv_budget (`float`, `int` or `str`, *optional*):
            Image tokens that may stay stored between two lines: a fraction of the grid, tokens per head, or bytes per image such
            as `"64MB"`. The prompt is always kept and comes on top. `None` keeps everything.
        method (`str` or [`Method`], *optional*, defaults to `"headkv_ar"`):
            One of `hack_pipelines.methods.RASTER_METHODS`, also with options, `"headkv_ar:strata=1"` for example.
        condition_tokens (`int`, *optional*):
            Tokens before the image, padding included. By default those of the first call; needed where a prompt comes in
            parts.
        rows_per_image (`int`, *optional*, defaults to 1):
            2 where guidance doubles the batch, as for Janus. The report and budgets in bytes are per image.
        line_end (`bool`, *optional*, defaults to `False`):
            Whether the last token of a line only ends it, as for Emu3.
        sharing (`int`, *optional*, defaults to 1):
            Query heads that share a key head, for the report's count of operations.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the budget holds at every token, and not only between lines.

    Raises:
        `TypeError`: if the budget is neither a number nor a string.
        `ValueError`: if the grid, the method or the budget is none, or too small.

    Example:

    ```python
    >>> from hack_pipelines.integrations.transformers import HeadKVCache, head_attention

    >>> cache = HeadKVCache.from_model(model, kv_budget=1 / 6)
    >>> with head_attention(model):
    ...     tokens = model.generate(
    ...         **inputs, generation_mode="image", guidance_scale=5.0, do_sample=True, past_key_values=cache
    ...     )
    >>> print(cache.report())
    ```
    """

    default_method: ClassVar[str] = "headkv_ar"

    def __init__(
        self,
        grid: tuple[int, int],
        kv_budget: float | int | str | None = None,
        method: str | Method | None = None,
        condition_tokens: int | None = None,
        rows_per_image: int = 1,
        line_end: bool = False,
        sharing: int = 1,
        strict: bool = False,
    ):
        super().__init__(layer_class_to_replicate=HeadLayer)
        self.raster = RasterCache(
            grid,
            kv_budget,
            self.default_method if method is None else method,
            condition_tokens,
            rows_per_image,
            line_end,
            sharing,
            strict,
        )

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        kv_budget: float | int | str | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> "HeadKVCache":
        """
        A cache with what the model's configuration tells: heads that share keys, for Janus the grid and the rows of guidance,
        for Emu3 that lines have ends.

        Args:
            model (`PreTrainedModel`):
                The model.
            kv_budget (`float`, `int` or `str`, *optional*):
                As of the class.
            grid (`tuple[int, int]`, *optional*):
                As of the class; needed for models other than Janus.
            kwargs:
                What else the class takes.

        Raises:
            `ValueError`: if the grid is missing, or is another than the model draws.
        """
        config = model.config
        text = config.get_text_config(decoder=True)
        known: dict[str, Any] = {
            "sharing": text.num_attention_heads // (text.num_key_value_heads or text.num_attention_heads)
        }
        if config.model_type == "janus":
            side = config.vq_config.num_patches
            if grid is not None and tuple(grid) != (side, side):
                raise ValueError(f"`grid` is {grid!r}, but this model draws {(side, side)}: leave it out.")
            grid = (side, side)
            known["rows_per_image"] = 2
        elif config.model_type == "emu3":
            known["line_end"] = True
        if grid is None:
            raise ValueError(
                f"`grid` must be given for a model of type {config.model_type!r}: lines, and tokens of a line, that which ends "
                "it included."
            )
        return cls(grid, kv_budget, **{**known, **kwargs})

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take new keys and values of a layer; give back all of them, or a handle where [`head_attention`] needs the query."""
        while len(self.layers) <= layer_idx:
            self.layers.append(HeadLayer(self.raster.layer(len(self.layers))))
        layer: Any = self.layers[layer_idx]
        return layer.update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything, so that the cache can serve another generation."""
        self.layers.clear()
        self.raster.reset()

    def report(self) -> CacheReport:
        """
        What was held, measured from the tensors; a step is a line. Tokens are image tokens, the rest counts the prompt too.

        Raises:
            `ValueError`: if no line is complete yet.
        """
        return self.raster.report()


class LineARCache(HeadKVCache):
    """[`HeadKVCache`] with LineAR's rule (arXiv 2512.04857): all heads hold the same number of tokens."""

    default_method: ClassVar[str] = "linear_ar"


@dataclass
class Watch:
    """
    What a model's attention has met inside of [`head_attention`].

    Args:
        compressed (`bool`):
            Whether a cache of ours has let go tokens.
        warned (`bool`):
            Whether it was said that another cache does not.
    """

    compressed: bool = False
    warned: bool = False


# By identity of the configuration that a model's attention modules share; entries live as long as their context.
WATCHES: dict[int, Watch] = {}


def head_kv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    The attention function that knows handles; all other keys go to the library's SDPA.

    Args:
        module (`torch.nn.Module`):
            The attention module.
        query (`torch.Tensor`):
            `[rows, query heads, tokens, head_dim]`.
        key, value (`torch.Tensor`):
            What the cache's `update` gave back.
        attention_mask (`torch.Tensor`, *optional*):
            Boolean or additive, `[rows, 1, tokens, seen]`.

    Returns:
        `tuple[torch.Tensor, None]`: `[rows, tokens, query heads, head_dim]`, and no weights.
    """
    watch = WATCHES.get(id(getattr(module, "config", None)))
    if not isinstance(key, KeyHandle):
        if watch is not None and watch.compressed and not watch.warned and query.shape[2] == 1 < key.shape[2]:
            watch.warned = True
            logger.warning(
                "A second cache of this model is not compressed. If it belongs to the unconditional rows of guidance, leave "
                "`guidance_scale` out and pass `logits_processor=[compressed_guidance(...)]`, which gives them one."
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if watch is not None and key.layer.groups:
        watch.compressed = True
    scale = kwargs.get("scaling")
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask >= 0

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0].transpose(1, 2)

    output = key.layer.attend(query, mask, query.shape[-1] ** -0.5 if scale is None else scale, dense)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def head_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """
    Let a model attend through [`HeadKVCache`]. Calls without one give what they gave; afterwards the configuration is what
    it was, also after an exception.

    Args:
        model (`PreTrainedModel`):
            The model, with `attn_implementation="sdpa"`.

    Raises:
        `ImportError`: if transformers is older than 5.5.
        `ValueError`: if the model attends in another way than SDPA.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        raise ImportError(
            f"transformers {transformers.__version__} draws wrong images with Janus; 5.5 or newer is needed: "
            "`pip install --upgrade transformers`."
        )
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation != "sdpa":
        raise ValueError(
            f"The model's attention is {text._attn_implementation!r}, but head groups are attended to with SDPA: load the "
            'model with `attn_implementation="sdpa"`.'
        )
    before = [(config, config._attn_implementation) for config in nested_configs(model.config)]
    AttentionInterface.register(ATTENTION_NAME, head_kv_attention)
    # Without a mask function of the same name the library would leave padding unmasked.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    WATCHES[id(text)] = Watch()
    try:
        parts = "text_config" in model.config.sub_configs
        model.set_attn_implementation({"text_config": ATTENTION_NAME} if parts else ATTENTION_NAME)
        yield model
    finally:
        del WATCHES[id(text)]
        # From the outside in, because a configuration hands what it is given on to those inside.
        for config, implementation in before:
            config._attn_implementation = implementation


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside of it, from the outside in."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from nested_configs(inner)


def compressed_guidance(
    model: PreTrainedModel,
    guidance_scale: float,
    negative_prompt_ids: torch.Tensor,
    cache: HeadKVCache,
    negative_prompt_attention_mask: torch.Tensor | None = None,
) -> UnbatchedClassifierFreeGuidanceLogitsProcessor:
    """
    Guidance whose unconditional rows are compressed too, for models such as Emu3 that run them in a pass of their own.

    `generate(guidance_scale=..., negative_prompt_ids=...)` gives that pass a `DynamicCache` of its own. Leave both out and
    pass `logits_processor=[compressed_guidance(...)]` instead.

    Args:
        model (`PreTrainedModel`):
            The model.
        guidance_scale (`float`):
            Weight of the prompt; 1 is no guidance.
        negative_prompt_ids (`torch.Tensor`):
            `[rows, tokens]`.
        cache ([`HeadKVCache`]):
            For the unconditional rows: another one than for the conditional ones.
        negative_prompt_attention_mask (`torch.Tensor`, *optional*):
            `[rows, tokens]`; all ones by default.
    """
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        guidance_scale,
        model,
        negative_prompt_ids,  # type: ignore[arg-type]
        negative_prompt_attention_mask,  # type: ignore[arg-type]
    )
    context: dict[str, Any] = processor.unconditional_context
    if "past_key_values" not in context:
        raise RuntimeError(
            f"Guidance of transformers {transformers.__version__} keeps its cache elsewhere than this package knows: use an "
            "older release, or set `guidance_scale` on `generate` and leave the unconditional rows uncompressed."
        )
    context["past_key_values"] = cache
    return processor
