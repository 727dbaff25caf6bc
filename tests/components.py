"""Tiny real components that the tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from hack_pipelines import (
    HackVARClassPipeline,
    HackVARPipeline,
    HackVARTextPipeline,
    MultiScaleVQModel,
    VARTransformer2DModel,
)
from hack_pipelines.cache.cache import FullCache
from hack_pipelines.models.autoencoder_bsq import MultiScaleBSQModel
from hack_pipelines.models.transformer_infinity import InfinityTransformer2DModel
from hack_pipelines.profiles.head_profile import HeadProfile
from hack_pipelines.profiles.statistics import statistic_shapes
from hack_pipelines.schedule import Schedule


SIDES = (1, 2, 3, 4)
NAMES = {0: "tabby, tabby cat", 1: "golden retriever", 2: "crane", 3: "crane", 4: "lighthouse, beacon"}
WORDS = ("a", "lighthouse", "storm", "in", "red", "blue", "apple", "smiling", "cat", "house")


def tiny_transformer(**overrides) -> VARTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_classes": 10,
        "vocab_size": 32,
        "latent_channels": 8,
        "patch_nums": SIDES,
    }
    transformer = VARTransformer2DModel(**{**config, **overrides})
    enliven(transformer)
    return transformer.eval()


def enliven(transformer: torch.nn.Module):
    """Larger weights: PyTorch's initial ones make every block a near no-op and tests blind to what attention sees."""
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)


def tiny_vae(**overrides) -> MultiScaleVQModel:
    torch.manual_seed(0)
    config = {"vocab_size": 32, "latent_channels": 8, "block_out_channels": (32, 32), "layers_per_block": 1}
    return MultiScaleVQModel(**{**config, **overrides}).eval()


def tiny_pipeline(**overrides) -> HackVARClassPipeline:
    pipe = HackVARClassPipeline(transformer=tiny_transformer(**overrides), vae=tiny_vae(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_text_transformer(**overrides) -> InfinityTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "bits_per_token": 8,
        "ff_hidden_dim": 128,
        "text_channels": 32,
        "text_max_length": 12,
        "num_pooling_heads": 4,
    }
    transformer = InfinityTransformer2DModel(**{**config, **overrides})
    enliven(transformer)
    return transformer.eval()


def tiny_bsq(**overrides) -> MultiScaleBSQModel:
    torch.manual_seed(0)
    config = {"latent_channels": 8, "block_out_channels": (32, 32), "layers_per_block": 1}
    return MultiScaleBSQModel(**{**config, **overrides}).eval()


def tiny_text_encoder(channels: int = 32) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A text encoder and its tokenizer, which knows `WORDS`."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=channels, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    words = ("<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS))
    tokenizer = T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0)
    return T5EncoderModel(config).eval(), tokenizer


def tiny_text_pipeline(
    scale_schedule: Sequence[Sequence[int]] = tuple((side, side) for side in SIDES),
    with_text_encoder: bool = True,
    **overrides,
) -> HackVARTextPipeline:
    """A text-to-image pipeline; `overrides` are of the transformer's configuration."""
    text_encoder, tokenizer = tiny_text_encoder() if with_text_encoder else (None, None)
    pipe = HackVARTextPipeline(
        transformer=tiny_text_transformer(**overrides),
        vae=tiny_bsq(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scale_schedule=[list(size) for size in scale_schedule],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_t5(folder: Path, channels: int = 256) -> Path:
    """A text encoder and its tokenizer, saved into one folder as on the Hub."""
    for part in tiny_text_encoder(channels):
        part.save_pretrained(folder)
    return folder


class OriginalCache(FullCache):
    """The original's way: keys stay in float32 and are cast at every use; every scale is stored."""

    def attend(self, layer_idx, query, key, value, scale=1.0, projection=None, backend=None):
        key, value = self.update(key.float(), value, layer_idx)
        self.seen_tokens[layer_idx] += value.shape[2] - self.seen_tokens[layer_idx]
        return F.scaled_dot_product_attention(query, key.to(value.dtype), value, scale=scale)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@torch.no_grad()
def masked_nll(pipe: HackVARPipeline, tokens: torch.Tensor, inputs: Sequence[int | str]) -> torch.Tensor:
    """Nats per token `[images]` from one masked pass over all scales, without any cache."""
    schedule = pipe.schedule
    latents, scale_inputs = torch.zeros(len(tokens), pipe.vae.config["latent_channels"], *schedule.sizes[-1]), []
    for step, true_tokens in enumerate(tokens.split(schedule.lengths, dim=1)):
        latents, scale_input = pipe.vae.accumulate(latents, true_tokens, step, schedule)
        scale_inputs += [] if scale_input is None else [scale_input]
    condition = pipe.encode_inputs(inputs, guided=False)
    arguments = (schedule,) if isinstance(pipe, HackVARTextPipeline) else ()
    logits = pipe.transformer(torch.cat(scale_inputs, dim=1), condition, *arguments).logits
    return -pipe.log_likelihood(logits, tokens).double().mean(1)


@dataclass
class FixedTypes:
    """Head types that a test chose, in the place of a calibrated profile."""

    contextual: torch.Tensor

    def contextual_heads(self, alpha: float) -> torch.Tensor:
        return self.contextual

    def check_fits(self, geometry):
        pass

    def check_holds(self, arrays, method):
        pass

    def for_schedule(self, schedule):
        return self


def half_contextual(num_layers: int, num_heads: int) -> FixedTypes:
    """Every second head contextual, another half in every second layer."""
    layers, heads = torch.arange(num_layers)[:, None], torch.arange(num_heads)[None]
    return FixedTypes((layers + heads) % 2 == 0)


def planted_profile(schedule: Schedule, num_layers: int, num_heads: int, head_dim: int, seed: int) -> HeadProfile:
    """A head profile of random statistics that obey their definitions: mass is causal, rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = statistic_shapes(num_layers, num_heads, len(schedule))
    mean = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    mean["mass"] = mean["mass"].square().tril()
    mean["mass"] /= mean["mass"].sum(-1, keepdim=True)
    mean["topk_hist"] = mean["topk_hist"].sort(-1).values
    return HeadProfile(
        mean=mean,
        variance={name: torch.zeros(shape) for name, shape in shapes.items()},
        family="var",
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        schedule=[list(size) for size in schedule.sizes],
        dtype="float32",
        sampling={},
        inputs=[0],
        seeds=[0],
        software={},
    )
