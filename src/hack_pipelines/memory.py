"""What a model needs of a card, computed from shapes: no weights are loaded and nothing is downloaded."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .activations import FP32, SAMPLING_BYTES, block_bytes, cache_work_bytes, decoder_bytes
from .cache.budget import TokenBytes, budget_tokens, make_plan
from .cache.report import ORIGINAL_KEY_BYTES
from .methods import DEFAULT_METHOD, Geometry, Plan, SegmentPlan, get_method
from .methods.base import ID_BYTES, SCORE_BYTES
from .models.autoencoder_bsq import MultiScaleBSQModel
from .models.autoencoder_msvq import MultiScaleVQModel
from .models.infinity_schedules import image_size, nearest_schedule
from .models.transformer_infinity import InfinityTransformer2DModel
from .models.transformer_var import VARTransformer2DModel
from .profiles.head_profile import HeadProfile
from .profiles.statistics import statistic_shapes
from .schedule import Schedule


MAX_PROMPT_TOKENS = 512
VAR_DOWNSCALE_FACTOR = 16
# google/flan-t5-xl, of which the encoder is used.
TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Shape:
    """
    A released model.

    Args:
        family (`str`):
            `"infinity"` or `"var"`.
        transformer, tokenizer (`dict`):
            Where its parts differ from the defaults of their classes.
        side (`int`):
            Pixels of a side of the images that it was trained for.
    """

    family: str
    transformer: dict[str, Any]
    tokenizer: dict[str, Any]
    side: int


SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
INFINITY_8B = {
    "num_layers": 40,
    "num_attention_heads": 28,
    "bits_per_token": 56,
    "ff_hidden_dim": 14336,
    "num_pooling_heads": 16,
}
TOKENIZER_8B = {"latent_channels": 14, "block_out_channels": (128, 256, 512, 512), "patchify": True}
MODELS = {
    "2b": Shape("infinity", {}, {}, 1024),
    "8b": Shape("infinity", INFINITY_8B, TOKENIZER_8B, 1024),
    "8b-512": Shape("infinity", INFINITY_8B, TOKENIZER_8B, 512),
    **{
        f"d{depth}": Shape("var", {"num_layers": depth, "num_attention_heads": depth}, {}, 256)
        for depth in (16, 20, 24, 30)
    },
    "d36": Shape(
        "var",
        {"num_layers": 36, "num_attention_heads": 36, "patch_nums": SIDES_512, "shared_aln": True},
        {},
        512,
    ),
}


@dataclass(frozen=True)
class Request:
    """
    What is to be drawn, and how.

    Args:
        model (`str`):
            One of `MODELS`.
        size (`tuple[int, int]`, *optional*):
            Height and width in pixels; what the model was trained for by default. Infinity draws the size of the nearest
            schedule, VAR its own size only.
        kv_budget (`float`, `int` or `str`, *optional*):
            As the pipeline takes it.
        method (`str`, *optional*, defaults to `"hack++"`):
            How tokens are chosen when there is a budget.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Of weights, keys and values.
        images (`int`, *optional*, defaults to 1):
            Images that are drawn together.
        guided (`bool`, *optional*, defaults to `True`):
            Whether there are unconditional rows.
        prompt_tokens (`int`, *optional*, defaults to 512):
            Text tokens of a row, 512 at most.

    Raises:
        `ValueError`: if there is no such model, or it does not draw the size.
    """

    model: str
    size: tuple[int, int] | None = None
    kv_budget: float | int | str | None = None
    method: str = DEFAULT_METHOD
    dtype: torch.dtype = torch.bfloat16
    images: int = 1
    guided: bool = True
    prompt_tokens: int = MAX_PROMPT_TOKENS

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"`model` must be one of {', '.join(map(repr, MODELS))} but is {self.model!r}.")
        if not 1 <= self.prompt_tokens <= MAX_PROMPT_TOKENS:
            raise ValueError(f"`prompt_tokens` must lie in [1, {MAX_PROMPT_TOKENS}] but is {self.prompt_tokens}.")
        side = self.shape.side
        if self.shape.family == "var" and self.wanted_size != (side, side):
            high, wide = self.wanted_size
            raise ValueError(
                f"`size` is {high}x{wide} but model {self.model!r} draws {side}x{side} only: leave it out."
            )

    @property
    def shape(self) -> Shape:
        """The model."""
        return MODELS[self.model]

    @property
    def wanted_size(self) -> tuple[int, int]:
        """Height and width that were asked for."""
        return self.size or (self.shape.side, self.shape.side)

    @property
    def rows_per_image(self) -> int:
        """1, or 2 with guidance."""
        return 2 if self.guided else 1

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.images * self.rows_per_image


@dataclass(frozen=True)
class MemoryReport:
    """
    Bytes on the card, for the whole batch.

    Args:
        request ([`Request`]):
            What is drawn.
        size (`tuple[int, int]`):
            Height and width of the image in pixels.
        budget_tokens, peak_tokens (`int`, `float`):
            Tokens a head that the budget allows, and the most that the plan holds at a boundary; without a budget what a
            later step reads.
        transformer, tokenizer, text_encoder (`int`):
            Weights. The text encoder is flan-t5-xl's, in float16 with its `wo` layers in float32 where the dtype is half
            precision.
        text (`int`):
            What the transformer makes of the text and keeps.
        cache_original, cache_lossless, cache (`int`):
            Keys and values as the original holds them, all that a later step reads, and what is held at the budget.
        work (`int`):
            Activations of the largest step.
        decoder (`int`):
            Activations of decoding the images.
    """

    request: Request
    size: tuple[int, int]
    budget_tokens: int
    peak_tokens: float
    transformer: int
    tokenizer: int
    text_encoder: int
    text: int
    cache_original: int
    cache_lossless: int
    cache: int
    work: int
    decoder: int

    @property
    def drawing(self) -> int:
        """Beside the weights while the last scale is drawn."""
        return self.text + self.cache + self.work

    @property
    def total(self) -> int:
        """All weights on the card. The cache is gone when the images are decoded."""
        weights = self.transformer + self.tokenizer + self.text_encoder
        return weights + max(self.drawing, self.text + self.decoder)

    @property
    def total_offload(self) -> int:
        """
        Text encoder, transformer and tokenizer take turns. VAR's tokenizer stays beside its transformer, which leaves nothing
        to take turns with.
        """
        if not self.text_encoder:
            return self.total
        return max(self.text_encoder, self.transformer + self.drawing, self.tokenizer + self.text + self.decoder)


@dataclass(frozen=True)
class Fit:
    """
    How a request fits on a card; `None` stands for no way.

    Args:
        spare, spare_offload (`int`):
            Bytes that are left at the requested budget, negative if it does not fit.
        budget, budget_offload (`float`, *optional*):
            The largest `kv_budget` in hundredths below the requested one that fits, where the requested one does not.
    """

    spare: int
    spare_offload: int
    budget: float | None
    budget_offload: float | None


def estimate(request: Request) -> MemoryReport:
    """
    What a request needs.

    Raises:
        `ValueError`: if the budget is not one, or too small for the method.
    """
    geometry = geometry_of(request)
    schedule = geometry.schedule
    plan = plan_of(request, geometry)
    transformer, tokenizer = parts_of(request.model)
    infinity = request.shape.family == "infinity"
    size = image_size(schedule) if infinity else request.wanted_size
    peak = peak_tokens(plan) if plan else schedule.cacheable
    itemsize = request.dtype.itemsize
    return MemoryReport(
        request=request,
        size=size,
        budget_tokens=plan.budget if plan else schedule.cacheable,
        peak_tokens=peak,
        transformer=weight_bytes(transformer, request.dtype),
        tokenizer=weight_bytes(tokenizer, request.dtype),
        text_encoder=text_encoder_bytes(request.dtype) if infinity else 0,
        text=text_bytes(request, transformer.config) if infinity else 0,
        cache_original=cache_bytes(request, geometry, schedule.total, ORIGINAL_KEY_BYTES + itemsize),
        cache_lossless=cache_bytes(request, geometry, schedule.cacheable, 2 * itemsize),
        cache=held_bytes(request, geometry, plan),
        work=work_bytes(request, transformer.config, geometry, plan),
        decoder=decoder_bytes(tokenizer.config, size, request.images, itemsize),
    )


def cache_bytes(request: Request, geometry: Geometry, tokens: float, key_value_bytes: int) -> int:
    """Bytes of so many tokens a head, with the bytes that a channel of key and value together takes."""
    channels = geometry.num_layers * geometry.num_heads * geometry.head_dim
    return round(request.rows * channels * tokens * key_value_bytes)


def held_bytes(request: Request, geometry: Geometry, plan: Plan | None) -> int:
    """
    Bytes of what is held at the largest boundary between two steps; without a plan, of all that a later step reads.

    Beside its key and value a token has the score that it carries, for methods that carry scores, and its id, for methods
    that read ids, as soon as its head has lost a token.
    """
    itemsize = request.dtype.itemsize
    if plan is None:
        return cache_bytes(request, geometry, geometry.schedule.cacheable, 2 * itemsize)
    if isinstance(plan, SegmentPlan):
        return cache_bytes(request, geometry, peak_tokens(plan), 2 * itemsize)
    method = get_method(request.method)
    always = 2 * geometry.head_dim * itemsize + SCORE_BYTES * method.carries_scores
    id_bytes = ID_BYTES * method.needs_ids
    largest = 0
    for step, length in enumerate(plan.schedule.lengths):
        seen = plan.schedule.prefixes[step] + length
        held = sum(
            len(group) * count * (always + (id_bytes if count < seen else 0))
            for layer in plan.layers
            for group, count in zip(layer.groups, layer.store[step])
        )
        largest = max(largest, held)
    return request.rows * largest


def fit(request: Request, card: int) -> Fit:
    """How a request fits on a card of so many bytes."""
    report = estimate(request)
    spare, spare_offload = card - report.total, card - report.total_offload
    budget = None if spare >= 0 else largest_budget(request, card, offload=False)
    budget_offload = None if spare_offload >= 0 else largest_budget(request, card, offload=True)
    return Fit(spare, spare_offload, budget, budget_offload)


def largest_budget(request: Request, card: int, offload: bool) -> float | None:
    """The largest budget in hundredths, at most the requested one, with which a request fits on a card."""
    geometry = geometry_of(request)
    report = estimate(request)
    needed = report.total_offload if offload else report.total
    if needed - report.cache - report.work > card:
        # Without any cache it would not fit.
        return None
    method = get_method(request.method)
    smallest = method.min_budget(geometry, even_profile(geometry))
    asked = geometry.schedule.total
    if request.kv_budget is not None:
        token_bytes = TokenBytes(request.rows_per_image, request.dtype.itemsize, method.metadata_bytes)
        asked = budget_tokens(request.kv_budget, geometry, token_bytes)
    for hundredths in range(100, 0, -1):
        budget = hundredths / 100
        tokens = budget_tokens(budget, geometry, TokenBytes(1, 1))
        if not smallest <= tokens <= asked:
            continue
        report = estimate(replace(request, kv_budget=budget))
        if (report.total_offload if offload else report.total) <= card:
            return budget
    return None


@lru_cache(maxsize=len(MODELS))
def parts_of(model: str) -> tuple[Any, Any]:
    """Transformer and tokenizer of a model on the meta device, which has shapes but no memory."""
    shape = MODELS[model]
    with torch.device("meta"):
        if shape.family == "var":
            return VARTransformer2DModel(**shape.transformer), MultiScaleVQModel(**shape.tokenizer)
        return InfinityTransformer2DModel(**shape.transformer), MultiScaleBSQModel(**shape.tokenizer)


@lru_cache(maxsize=64)
def weight_bytes(model: Any, dtype: torch.dtype) -> int:
    """
    Parameters and buffers of a model after `from_pretrained(..., dtype=dtype)`: those whose path has a name of
    `_keep_in_fp32_modules` in it stay in float32, and what is no floating point number stays what it is.
    """
    kept = set(model._keep_in_fp32_modules or ())
    parameters = sum(
        parameter.numel() * (FP32 if kept & set(name.split(".")) else dtype.itemsize)
        for name, parameter in model.named_parameters()
    )
    return parameters + sum(buffer.nbytes for buffer in model.buffers())


@lru_cache(maxsize=len(MODELS))
def text_encoder_bytes(dtype: torch.dtype, num_layers: int = TEXT_ENCODER_CONFIG["num_layers"]) -> int:
    """
    Weights of flan-t5-xl's encoder: float16 where the transformer is half precision, as the pipeline loads it, but for its
    `wo` layers, which transformers keeps in float32.
    """
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**{**TEXT_ENCODER_CONFIG, "num_layers": num_layers}))
    itemsize = FP32 if dtype == torch.float32 else torch.float16.itemsize
    return sum(
        parameter.numel() * (FP32 if "wo" in name.split(".") else itemsize)
        for name, parameter in encoder.named_parameters()
    )


def geometry_of(request: Request) -> Geometry:
    """Layers, heads and schedule of a request."""
    transformer, _ = parts_of(request.model)
    config = transformer.config
    if isinstance(transformer, VARTransformer2DModel):
        schedule: Schedule = transformer.schedule
    else:
        schedule = nearest_schedule(*request.wanted_size)
    return Geometry(schedule, config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])


def plan_of(request: Request, geometry: Geometry) -> Plan | None:
    """The method's plan at the budget, or `None` without one."""
    if request.kv_budget is None:
        return None
    # Batches of any size and texts of any length have the same plan.
    request = replace(request, images=1, prompt_tokens=MAX_PROMPT_TOKENS)
    return cached_plan(request, geometry, type(request.kv_budget).__name__)


@lru_cache(maxsize=256)
def cached_plan(request: Request, geometry: Geometry, budget_type: str) -> Plan:
    """As [`plan_of`], of a request with a budget; its type counts because 1, a token, equals 1.0, everything."""
    method, profile = get_method(request.method), even_profile(geometry)
    token_bytes = TokenBytes(request.rows_per_image, request.dtype.itemsize, method.metadata_bytes)
    return make_plan(method, geometry, profile, token_bytes, request.kv_budget)


def even_profile(geometry: Geometry) -> HeadProfile:
    """
    A stand-in for the model's head profile: in every layer, every second head is contextual. Which heads are is the model's
    secret, but how many tokens a plan holds in all depends on their number only, up to rounding. Layers and steps are alike
    in it, so methods that divide the budget by a profile divide it evenly here.
    """
    heads = torch.arange(geometry.num_heads) % 2
    shapes = statistic_shapes(geometry.num_layers, geometry.num_heads, len(geometry.schedule))
    mean = {name: torch.ones(shape) for name, shape in shapes.items()}
    mean["colvar"] = heads.float()[None, :, None].expand(shapes["colvar"])
    return HeadProfile(
        mean=mean,
        variance={name: torch.zeros(shape) for name, shape in shapes.items()},
        family="none",
        num_layers=geometry.num_layers,
        num_heads=geometry.num_heads,
        head_dim=geometry.head_dim,
        schedule=[list(size) for size in geometry.schedule.sizes],
        dtype="float32",
        sampling={},
        inputs=[0],
        seeds=[0],
        software={},
    )


def peak_tokens(plan: Plan) -> float:
    """
    The most tokens that a plan holds at a boundary between steps, averaged over layers and heads. Where all layers share an
    arena, that is as large as the worst checkpoint needs it.
    """
    heads = sum(len(group) for group in plan.layers[0].groups) * len(plan.layers)
    if isinstance(plan, SegmentPlan):
        return plan.checkpoint_peak / heads
    held = (
        sum(len(group) * count for layer in plan.layers for group, count in zip(layer.groups, layer.store[step]))
        for step in range(len(plan.schedule))
    )
    return max(held) / heads


def text_bytes(request: Request, config: Any) -> int:
    """
    Prompt features in float32, the text as cross-attention reads it, its keys and values in every layer, and three
    modulations: 6 and 2 vectors a row in float32 and the pooled text.
    """
    dim, itemsize = width(config), request.dtype.itemsize
    tokens = request.rows * request.prompt_tokens
    features = request.images * request.prompt_tokens * config["text_channels"] * FP32
    keys_values = config["num_layers"] * tokens * 2 * dim * itemsize
    return features + keys_values + tokens * dim * itemsize + request.rows * dim * (8 * FP32 + itemsize)


def width(config: Any) -> int:
    """Channels of a transformer."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def work_bytes(
    request: Request, config: Any, geometry: Geometry, plan: Plan | None, merge_by_product: bool = True
) -> int:
    """
    The most that is alive beside weights, text and cache in any step: in a block, or while tokens are drawn.

    Args:
        request ([`Request`]):
            What is drawn.
        config (`dict`):
            Of the transformer.
        geometry (`Geometry`):
            Of the model.
        plan (`Plan`, *optional*):
            What is held; `None` is all that a later step reads.
        merge_by_product (`bool`, *optional*, defaults to `True`):
            Whether dropped tokens are merged as on a GPU; the CPU takes less.
    """
    rows, itemsize = request.rows, request.dtype.itemsize
    logits = config["vocab_size"] if request.shape.family == "var" else 2 * config["bits_per_token"]
    method = get_method(request.method)
    largest = 0
    for step, length in enumerate(geometry.schedule.lengths):
        tokens = rows * length
        sampling = request.images * length * logits * SAMPLING_BYTES
        cache = cache_work_bytes(method, geometry, plan, step, rows, itemsize, merge_by_product)
        largest = max(largest, sampling, tokens * block_bytes(config, itemsize), cache)
    return largest
