"""Next-scale prediction transformer of VAR (arXiv 2404.02905)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..cache.cache import Cache
from ..cache.operator import Handle
from ..schedule import Schedule
from .layers import FeedForward, Linear, ScaleAttention, modulated_norm


@dataclass
class VARTransformer2DModelOutput(BaseOutput):
    """
    Output of [`VARTransformer2DModel`].

    Args:
        logits (`torch.Tensor`):
            `[rows, tokens, vocab_size]` in float32.
    """

    logits: torch.Tensor


class VARTransformerBlock(nn.Module):
    """Attention and feed-forward, both modulated by the condition; `modulation` is a table when AdaLN is shared."""

    def __init__(
        self, dim: int, heads: int, hidden_dim: int, layer_idx: int, l2_norm: bool, shared_aln: bool, eps: float
    ):
        super().__init__()
        self.eps = eps
        self.attn = ScaleAttention(dim, heads, layer_idx, l2_norm)
        self.ff = FeedForward(dim, hidden_dim)
        self.modulation = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5) if shared_aln else Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        kv_cache: Handle | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(self.modulation, nn.Parameter):
            modulation = self.modulation + condition
        else:
            modulation = self.modulation(F.silu(condition)).view(len(condition), 1, 6, -1)
        gate_attn, gate_ff, scale_attn, scale_ff, shift_attn, shift_ff = modulation.unbind(2)
        attended = self.attn(modulated_norm(hidden_states, scale_attn, shift_attn, self.eps), kv_cache, mask)
        # Rounded to the dtype of the branch, as the original's in-place product is under autocast.
        hidden_states = hidden_states + (attended * gate_attn).to(attended.dtype)
        return hidden_states + self.ff(modulated_norm(hidden_states, scale_ff, shift_ff, self.eps)) * gate_ff


class VARTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """
    Class-conditional transformer that predicts all tokens of a scale at once from the scales before it.

    Args:
        num_layers (`int`, defaults to 16):
            Blocks.
        num_attention_heads (`int`, defaults to 16):
            Heads of a block.
        attention_head_dim (`int`, defaults to 64):
            Channels of a head.
        num_classes (`int`, defaults to 1000):
            Classes; one more row of the class table, the last, is the null class of guidance.
        vocab_size (`int`, defaults to 4096):
            Rows of the tokenizer's codebook.
        latent_channels (`int`, defaults to 32):
            Channels of the tokenizer's latent.
        patch_nums (`tuple[int, ...]`, defaults to `(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)`):
            Side of the token map of every scale.
        mlp_ratio (`float`, defaults to 4.0):
            Width of the feed-forward layer over that of the block.
        shared_aln (`bool`, defaults to `False`):
            Whether the blocks share one modulation layer and differ by a table only.
        attn_l2_norm (`bool`, defaults to `True`):
            Whether queries and keys are normalised and a head has a learned temperature.
        norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer normalisations.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VARTransformerBlock"]
    _repeated_blocks = ["VARTransformerBlock"]
    _keep_in_fp32_modules = ["class_embed", "pos_start", "pos_embed", "level_embed", "log_scale"]
    _skip_layerwise_casting_patterns = ["embed", "pos_start", "log_scale", "modulation"]
    _skip_keys = ["kv_cache"]

    @register_to_config
    def __init__(
        self,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        vocab_size: int = 4096,
        latent_channels: int = 32,
        patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        mlp_ratio: float = 4.0,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.schedule = Schedule.from_sides(patch_nums)
        levels = [level for level, length in enumerate(self.schedule.lengths) for _ in range(length)]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.randn(1, self.schedule.lengths[0], dim) * dim**-0.5)
        self.pos_embed = nn.Parameter(torch.randn(1, self.schedule.total, dim) * dim**-0.5)
        self.level_embed = nn.Embedding(len(patch_nums), dim)
        self.latent_embed = Linear(latent_channels, dim)
        self.shared_modulation = Linear(dim, 6 * dim) if shared_aln else None
        self.transformer_blocks = nn.ModuleList(
            [
                VARTransformerBlock(
                    dim, num_attention_heads, round(dim * mlp_ratio), i, attn_l2_norm, shared_aln, norm_eps
                )
                for i in range(num_layers)
            ]
        )
        self.norm_modulation = Linear(dim, 2 * dim)
        self.proj_out = Linear(dim, vocab_size)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        class_labels: torch.Tensor,
        step: int | None = None,
        kv_cache: Cache | None = None,
        return_dict: bool = True,
    ) -> VARTransformer2DModelOutput | tuple[torch.Tensor]:
        """
        Predict the tokens of one scale, or of all scales at once (teacher forcing).

        Args:
            hidden_states (`torch.Tensor`, *optional*):
                Pooled latents `[batch, tokens, latent_channels]`: of scale `step`, or without a step those of all
                scales but the first, one after the other. `None` for the first scale, which starts from its class.
            class_labels (`torch.Tensor`):
                Class ids `[rows]`; `num_classes` is the null class. With guidance there are twice as many rows as
                latents, conditional ones first, and both halves read the same latents.
            step (`int`, *optional*):
                Index of the scale, from 0. `None` runs all scales with a mask that hides later scales.
            kv_cache (`Cache`, *optional*):
                Holds keys and values of earlier scales; needed with `step`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARTransformer2DModelOutput`] rather than a tuple.

        Returns:
            [`VARTransformer2DModelOutput`] or `tuple`: logits `[rows, tokens, vocab_size]` in float32.

        Raises:
            `ValueError`: if a step comes without a cache or a cache without a step.
        """
        if (step is None) != (kv_cache is None):
            raise ValueError(
                f"`step` and `kv_cache` go together but are {step} and {kv_cache}: "
                "give both to draw one scale, neither for teacher forcing."
            )
        condition = self.class_embed(class_labels)
        hidden_states = self._embed(hidden_states, condition, step)
        mask = self.levels[:, None] >= self.levels[None, :] if step is None else None
        modulation = condition
        if self.shared_modulation is not None:
            modulation = self.shared_modulation(F.silu(condition)).view(len(condition), 1, 6, -1).float()
        handle = None if kv_cache is None else kv_cache.handle
        # What is drawn is not computed twice: a cache takes a scale once.
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing and kv_cache is None
        for block in self.transformer_blocks:
            if checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, modulation, handle, mask)
            else:
                hidden_states = block(hidden_states, modulation, handle, mask)
        norm = self.norm_modulation(F.silu(condition)).view(len(condition), 1, 2, -1)
        # The blocks before may be on another device.
        scale, shift = norm.to(hidden_states.device).unbind(2)
        hidden_states = modulated_norm(hidden_states, scale, shift, self.config["norm_eps"])
        logits = self.proj_out(hidden_states).float()
        return VARTransformer2DModelOutput(logits=logits) if return_dict else (logits,)

    def _embed(self, latents: torch.Tensor | None, condition: torch.Tensor, step: int | None) -> torch.Tensor:
        """Token embeddings `[rows, tokens, dim]`: class or latent, plus position and level, where the condition is."""
        device = condition.device
        lengths, prefixes = self.schedule.lengths, self.schedule.prefixes
        here = slice(None) if step is None else slice(prefixes[step], prefixes[step] + lengths[step])
        positions = self.level_embed(self.levels[here]).to(device) + self.pos_embed[:, here].to(device)
        parts = []
        if not step:
            parts.append(condition.unsqueeze(1).expand(-1, lengths[0], -1) + self.pos_start.to(device))
        if latents is not None:
            parts.append(self.latent_embed(latents).to(device))
        embedded = torch.cat(parts, dim=1) + positions
        # With guidance both halves read the same latents, so these are embedded once.
        return embedded.repeat(len(condition) // len(embedded), 1, 1)
