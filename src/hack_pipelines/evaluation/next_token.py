"""Likelihood of pictures under next-token models, through whatever cache."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm


if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@torch.no_grad()
def next_token_nll(
    model: "PreTrainedModel",
    sequences: torch.Tensor,
    cache_factory: "Callable[[], Cache]",
    condition_tokens: int = 1,
    num_codes: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """
    Teacher-forced negative log-likelihood through a cache: the true tokens are fed one at a time, as when a picture is drawn,
    so that it is the cache's own arithmetic that is measured.

    Args:
        model (`PreTrainedModel`):
            A causal model with logits; compressed caches need [`head_attention`] around the call.
        sequences (`torch.Tensor`):
            Tokens `[pictures, condition_tokens + image tokens]`.
        cache_factory (`Callable`):
            Makes an empty cache; called once a batch.
        condition_tokens (`int`, *optional*, defaults to 1):
            Tokens before the picture.
        num_codes (`int`, *optional*):
            First tokens of the vocabulary that a picture is made of, among which a token is predicted; all by default.
        batch_size (`int`, *optional*, defaults to 64):
            Pictures in a batch.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar that counts tokens.

    Returns:
        `torch.Tensor`: nats `[pictures, image tokens]` in float32.

    Raises:
        `ValueError`: if there is no image token, one is no code, or a new cache is not empty.
    """
    codes = model.config.get_text_config(decoder=True).vocab_size if num_codes is None else num_codes
    image = sequences[:, condition_tokens:]
    if not image.numel() or condition_tokens < 1:
        raise ValueError(
            f"`sequences` must hold at least one token before the picture and one of it but are {tuple(sequences.shape)} with "
            f"`condition_tokens={condition_tokens}`."
        )
    if not 0 <= int(image.min()) <= int(image.max()) < codes:
        raise ValueError(f"Codes must be from 0 to {codes - 1} but reach from {image.min()} to {image.max()}.")
    batches = sequences.split(batch_size)
    losses = []
    with tqdm(total=len(batches) * image.shape[1], disable=not progress, leave=False) as bar:
        for batch in batches:
            cache, parts = cache_factory(), []
            if cache.get_seq_length():
                raise ValueError(f"The cache must be empty but holds {cache.get_seq_length()} tokens: make a new one.")
            step = batch[:, :condition_tokens]
            for target in batch[:, condition_tokens:].unbind(1):
                logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1, :codes]
                parts.append(F.cross_entropy(logits.float(), target, reduction="none"))
                step = target[:, None]
                bar.update()
            losses.append(torch.stack(parts, dim=1))
    return torch.cat(losses)
