"""Bitwise next-scale prediction transformer of Infinity (arXiv 2412.04431)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..cache.attention import attention
from ..cache.cache import Cache
from ..cache.operator import Attended, Handle
from ..schedule import Schedule
from .infinity_schedules import reference_size
from .layers import (
    BackendAttnProcessor,
    FeedForward,
    FusedAttention,
    Linear,
    LinearFP32,
    Rotary,
    ScaleAttention,
    modulated_norm,
)


ROTARY_BASE = 10_000


@dataclass
class InfinityTransformer2DModelOutput(BaseOutput):
    """
    Output of [`InfinityTransformer2DModel`].

    Args:
        logits (`torch.Tensor`):
            `[rows, tokens, 2 * bits_per_token]` in float32: channel `2 i + v` is the logit of bit `i` having value `v`.
    """

    logits: torch.Tensor


class TextRows:
    """
    Text features of several rows, one after the other without padding, and the rows that have the same length.

    Args:
        lengths (`Sequence[int]`):
            Text tokens of every row.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)
        self.groups = {length: [row for row, own in enumerate(lengths) if own == length] for length in lengths}

    def split(self, packed: torch.Tensor) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Rows of equal length, and their part of `[sum of lengths, ...]` as `[rows, length, ...]`."""
        parts = packed.split(self.lengths)
        for rows in self.groups.values():
            yield rows, torch.stack([parts[row] for row in rows])


@dataclass
class TextStates:
    """
    What the transformer makes of the text once: it is the same at every scale.

    Args:
        pooled (`torch.Tensor`):
            `[rows, dim]`, the first token and the condition of the head.
        modulation (`torch.Tensor`):
            `[rows, 1, 6, dim]` in float32, shared by all blocks.
        head_modulation (`torch.Tensor`):
            `[rows, 1, 2, dim]` in float32, scale and shift.
        hidden_states (`torch.Tensor`):
            `[sum of lengths, dim]`, what cross-attention reads.
        handle ([`Handle`]):
            Of the [`InfinityCondition`], which cross-attention attends to.
        complete (`bool`, *optional*, defaults to `False`):
            Whether all layers have made their keys and values.
    """

    pooled: torch.Tensor
    modulation: torch.Tensor
    head_modulation: torch.Tensor
    hidden_states: torch.Tensor
    handle: Handle
    complete: bool = False


class InfinityCondition(Attended):
    """
    Text of one call, conditional rows first. The transformer keeps here what it makes of the text, so that each prompt is
    encoded once a call and the model itself holds no state.

    Args:
        prompt_embeds (`Sequence[torch.Tensor]`):
            Features `[length, text_channels]` of every image's prompt, without padding.
        negative_prompt_embeds (`Sequence[torch.Tensor | None]`, *optional*):
            What guidance steers away from, one an image. `None`, for all or for one of them, takes the learned
            unconditional features, as many of them as the prompt has tokens.
        guided (`bool`, *optional*, defaults to `True`):
            Whether there are unconditional rows.
    """

    def __init__(
        self,
        prompt_embeds: Sequence[torch.Tensor],
        negative_prompt_embeds: Sequence[torch.Tensor | None] | None = None,
        guided: bool = True,
    ):
        super().__init__()
        self.prompt_embeds = tuple(prompt_embeds)
        self.negative_prompt_embeds = tuple(negative_prompt_embeds or (None,) * len(self.prompt_embeds))
        self.guided = guided
        lengths = [len(embeds) for embeds in self.prompt_embeds]
        if guided:
            pairs = zip(self.prompt_embeds, self.negative_prompt_embeds)
            lengths += [len(embeds if negative is None else negative) for embeds, negative in pairs]
        self.text_rows = TextRows(lengths)
        self.states: TextStates | None = None
        self.keys_values: dict[int, list[tuple[list[int], torch.Tensor, torch.Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.text_rows.lengths)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.prompt_embeds[0].device

    def packed(self, unconditional: torch.Tensor) -> torch.Tensor:
        """
        Features of all rows, one after the other, `[sum of lengths, text_channels]` in float32, where the learned ones are.

        Args:
            unconditional (`torch.Tensor`):
                The learned features `[text_max_length, text_channels]`.
        """
        parts = list(self.prompt_embeds)
        if self.guided:
            for embeds, negative in zip(self.prompt_embeds, self.negative_prompt_embeds):
                parts.append(unconditional[: len(embeds)] if negative is None else negative)
        return torch.cat([part.to(unconditional.device, torch.float32) for part in parts])

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        keys_values: torch.Tensor | None,
        scale: float = 1.0,
        projection: None = None,
        backend: AttentionBackendName | None = None,
    ) -> torch.Tensor:
        """
        Attention of every row to its own text.

        Args:
            layer_idx (`int`):
                Index of the layer.
            query (`torch.Tensor`):
                `[rows, heads, tokens, head_dim]`.
            keys_values (`torch.Tensor`, *optional*):
                The layer's keys and values `[sum of lengths, 2 * dim]`; by default those of the call before.
            scale (`float`, *optional*, defaults to 1.0):
                Factor of the logits.
            projection (`None`):
                Not read.
            backend (`AttentionBackendName`, *optional*):
                The diffusers attention backend; by default the one that is active in the process.

        Returns:
            `torch.Tensor`: `[rows, heads, tokens, head_dim]`.
        """
        if keys_values is not None:
            self.keys_values[layer_idx] = split_keys_values(keys_values, self.text_rows, query.shape[1])
        return text_attention(query, self.keys_values[layer_idx], scale, backend)


def text_attention(
    query: torch.Tensor,
    keys_values: Sequence[tuple[list[int], torch.Tensor, torch.Tensor]],
    scale: float,
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """
    Attention of every row to its own text, `[rows, heads, tokens, head_dim]` in and out.

    Rows of equal length are attended together: no padding, so nothing of a prompt depends on the others in its batch.

    Args:
        query (`torch.Tensor`):
            `[rows, heads, tokens, head_dim]`.
        keys_values (`Sequence`):
            Rows, keys and values `[rows, heads, length, head_dim]` of every length.
        scale (`float`):
            Factor of the logits.
        backend (`AttentionBackendName`, *optional*):
            The diffusers attention backend; by default the one that is active in the process.
    """
    if len(keys_values) == 1:
        _, key, value = keys_values[0]
        return attention(query, key, value, scale, backend=backend)
    output = torch.empty_like(query)
    for rows, key, value in keys_values:
        output[rows] = attention(query[rows], key, value, scale, backend=backend)
    return output


def rounded(tensor: torch.Tensor, in_bfloat16: bool) -> torch.Tensor:
    """Float32 rounded to bfloat16 if so wanted, as on the way into and out of the original's kernel."""
    return tensor.bfloat16().float() if in_bfloat16 and tensor.dtype == torch.float32 else tensor


class TextPoolingAttnProcessor(BackendAttnProcessor):
    """Attention from a learned query to the text of each row."""

    def __call__(self, attn: "TextPooling", text: torch.Tensor, rows: TextRows) -> torch.Tensor:
        keys_values = split_keys_values(rounded(attn.to_kv(text), attn.in_bfloat16), rows, attn.query.shape[1])
        query = attn.query.to(keys_values[0][1].dtype).unsqueeze(2).expand(len(rows.lengths), -1, -1, -1)
        pooled = text_attention(
            rounded(query, attn.in_bfloat16), keys_values, attn.query.shape[2] ** -0.5, self._attention_backend
        )
        return attn.to_out(rounded(pooled, attn.in_bfloat16).flatten(1))


class TextPooling(FusedAttention):
    """One vector for a text: cross-attention from a learned query."""

    def __init__(self, text_channels: int, dim: int, heads: int, in_bfloat16: bool):
        super().__init__(heads, TextPoolingAttnProcessor())
        self.in_bfloat16 = in_bfloat16
        self.query = nn.Parameter(torch.randn(1, heads, dim // heads) * dim**-0.5)
        self.to_kv = Linear(text_channels, 2 * dim)
        self.to_out = Linear(dim, dim)

    def forward(self, text: torch.Tensor, rows: TextRows) -> torch.Tensor:
        return self.processor(self, text, rows)


class TextProjection(nn.Module):
    """What cross-attention reads of the text."""

    def __init__(self, text_channels: int, dim: int):
        super().__init__()
        self.linear_1 = Linear(text_channels, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class TextNorm(nn.Module):
    """Root mean square normalisation in float32."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        text = text.float()
        return text * torch.rsqrt(text.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


def split_keys_values(
    projected: torch.Tensor, rows: TextRows, heads: int
) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Packed keys and values `[sum of lengths, 2 * dim]` as rows, keys and values `[rows, heads, length, head_dim]`."""
    result = []
    for members, part in rows.split(projected):
        key, value = part.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        result.append((members, key.contiguous(), value.contiguous()))
    return result


class TextAttnProcessor(BackendAttnProcessor):
    """Attention of a scale's tokens to the text, whose keys and values are made at the first scale and kept."""

    def __call__(self, attn: "TextCrossAttention", hidden_states: torch.Tensor, text: TextStates) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        keys_values = (
            None
            if text.complete
            else rounded(attn.to_kv(text.hidden_states.to(hidden_states.device)), attn.in_bfloat16)
        )
        attended = text.handle.attend(
            attn.layer,
            rounded(query, attn.in_bfloat16),
            keys_values,
            scale=query.shape[-1] ** -0.5,
            backend=self._attention_backend,
        )
        return attn.to_out(rounded(attended, attn.in_bfloat16).flatten(2))


class TextCrossAttention(FusedAttention):
    """Attention to the text, neither cosine nor rotated; its keys and values are computed once a call."""

    def __init__(self, dim: int, heads: int, layer_idx: int, in_bfloat16: bool):
        super().__init__(heads, TextAttnProcessor())
        # As in `ScaleAttention`.
        self.layer = torch.tensor(layer_idx, device="cpu")
        self.in_bfloat16 = in_bfloat16
        self.to_q = Linear(dim, dim)
        self.to_kv = Linear(dim, 2 * dim)
        self.to_out = Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor, text: TextStates) -> torch.Tensor:
        return self.processor(self, hidden_states, text)


class InfinityTransformerBlock(nn.Module):
    """Self-attention and feed-forward, modulated by the text, with cross-attention to it in between."""

    def __init__(self, dim: int, heads: int, hidden_dim: int, layer_idx: int, eps: float, in_bfloat16: bool):
        super().__init__()
        self.eps = eps
        self.attn = ScaleAttention(dim, heads, layer_idx)
        self.norm_text = FP32LayerNorm(dim, eps)
        self.cross_attn = TextCrossAttention(dim, heads, layer_idx, in_bfloat16)
        self.ff = FeedForward(dim, hidden_dim)
        self.modulation = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: TextStates,
        rotary: Rotary,
        kv_cache: Handle | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Hooks of a device map move tensors, but not what objects hold.
        modulation = self.modulation + text.modulation.to(hidden_states.device)
        gate_attn, gate_ff, scale_attn, scale_ff, shift_attn, shift_ff = modulation.unbind(2)
        attended = self.attn(modulated_norm(hidden_states, scale_attn, shift_attn, self.eps), kv_cache, mask, rotary)
        # Rounded to the dtype of the branch, as the original's in-place product is under autocast.
        hidden_states = hidden_states + (attended * gate_attn).to(attended.dtype)
        normed = self.norm_text(hidden_states.float())
        hidden_states = hidden_states.float() + self.cross_attn(normed, text)
        return hidden_states + self.ff(modulated_norm(hidden_states, scale_ff, shift_ff, self.eps)) * gate_ff


class InfinityTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """
    Text-to-image transformer that predicts all bits of a scale at once from the scales before it.

    Args:
        num_layers (`int`, defaults to 32):
            Blocks.
        num_attention_heads (`int`, defaults to 16):
            Heads of a block.
        attention_head_dim (`int`, defaults to 128):
            Channels of a head.
        bits_per_token (`int`, defaults to 32):
            Bits of a token; four times the tokenizer's latent channels when that is patchified.
        ff_hidden_dim (`int`, defaults to 8192):
            Width inside the feed-forward layer.
        text_channels (`int`, defaults to 2048):
            Channels of the text features.
        text_max_length (`int`, defaults to 512):
            Most text tokens of a row.
        num_pooling_heads (`int`, defaults to 16):
            Heads of the attention that pools the text.
        num_levels (`int`, defaults to 15):
            Rows of the level table, the most scales of a schedule.
        norm_eps (`float`, defaults to 1e-6):
            Epsilon of all normalisations.
        text_attention_in_bfloat16 (`bool`, defaults to `False`):
            Whether attention to the text rounds float32 to bfloat16 on the way in and out, as the original does for its
            kernel. Without effect in half precision.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["InfinityTransformerBlock", "TextPooling"]
    _repeated_blocks = ["InfinityTransformerBlock"]
    _keep_in_fp32_modules = [
        "uncond_embeds",
        "text_norm",
        "pos_start",
        "level_embed",
        "shared_modulation",
        "head_modulation",
        "head",
    ]
    _skip_layerwise_casting_patterns = ["embed", "norm", "pos_start", "log_scale", "modulation", "head", "query"]
    _skip_keys = ["kv_cache", "condition", "text"]

    @register_to_config
    def __init__(
        self,
        num_layers: int = 32,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        bits_per_token: int = 32,
        ff_hidden_dim: int = 8192,
        text_channels: int = 2048,
        text_max_length: int = 512,
        num_pooling_heads: int = 16,
        num_levels: int = 15,
        norm_eps: float = 1e-6,
        text_attention_in_bfloat16: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.uncond_embeds = nn.Parameter(torch.randn(text_max_length, text_channels) * text_channels**-0.5)
        self.text_norm = TextNorm(text_channels, norm_eps)
        self.text_pooling = TextPooling(text_channels, dim, num_pooling_heads, text_attention_in_bfloat16)
        self.text_proj = TextProjection(text_channels, dim)
        self.pos_start = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.level_embed = nn.Embedding(num_levels, dim)
        self.latent_embed = Linear(bits_per_token, dim)
        self.shared_modulation = LinearFP32(dim, 6 * dim)
        self.transformer_blocks = nn.ModuleList(
            [
                InfinityTransformerBlock(
                    dim, num_attention_heads, ff_hidden_dim, i, norm_eps, text_attention_in_bfloat16
                )
                for i in range(num_layers)
            ]
        )
        self.head_modulation = LinearFP32(dim, 2 * dim)
        self.head = LinearFP32(dim, 2 * bits_per_token)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        condition: InfinityCondition,
        schedule: Schedule,
        step: int | None = None,
        kv_cache: Cache | None = None,
        layer_guidance: Mapping[int, float] | None = None,
        return_dict: bool = True,
    ) -> InfinityTransformer2DModelOutput | tuple[torch.Tensor]:
        """
        Predict the bits of one scale, or of all scales at once (teacher forcing).

        Args:
            hidden_states (`torch.Tensor`, *optional*):
                Resized latents `[images, tokens, bits_per_token]`: of scale `step`, or without a step those of all scales
                but the first, one after the other. `None` for the first scale, which starts from its text.
            condition ([`InfinityCondition`]):
                Text of every row. With guidance there are twice as many rows as latents, conditional ones first, and both
                halves read the same latents.
            schedule (`Schedule`):
                The scales.
            step (`int`, *optional*):
                Index of the scale, from 0. `None` runs all scales with a mask that hides later scales.
            kv_cache (`Cache`, *optional*):
                Holds keys and values of earlier scales; needed with `step`.
            layer_guidance (`Mapping[int, float]`, *optional*):
                Guidance weights by block: after it both halves of the rows go on as their guided mixture.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`InfinityTransformer2DModelOutput`] rather than a tuple.

        Returns:
            [`InfinityTransformer2DModelOutput`] or `tuple`: logits `[rows, tokens, 2 * bits_per_token]` in float32.

        Raises:
            `ValueError`: if a step comes without a cache or a cache without a step.
        """
        if (step is None) != (kv_cache is None):
            raise ValueError(
                f"`step` and `kv_cache` go together but are {step} and {kv_cache}: "
                "give both to draw one scale, neither for teacher forcing."
            )
        # Anew for teacher forcing, where gradients may flow through it and weights change between two calls.
        if step is None or condition.states is None:
            condition.states = self._encode_text(condition)
        text = condition.states
        steps = tuple(range(len(schedule))) if step is None else (step,)
        rotary = rotary_positions(schedule, steps, self.config["attention_head_dim"], text.pooled.device)
        mask = None
        if step is None:
            levels = levels_of(schedule, steps, text.pooled.device)
            mask = levels[:, None] >= levels[None, :]
        hidden_states = self._embed(hidden_states, text.pooled, schedule, steps)
        handle = None if kv_cache is None else kv_cache.handle
        # What is drawn is not computed twice: a cache takes a scale once.
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing and kv_cache is None
        for index, block in enumerate(self.transformer_blocks):
            if checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, text, rotary, handle, mask)
            else:
                hidden_states = block(hidden_states, text, rotary, handle, mask)
            if layer_guidance and index in layer_guidance:
                weight = layer_guidance[index]
                conditional, unconditional = hidden_states.chunk(2)
                hidden_states = (weight * conditional + (1 - weight) * unconditional).repeat(2, 1, 1)
        text.complete = step is not None
        scale, shift = text.head_modulation.to(hidden_states.device).unbind(2)
        logits = self.head(modulated_norm(hidden_states, scale, shift, self.config["norm_eps"])).to(condition.device)
        return InfinityTransformer2DModelOutput(logits=logits) if return_dict else (logits,)

    @apply_forward_hook
    def unconditional_features(self, length: int) -> torch.Tensor:
        """The learned features `[length, text_channels]` that stand for no text."""
        return self.uncond_embeds[:length]

    def _encode_text(self, condition: InfinityCondition) -> TextStates:
        """What is the same at every scale."""
        text = self.text_norm(condition.packed(self.uncond_embeds))
        pooled = self.text_pooling(text, condition.text_rows)
        activated = F.silu(pooled.float())
        return TextStates(
            pooled=pooled,
            modulation=self.shared_modulation(activated).view(len(condition), 1, 6, -1),
            head_modulation=self.head_modulation(activated).view(len(condition), 1, 2, -1),
            hidden_states=self.text_proj(text),
            handle=condition.handle,
        )

    def _embed(
        self, latents: torch.Tensor | None, pooled: torch.Tensor, schedule: Schedule, steps: Sequence[int]
    ) -> torch.Tensor:
        """Token embeddings `[rows, tokens, dim]`: pooled text or latent, plus level, where the pooled text is."""
        device = pooled.device
        levels = self.level_embed(levels_of(schedule, steps, device)).to(device)
        parts = []
        if 0 in steps:
            parts.append(pooled.unsqueeze(1) + self.pos_start.to(device) + levels[:1])
            levels = levels[1:]
        if latents is not None:
            embedded = self.latent_embed(latents).to(device)
            # Added in place in the original: half precision is kept here, and float32 at the first scale.
            embedded = (embedded + levels).to(embedded.dtype)
            # With guidance both halves read the same latents, so these are embedded once.
            parts.append(embedded.repeat(len(pooled) // len(embedded), 1, 1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def levels_of(schedule: Schedule, steps: Sequence[int], device: torch.device) -> torch.Tensor:
    """The scale that each token of some scales belongs to, `[tokens]`."""
    return torch.cat([torch.full((schedule.lengths[step],), step, device=device) for step in steps])


def rotary_positions(schedule: Schedule, steps: Sequence[int], head_dim: int, device: torch.device) -> Rotary:
    """
    Cosines and sines of the tokens of some scales: the first half of a head turns with the row, the second with the column.

    Rows and columns are counted in cells of the template's largest token map, rounded half to even.

    Args:
        schedule (`Schedule`):
            The scales.
        steps (`Sequence[int]`):
            Indices of the scales.
        head_dim (`int`):
            Channels of a head.
        device (`torch.device`):
            Of the result.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[tokens, head_dim / 2]` each, in float32.
    """
    half = head_dim // 2
    frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    high, wide = reference_size(schedule)
    angles = []
    for step in steps:
        height, width = schedule.sizes[step]
        rows = torch.round(torch.arange(height, dtype=torch.float32, device=device) * (high / height))
        columns = torch.round(torch.arange(width, dtype=torch.float32, device=device) * (wide / width))
        by_row = torch.outer(rows, frequencies)[:, None].expand(-1, width, -1)
        by_column = torch.outer(columns, frequencies)[None].expand(height, -1, -1)
        angles.append(torch.cat((by_row, by_column), dim=-1).flatten(0, 1))
    joined = torch.cat(angles)
    return joined.cos(), joined.sin()
