"""The one attention call of the package."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)


@dataclass(frozen=True)
class AttentionCall:
    """
    What a layer hands to a cache beside queries, keys and values.

    Args:
        scale (`float`, *optional*, defaults to 1.0):
            Factor of the logits; 1 for cosine attention, whose temperature is already in the queries.
        backend (`AttentionBackendName`, *optional*):
            The diffusers attention backend; by default the one that is active in the process.
        projection (`torch.Tensor`, *optional*):
            Projections of the queries before bias, normalisation and rotation, `[rows, heads, n_k, head_dim]`.
    """

    scale: float = 1.0
    backend: AttentionBackendName | None = None
    projection: torch.Tensor | None = None

    def of_rows(self, rows: slice) -> "AttentionCall":
        """The same for some rows."""
        return self if self.projection is None else replace(self, projection=self.projection[rows])


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """
    Softmax attention by one of diffusers' backends, `[rows, heads, tokens, head_dim]` in and out.

    Args:
        query, key, value (`torch.Tensor`):
            Of one dtype and the same number of heads.
        scale (`float`, *optional*, defaults to 1.0):
            Factor of the logits; 1 for cosine attention, whose temperature is already in the queries.
        mask (`torch.Tensor`, *optional*):
            Boolean, true where a query may look: `[queries, keys]`, or what can be expanded to `[rows, heads, queries, keys]`.
            Without one every query sees every key.
        backend (`AttentionBackendName`, *optional*):
            The backend; by default the one that is active in the process.

    Returns:
        `torch.Tensor`: `[rows, heads, queries, head_dim]`.

    Raises:
        `ValueError`: if there is a mask and the backend takes none.
    """
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend == AttentionBackendName.NATIVE:
        # What the dispatcher does for it, without the way there, which takes longer than attention to a few tokens.
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None:
        mask = additive(mask, query.dtype)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return dispatch_attention_fn(query, key, value, mask, scale=scale, backend=backend).transpose(1, 2)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A boolean mask as what is added to the logits, with four dimensions.

    Backends that only know lengths take a boolean mask for one of keys and reduce it over the queries without a word; this
    form they refuse. Two dimensions would be taken for `[rows, keys]` where there are as many rows as queries.
    """
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, float("-inf"))[(None,) * (4 - mask.ndim)]
