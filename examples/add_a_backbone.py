"""A next-scale transformer of one's own in the pipeline's loop, with budgets, and the checks that it has to pass.

python examples/add_a_backbone.py
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from hack_pipelines import Cache, FullCache, HackVARClassPipeline, MultiScaleVQModel
from hack_pipelines.schedule import Schedule


class Block(nn.Module):
    """Pre-norm attention and feed-forward; what is kept of the history is the cache's business."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(
        self, hidden_states: torch.Tensor, layer: int, kv_cache: Cache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        normed = self.norm1(hidden_states)
        query, key, value = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        scale = query.shape[-1] ** -0.5
        if kv_cache is None:
            attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        else:
            # The only line that a cache needs: it stores what later scales read, and attends.
            attended = kv_cache.attend(layer, query, key, value, scale=scale)
        hidden_states = hidden_states + self.to_out(attended.transpose(1, 2).flatten(2))
        return hidden_states + self.ff(self.norm2(hidden_states))


class MiniTransformer(ModelMixin, ConfigMixin):
    """
    A small class-conditional next-scale transformer.

    Args:
        num_layers, num_attention_heads, attention_head_dim (`int`):
            What the pipeline tells compression methods of the model.
        num_classes, vocab_size, latent_channels (`int`):
            Classes without the null class, codes of the image tokenizer, channels of its latent.
        patch_nums (`tuple[int, ...]`):
            Side of the token map of every scale.
    """

    @register_to_config
    def __init__(
        self,
        num_layers: int = 3,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        num_classes: int = 10,
        vocab_size: int = 64,
        latent_channels: int = 8,
        patch_nums: tuple[int, ...] = (1, 2, 3, 4, 6),
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.schedule = Schedule.from_sides(patch_nums)
        levels = [level for level, length in enumerate(self.schedule.lengths) for _ in range(length)]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.latent_embed = nn.Linear(latent_channels, dim)
        self.positions = nn.Parameter(torch.randn(self.schedule.total, dim))
        self.blocks = nn.ModuleList(Block(dim, num_attention_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.proj_out = nn.Linear(dim, vocab_size)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        class_labels: torch.Tensor,
        step: int | None = None,
        kv_cache: Cache | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        """
        Logits `[rows, tokens, vocab_size]` of scale `step`, or without a step of all scales at once.

        Args:
            hidden_states (`torch.Tensor`, *optional*):
                Pooled latents `[images, tokens, latent_channels]` of the scale, or of all scales but the first.
            class_labels (`torch.Tensor`):
                `[rows]`; with guidance there are two rows an image, all conditional ones first.
            step (`int`, *optional*):
                Index of the scale, from 0.
            kv_cache (`Cache`, *optional*):
                Holds the scales before.
            return_dict (`bool`, *optional*, defaults to `True`):
                Taken as diffusers' models take it; a tuple comes back either way.
        """
        start = 0 if step is None else self.schedule.prefixes[step]
        stop = self.schedule.total if step is None else start + self.schedule.lengths[step]
        condition = self.class_embed(class_labels).unsqueeze(1)
        tokens = condition.new_zeros(len(condition), stop - start, condition.shape[-1])
        if hidden_states is not None:
            embedded = self.latent_embed(hidden_states).repeat(len(condition) // len(hidden_states), 1, 1)
            tokens[:, -embedded.shape[1] :] = embedded
        tokens = tokens + condition + self.positions[start:stop]
        mask = self.levels[:, None] >= self.levels[None, :] if step is None else None
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, layer, kv_cache, mask)
        return (self.proj_out(self.norm(tokens)).float(),)


def build() -> HackVARClassPipeline:
    """A pipeline of random weights, large enough for attention to matter."""
    torch.manual_seed(0)
    transformer = MiniTransformer().eval()
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    vae = MultiScaleVQModel(vocab_size=64, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1)
    pipe = HackVARClassPipeline(transformer=transformer, vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    """One generator a picture."""
    return [torch.Generator().manual_seed(value) for value in values]


def same_tokens(first, second) -> bool:
    """Whether two calls drew the same tokens at every scale."""
    return all(torch.equal(one, other) for one, other in zip(first.tokens, second.tokens, strict=True))


@torch.no_grad()
def drift_from_teacher_forcing(pipe: HackVARClassPipeline) -> float:
    """Largest difference between logits scale by scale with a cache, and of all scales in one masked pass."""
    labels = torch.tensor([3])
    tokens = pipe(class_labels=3, guidance_scale=1, generator=seeds(0)).tokens
    cache = FullCache(pipe.schedule, pipe.geometry().num_layers)
    latents, scale_input = pipe.prepare_latents(1, pipe.schedule), None
    by_scale, inputs = [], []
    for step, drawn in enumerate(tokens):
        by_scale.append(pipe.transformer(scale_input, labels, step=step, kv_cache=cache)[0])
        latents, scale_input = pipe.vae.accumulate(latents, drawn, step, pipe.schedule)
        inputs += [] if scale_input is None else [scale_input]
    at_once = pipe.transformer(torch.cat(inputs, dim=1), labels)[0]
    return float((torch.cat(by_scale, dim=1) - at_once).abs().max())


def check(pipe: HackVARClassPipeline):
    """
    What a backbone has to show.

    Raises:
        `RuntimeError`: naming what does not hold.
    """

    def draw(labels, *values, **options):
        return pipe(class_labels=labels, generator=seeds(*values), **options)

    full, several = draw([3], 0), draw([3, 7], 0, 1)
    half = draw([3], 0, kv_budget=0.3)
    facts = {
        "a cache changes nothing": drift_from_teacher_forcing(pipe) < 1e-4,
        "a budget for everything changes nothing": same_tokens(full, draw([3], 0, kv_budget=pipe.schedule.cacheable)),
        "a smaller one does": not same_tokens(full, half),
        "a budget is kept": half.cache_report.peak_tokens <= 0.3 * pipe.schedule.total,
        "a picture does not depend on its batch": torch.equal(full.tokens[-1][0], several.tokens[-1][0]),
    }
    for method in ("hack", "heatkv", "snapkv", "random"):
        report = draw([3], 0, kv_budget=0.3, method=method).cache_report
        facts[f"{method} keeps its budget"] = report.peak_tokens <= 0.3 * pipe.schedule.total
    for fact, holds in facts.items():
        print(f"{'holds' if holds else 'FAILS'}: {fact}")
    if not all(facts.values()):
        raise RuntimeError("This backbone does not do yet what the pipeline relies on.")


if __name__ == "__main__":
    check(build())
