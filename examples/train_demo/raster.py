"""The raster demo model: a picture is drawn token by token, line by line, by a `LlamaForCausalLM` of `transformers`.

A sequence is one token for the class and then the 256 codes of a 16 x 16 map. Every function takes any cache of
`transformers`, so that compressed caches can be measured against `DynamicCache`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, LlamaForCausalLM

from hack_pipelines.integrations.next_token import CodeSampling, class_tokens, draw_codes, next_logits
from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel
from hack_pipelines.schedule import Schedule


PATCH_NUMS = (16,)
SCHEDULE = Schedule.from_sides(PATCH_NUMS)
# Judged on sheets of samples.
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 100}


def load_raster(folder: Path) -> tuple[LlamaForCausalLM, MultiScaleVQModel]:
    """The transformer and the image tokenizer that `export_raster.py` wrote, in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, MultiScaleVQModel.from_pretrained(folder / "vae").eval()


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
            Class ids `[pictures]`; the number of classes stands for none.
        guidance_scale (`float`, defaults to 2.0):
            Weight of the class. With 1, which is no guidance, a picture has one row in the batch; otherwise two, and the
            rows with a class come first.
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
        `ValueError`: if a class does not exist, a number is out of its range, or the cache is not empty.
    """
    sampling = CodeSampling(guidance_scale, temperature, top_k)
    return draw_codes(model, classes, SCHEDULE.total, sampling, empty_cache(past_key_values), generator)


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
