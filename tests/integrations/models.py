"""Tiny next-token image models of transformers, with weights that make attention sharp enough for evictions to show."""

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)


SIDE = 8
SHARPNESS = 12.0


def sharpened(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with larger query and key projections: those of a fresh model attend to everything alike."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision" not in name:
            parameter.data.mul_(SHARPNESS)
    return model.eval()


def text_config(kv_heads: int = 4, **overrides) -> dict:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": 80,
        "max_position_embeddings": 256,
        **overrides,
    }


def llama(kv_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return sharpened(
        LlamaForCausalLM(LlamaConfig(**text_config(kv_heads), pad_token_id=0, bos_token_id=1, eos_token_id=None))
    )


def janus(kv_heads: int = 4, side: int = SIDE) -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side * 4,
        "patch_size": 4,
        "projection_dim": 64,
        "num_image_tokens": side * side,
    }
    vq = {
        "embed_dim": 8,
        "num_embeddings": 32,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
        "num_hidden_layers": 1,
    }
    config = JanusConfig(text_config=text_config(kv_heads), vision_config=vision, vq_config=vq, image_token_id=3)
    model = sharpened(JanusForConditionalGeneration(config))
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = None
    model.generation_config.generation_kwargs = {"boi_token_id": 4}
    return model


def emu3(kv_heads: int = 4) -> Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    vocabulary = {f"<|visual token {index:06d}|>": 40 + index for index in range(32)}
    vocabulary |= {"<image>": 5, "<|extra_200|>": 6, "<|image token|>": 7}
    vq = {
        "codebook_size": 32,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "num_attention_heads": 1,
    }
    config = Emu3Config(vq_config=vq, text_config=text_config(kv_heads, pad_token_id=0), vocabulary_map=vocabulary)
    model = sharpened(Emu3ForConditionalGeneration(config))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def chameleon(kv_heads: int = 4) -> ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    vocabulary = {"<image>": 5} | {f"IMGIMG{letter}Z": 40 + i for i, letter in enumerate("ABCDEFGHIJ")}
    vq = {
        "embed_dim": 8,
        "num_embeddings": 10,
        "double_latent": False,
        "latent_channels": 8,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    }
    return sharpened(
        ChameleonForConditionalGeneration(
            ChameleonConfig(**text_config(kv_heads), vq_config=vq, vocabulary_map=vocabulary)
        )
    )
