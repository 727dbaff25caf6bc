"""Layers that the transformers of both families are made of."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from ..cache.attention import attention
from ..cache.operator import Handle


# exp of it is the largest temperature of a head; float32(ln 100), as the released weights were trained with.
MAX_LOG_SCALE = 4.605170249938965

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary positions of a step's tokens, `[tokens, head_dim / 2]` each in float32."""


class Linear(nn.Linear):
    """
    A linear layer whose weights may be half precision, applied to the float32 stream. It casts in its own `forward`, because
    that is where hooks (offload, layerwise casting) have put the weights into their place and dtype.
    """

    def forward(self, input: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias if with_bias else None)


class LinearFP32(Linear):
    """A linear layer that autocast must not touch; float32 out."""

    def forward(self, input: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input, with_bias).float()


def modulated_norm(hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """`LN(x) * (1 + scale) + shift` in float32, without weights of its own."""
    normed = F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=eps)
    return normed.mul(scale.add(1)).add(shift)


def rotate(hidden_states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate adjacent pairs of channels of `[rows, heads, tokens, head_dim]` in float32 by the angles of their token."""
    cos, sin = rotary
    even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class BackendAttnProcessor:
    """A way to compute attention that diffusers can tell a backend; without one it takes that which is active."""

    _attention_backend: AttentionBackendName | None = None


class FusedAttention(nn.Module, AttentionModuleMixin):
    """
    Attention whose projections are one layer from the start, as the released weights have them.

    Args:
        heads (`int`):
            Heads.
        processor (`BackendAttnProcessor`):
            Computes it; `set_processor` sets another.
    """

    _supports_qkv_fusion = False
    fused_projections = True
    processor: Any

    def __init__(self, heads: int, processor: BackendAttnProcessor):
        super().__init__()
        self.heads = heads
        self.processor = processor


class ScaleAttnProcessor(BackendAttnProcessor):
    """Self-attention to a scale and the scales before, which a cache holds, or to all scales under a mask."""

    def __call__(
        self,
        attn: "ScaleAttention",
        hidden_states: torch.Tensor,
        kv_cache: Handle | None = None,
        mask: torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> torch.Tensor:
        projected = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        if attn.log_scale is not None:
            # In half precision the original takes the minimum in the parameter's dtype, which lowers the cap.
            temperature = attn.log_scale.clamp_max(MAX_LOG_SCALE).float().exp()
            query = F.normalize(query.float(), dim=-1) * temperature
            key = F.normalize(key.float(), dim=-1)
        if rotary is not None:
            query, key = rotate(query.float(), rotary), rotate(key.float(), rotary)
        # Attention reads one dtype, so this is what the cache holds: casting now or at every use gives the same bits.
        query, key = query.to(value.dtype), key.to(value.dtype)
        scale, backend = attn.logit_scale, self._attention_backend
        if kv_cache is None:
            attended = attention(query, key, value, scale, mask, backend).transpose(1, 2)
        else:
            projection = None
            if kv_cache.wants_projection:
                # Through the layer once more: its weights may be elsewhere outside of its own call.
                bare = attn.to_qkv(hidden_states, with_bias=False).unflatten(-1, (3, attn.heads, -1))
                projection = bare[:, :, 0].transpose(1, 2)
            attended = kv_cache.attend(
                attn.layer, query, key, value, scale=scale, projection=projection, backend=backend
            )
        return attn.to_out(attended.flatten(2))


class ScaleAttention(FusedAttention):
    """Self-attention whose history lives in a cache, because what is kept of it is not the model's business."""

    def __init__(self, dim: int, heads: int, layer_idx: int, l2_norm: bool = True):
        super().__init__(heads, ScaleAttnProcessor())
        # On the CPU wherever the module goes, and a tensor, so that all layers share their compiled code.
        self.layer = torch.tensor(layer_idx, device="cpu")
        self.to_qkv = Linear(dim, 3 * dim)
        self.to_out = Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log()) if l2_norm else None
        self.logit_scale = 1.0 if l2_norm else 0.25 / (dim // heads) ** 0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        kv_cache: Handle | None = None,
        mask: torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, kv_cache, mask, rotary)


class FeedForward(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj_in = Linear(dim, hidden_dim)
        self.proj_out = Linear(hidden_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj_out(F.gelu(self.proj_in(hidden_states), approximate="tanh"))
