"""The raster demo model: a picture is drawn token by token, line by line, by a `LlamaForCausalLM` of `transformers`.

A sequence is one token for the class and then the 256 codes of a 16 x 16 map. Every function takes any cache of
`transformers`, so that compressed caches can be measured against `DynamicCache`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import Cache, DynamicCache, LlamaForCausalLM

from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel
from hack_pipelines.pipelines.sampling import filter_logits, guide, gumbel_softmax
from hack_pipelines.schedule import Schedule


PATCH_NUMS = (16,)
SCHEDULE = Schedule.from_sides(PATCH_NUMS)
# Judged on sheets of samples.
SAMPLING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 100}


def load_raster(folder: Path) -> tuple[LlamaForCausalLM, MultiScaleVQModel]:
    """The transformer and the image tokenizer that `export_raster.py` wrote, in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, MultiScaleVQModel.from_pretrained(folder / "vae").eval()


def class_tokens(model: LlamaForCausalLM, classes: torch.Tensor | None, count: int = 1) -> torch.Tensor:
    """
    First tokens of sequences: classes follow the codes in the vocabulary, and the last one stands for no class.

    Args:
        model (`LlamaForCausalLM`):
            Its configuration has `num_codes` and, in `id2label`, the names of the classes.
        classes (`torch.Tensor`, *optional*):
            Class ids `[pictures]`; without them, the token for no class, `count` times.
        count (`int`, defaults to 1):
            Sequences without a class.

    Returns:
        `torch.Tensor`: `[pictures]` int64.

    Raises:
        `ValueError`: if a class does not exist.
    """
    codes, num_classes = model.config.num_codes, len(model.config.id2label)
    if classes is None:
        return torch.full((count,), codes + num_classes)
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"Classes must be from 0 to {num_classes - 1} but are {classes.tolist()}.")
    return codes + classes


def next_logits(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits `[rows, num_codes]` of the codes that follow `ids` `[rows]`, one token a row; the cache grows by them."""
    logits = model(input_ids=ids[:, None], past_key_values=cache, use_cache=True).logits
    return logits[:, -1, : model.config.num_codes].float()


@torch.no_grad()
def sample_raster(
    model: LlamaForCausalLM,
    classes: torch.Tensor,
    guidance_scale: float = SAMPLING["guidance_scale"],
    temperature: float = SAMPLING["temperature"],
    top_k: int = SAMPLING["top_k"],
    generator: torch.Generator | list[torch.Generator] | None = None,
    past_key_values: Cache | None = None,
) -> torch.Tensor:
    """
    Draw pictures, one for each class.

    Codes are drawn with Gumbel noise added to the logits: runs with the same seed share their noise, and differ only
    where a cache changes which code is the largest.

    Args:
        model (`LlamaForCausalLM`):
            The transformer.
        classes (`torch.Tensor`):
            Class ids `[pictures]`.
        guidance_scale (`float`, defaults to 3.0):
            Weight of the class. From 1, which turns guidance off, each picture has one row in the batch; otherwise two,
            and those with a class come first.
        temperature (`float`, defaults to 1.0):
            Divides the logits.
        top_k (`int`, defaults to 100):
            Codes to draw from; 0 draws from all.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            One for all pictures, or one a picture, which makes a picture independent of its batch.
        past_key_values (`Cache`, *optional*):
            An empty cache; by default a `DynamicCache`, which keeps everything.

    Returns:
        `torch.Tensor`: codes `[pictures, 256]`, row by row.

    Raises:
        `ValueError`: if a class does not exist, the temperature is not positive, or the cache is not empty.
    """
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive but is {temperature}.")
    cache = empty_cache(past_key_values)
    guided = guidance_scale != 1
    ids = class_tokens(model, classes)
    if guided:
        ids = torch.cat([ids, class_tokens(model, None, len(classes))])
    drawn = []
    for _ in range(SCHEDULE.total):
        logits = guide(next_logits(model, ids, cache), guidance_scale, guided)
        logits = filter_logits(logits / temperature, top_k)
        codes = gumbel_softmax(logits[:, None], 1.0, generator)[:, 0].argmax(-1)
        ids = codes.repeat(2) if guided else codes
        drawn.append(codes)
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def decode(vae: MultiScaleVQModel, tokens: torch.Tensor) -> list[Image.Image]:
    """Pictures of codes `[pictures, 256]`."""
    images = vae.decode(vae.quantizer.upsample(tokens.long(), 0, SCHEDULE))
    return VaeImageProcessor().postprocess(images, output_type="pil")


@torch.no_grad()
def raster_nll(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    classes: torch.Tensor,
    cache_factory: Callable[[], Cache] = DynamicCache,
    batch_size: int = 64,
) -> torch.Tensor:
    """
    Teacher-forced negative log-likelihood through a cache: the true codes are fed one at a time, as in sampling.

    Args:
        model (`LlamaForCausalLM`):
            The transformer.
        tokens (`torch.Tensor`):
            True codes `[pictures, 256]`, row by row.
        classes (`torch.Tensor`):
            Class ids `[pictures]`.
        cache_factory (`Callable`, defaults to `DynamicCache`):
            Makes an empty cache; called once a batch.
        batch_size (`int`, defaults to 64):
            Pictures in a batch.

    Returns:
        `torch.Tensor`: nats `[pictures, 256]`. The mean over the last axis is that of a picture, the mean over the first
        that of a position.

    Raises:
        `ValueError`: if shapes do not fit, a class or a code does not exist, or a new cache is not empty.
    """
    codes = model.config.num_codes
    if tokens.ndim != 2 or tokens.shape[1] != SCHEDULE.total or tokens.shape[0] != len(classes):
        raise ValueError(
            f"`tokens` must be [pictures, {SCHEDULE.total}] with one class a picture but are {tuple(tokens.shape)} "
            f"with {len(classes)} classes."
        )
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < codes:
        raise ValueError(f"Codes must be from 0 to {codes - 1} but reach from {tokens.min()} to {tokens.max()}.")
    sequences = torch.cat([class_tokens(model, classes)[:, None], tokens.long()], dim=1)
    batches = []
    for batch in sequences.split(batch_size):
        cache = empty_cache(cache_factory())
        batches.append(
            torch.stack(
                [
                    F.cross_entropy(next_logits(model, ids, cache), targets, reduction="none")
                    for ids, targets in zip(batch.T, batch.T[1:])
                ],
                dim=1,
            )
        )
    return torch.cat(batches)


def empty_cache(cache: Cache | None) -> Cache:
    """The cache, or a new `DynamicCache`; what an earlier picture left would be taken for the start of this one."""
    cache = DynamicCache() if cache is None else cache
    if cache.get_seq_length():
        raise ValueError(f"The cache must be empty but holds {cache.get_seq_length()} tokens: make a new one.")
    return cache
