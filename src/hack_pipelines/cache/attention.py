"""The one attention call of the package."""

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention, `[rows, heads, tokens, head_dim]` in and out.

    Args:
        query, key, value (`torch.Tensor`):
            Of one dtype and the same number of heads.
        scale (`float`, *optional*, defaults to 1.0):
            Factor of the logits; 1 for cosine attention, whose temperature is already in the queries.
        mask (`torch.Tensor`, *optional*):
            Boolean `[queries, keys]`, true where a query may look. Without one every query sees every key.

    Returns:
        `torch.Tensor`: `[rows, heads, queries, head_dim]`.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
