"""Original Infinity transformers (FoundationVision/Infinity)."""

import re
from functools import partial
from typing import Any

import torch

from ..models.transformer_infinity import InfinityTransformer2DModel
from .conversion import Conversion, Origin, empty_model
from .fields import axes, check_number, settle
from .names import ZERO_BIAS, check_zeros, joined_with_zeros, original_name


ARGUMENT = "transformer"
# What other versions of the original keep beside the weights; all of it follows from the schedule.
IGNORED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
# Variants of the original that no released model is, and which this package has no code for.
SUPPORTED = {"rope2d_normalized_by_hw": 2, "add_lvl_embeding_only_first_block": 1}
CHUNKED = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.")
UNCHUNKED = re.compile(r"blocks\.(\d+)\.")

# This package's names and the original's: of the model, and of a block.
MODEL_NAMES = {
    "uncond_embeds": "cfg_uncond",
    "text_norm": "text_norm",
    "text_pooling.query": "text_proj_for_sos.ca.mat_q",
    "text_pooling.to_kv": "text_proj_for_sos.ca.mat_kv",
    "text_pooling.to_out": "text_proj_for_sos.ca.proj",
    "text_proj.linear_1": "text_proj_for_ca.0",
    "text_proj.linear_2": "text_proj_for_ca.2",
    "pos_start": "pos_start",
    "level_embed": "lvl_embed",
    "latent_embed": "word_embed",
    "shared_modulation": "shared_ada_lin.1",
    "head_modulation": "head_nm.ada_lin.1",
    "head": "head",
}
BLOCK_NAMES = {
    "attn.log_scale": "sa.scale_mul_1H11",
    "attn.to_qkv": "sa.mat_qkv",
    "attn.to_out": "sa.proj",
    "norm_text": "ca_norm",
    "cross_attn.to_q": "ca.mat_q",
    "cross_attn.to_kv": "ca.mat_kv",
    "cross_attn.to_out": "ca.proj",
    "ff.proj_in": "ffn.fc1",
    "ff.proj_out": "ffn.fc2",
    "modulation": "ada_gss",
}


def transformer_conversion(
    where: str, state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> Conversion[InfinityTransformer2DModel]:
    """
    Recognise a transformer and check its file completely.

    Args:
        where (`str`):
            The file, for messages.
        state_dict (`dict[str, torch.Tensor]`):
            What it holds.
        config (`dict[str, Any]`):
            Fields that the user says, in the original's names.

    Raises:
        `ValueError`: if the file is incomplete, or is not what `config` says.
    """
    prefixes = block_prefixes(where, state_dict)
    fields = transformer_fields(where, state_dict, config, prefixes)
    model = empty_model(
        InfinityTransformer2DModel,
        where,
        num_layers=fields["depth"],
        num_attention_heads=fields["num_heads"],
        attention_head_dim=fields["head_dim"],
        bits_per_token=fields["bits_per_token"],
        ff_hidden_dim=fields["ffn_hidden"],
        text_channels=fields["text_channels"],
        text_max_length=fields["text_maxlen"],
        num_pooling_heads=fields["pool_heads"],
        num_levels=fields["lvl_embeddings"],
        norm_eps=fields["norm_eps"],
    )
    scale_shape = tuple(state_dict[f"{prefixes[0]}sa.scale_mul_1H11"].shape)
    origins = {
        name: transformer_origin(name, tuple(parameter.shape), prefixes, scale_shape)
        for name, parameter in model.state_dict().items()
    }
    dim = fields["embed_dim"]
    attentions = ["text_proj_for_sos.ca.", *(f"{prefix}{kind}." for prefix in prefixes for kind in ("sa", "ca"))]
    # Constants that the original registers, and that a file may therefore hold.
    zeros = [key for key in (f"{attention}{ZERO_BIAS}" for attention in attentions) if key in state_dict]
    conversion = Conversion(where, state_dict, model, origins, {key: (dim,) for key in zeros}, IGNORED)
    conversion.check()
    check_zeros(where, state_dict, zeros)
    return conversion


def block_prefixes(where: str, state_dict: dict[str, torch.Tensor]) -> list[str]:
    """What the keys of each block begin with, in the order in which the blocks run."""
    chunked = {match.groups() for match in map(CHUNKED.match, state_dict) if match}
    if chunked:
        chunks, blocks = (len({entry[axis] for entry in chunked}) for axis in range(2))
        return [f"block_chunks.{chunk}.module.{block}." for chunk in range(chunks) for block in range(blocks)]
    count = len({match[1] for match in map(UNCHUNKED.match, state_dict) if match})
    if not count:
        raise ValueError(f"{where} lacks block_chunks.0.module.0.*, from which the configuration is read.")
    return [f"blocks.{block}." for block in range(count)]


def transformer_fields(
    where: str, state_dict: dict[str, torch.Tensor], given: dict[str, Any], prefixes: list[str]
) -> dict[str, Any]:
    """Configuration of a transformer in the original's field names, read off the shapes."""
    for name, supported in SUPPORTED.items():
        if given.get(name, supported) != supported:
            raise ValueError(
                f"`config[{ARGUMENT!r}][{name!r}]` is {given[name]!r}, but only {supported}, the value of every released "
                "model, is supported."
            )
    dim = axes(where, state_dict, "pos_start", 3)[2]
    outputs, _ = axes(where, state_dict, "head.weight", 2)
    hidden_dim, _ = axes(where, state_dict, f"{prefixes[0]}ffn.fc1.weight", 2)
    max_length, text_channels = axes(where, state_dict, "cfg_uncond", 2)
    wanted_length = given.get("text_maxlen", max_length)
    if wanted_length != max_length:
        raise ValueError(
            f"`config[{ARGUMENT!r}]['text_maxlen']` is {wanted_length!r}, but cfg_uncond in {where} has {max_length} rows. "
            "The original would cut them or fill them up with untrained ones: leave the field out, and as many text tokens "
            "are used as there are rows."
        )
    heads = num_heads(where, state_dict, f"{prefixes[0]}sa.scale_mul_1H11")
    if dim % heads:
        raise ValueError(f"{where}: {heads} heads do not divide the width {dim}.")
    chunks = len({prefix.split(".")[1] for prefix in prefixes}) if CHUNKED.match(prefixes[0]) else 1
    found = {
        "embed_dim": dim,
        "depth": len(prefixes),
        "num_heads": heads,
        "head_dim": dim // heads,
        "num_block_chunks": chunks,
        "blocks_per_chunk": len(prefixes) // chunks,
        "ffn_hidden": hidden_dim,
        "text_channels": text_channels,
        "text_maxlen": max_length,
        "pool_heads": axes(where, state_dict, "text_proj_for_sos.ca.mat_q", 3)[1],
        "bits_per_token": axes(where, state_dict, "word_embed.weight", 2)[1],
        "head_outputs": outputs,
        "lvl_embeddings": axes(where, state_dict, "lvl_embed.weight", 2)[0],
        **SUPPORTED,
    }
    # Only the pair of files shows whether the latent is patchified; padding belongs to training and changes no value.
    free = {"norm_eps": 1e-6, "pad_to_multiplier": None, "apply_spatial_patchify": None}
    fields = settle(where, ARGUMENT, found, free, given)
    check_number(ARGUMENT, "norm_eps", fields["norm_eps"])
    return fields


def num_heads(where: str, state_dict: dict[str, torch.Tensor], key: str) -> int:
    """Attention heads of a block; models that were trained with the original's own kernel have them on another axis."""
    shape = axes(where, state_dict, key, 4)
    heads = max(shape)
    if shape not in ((1, heads, 1, 1), (1, 1, heads, 1)):
        raise ValueError(f"{where}: {key} has shape {shape} but must have (1, heads, 1, 1) or (1, 1, heads, 1).")
    return heads


def transformer_origin(name: str, shape: tuple[int, ...], prefixes: list[str], scale_shape: tuple[int, ...]) -> Origin:
    """Where a parameter comes from in the original file."""
    names, prefix, rest = MODEL_NAMES, "", name
    if name.startswith("transformer_blocks."):
        _, block, rest = name.split(".", 2)
        names, prefix = BLOCK_NAMES, prefixes[int(block)]
    key = prefix + original_name(rest, names)
    # Keys have no bias, here zeros in the place of one; the others are apart from their weights.
    attention = key.rpartition("mat_")[0]
    if rest == "attn.to_qkv.bias":
        biases: dict[str, tuple[int, ...]] = {f"{attention}{part}_bias": (shape[0] // 3,) for part in "qv"}
        return Origin(biases, partial(joined_with_zeros, zeros=1))
    if rest.endswith(".to_kv.bias"):
        return Origin({f"{attention}v_bias": (shape[0] // 2,)}, partial(joined_with_zeros, zeros=0))
    if rest == "attn.log_scale":
        return Origin({key: scale_shape}, partial(torch.reshape, shape=shape))
    return Origin({key: shape})
