"""Original VAR transformers (FoundationVision/VAR)."""

from itertools import accumulate
from math import isqrt
from typing import Any

import torch

from ..models.transformer_var import VARTransformer2DModel
from .conversion import Conversion, Origin, empty_model
from .fields import axes, check_number, settle
from .names import ZERO_BIAS, check_zeros, original_name


ARGUMENT = "transformer"
LEVELS, MASK = "lvl_1L", "attn_bias_for_masking"
RELEASED_HEAD_DIM = 64

# This package's names and the original's: of the model, and of a block.
MODEL_NAMES = {
    "class_embed": "class_emb",
    "pos_start": "pos_start",
    "pos_embed": "pos_1LC",
    "level_embed": "lvl_embed",
    "latent_embed": "word_embed",
    "shared_modulation": "shared_ada_lin.1",
    "norm_modulation": "head_nm.ada_lin.1",
    "proj_out": "head",
}
BLOCK_NAMES = {
    "attn.log_scale": "attn.scale_mul_1H11",
    "attn.to_qkv": "attn.mat_qkv",
    "attn.to_out": "attn.proj",
    "ff.proj_in": "ffn.fc1",
    "ff.proj_out": "ffn.fc2",
}


def transformer_conversion(
    where: str, state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> Conversion[VARTransformer2DModel]:
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
    fields = transformer_fields(where, state_dict, config)
    model = empty_model(
        VARTransformer2DModel,
        where,
        num_layers=fields["depth"],
        num_attention_heads=fields["num_heads"],
        attention_head_dim=fields["head_dim"],
        num_classes=fields["num_classes"],
        vocab_size=fields["vocab_size"],
        latent_channels=fields["z_channels"],
        patch_nums=fields["patch_nums"],
        mlp_ratio=fields["mlp_ratio"],
        shared_aln=fields["shared_aln"],
        attn_l2_norm=fields["attn_l2_norm"],
        norm_eps=fields["norm_eps"],
    )
    origins = {
        name: transformer_origin(name, tuple(parameter.shape), fields["shared_aln"])
        for name, parameter in model.state_dict().items()
    }
    total = model.schedule.total
    buffers = {LEVELS: (1, total), MASK: (1, 1, total, total)}
    conversion = Conversion(where, state_dict, model, origins, buffers)
    conversion.check()
    check_buffers(where, state_dict, model)
    return conversion


def transformer_fields(where: str, state_dict: dict[str, torch.Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a transformer in the original's field names, read off the shapes."""
    dim = axes(where, state_dict, "pos_start", 3)[2]
    vocab_size, _ = axes(where, state_dict, "head.weight", 2)
    hidden_dim, _ = axes(where, state_dict, "blocks.0.ffn.fc1.weight", 2)
    rows, _ = axes(where, state_dict, "class_emb.weight", 2)
    _, channels = axes(where, state_dict, "word_embed.weight", 2)
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state_dict
    found = {
        "depth": len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")}),
        "embed_dim": dim,
        "shared_aln": "shared_ada_lin.1.weight" in state_dict,
        "attn_l2_norm": l2_norm,
        "patch_nums": patch_nums(where, state_dict),
        "num_classes": rows - 1,
        "vocab_size": vocab_size,
        "z_channels": channels,
    }
    heads: Any = given.get("num_heads")
    if l2_norm:
        heads = found["num_heads"] = axes(where, state_dict, "blocks.0.attn.scale_mul_1H11", 4)[1]
    elif heads is None:
        # Nothing in the file tells; every released model has heads of this width.
        if dim % RELEASED_HEAD_DIM:
            raise ValueError(
                f"{where} does not show its number of heads, and its width {dim} is no multiple of {RELEASED_HEAD_DIM}: give "
                "`config={'transformer': {'num_heads': ...}}`."
            )
        heads = dim // RELEASED_HEAD_DIM
    check_number(ARGUMENT, "num_heads", heads, whole=True)
    if dim % heads:
        raise ValueError(f"{where}: {heads} heads do not divide the width {dim}.")
    found["head_dim"] = dim // heads
    # Many ratios round to one width, so the ratio that is given counts if it does.
    ratio = given.get("mlp_ratio", hidden_dim / dim)
    check_number(ARGUMENT, "mlp_ratio", ratio)
    found["mlp_ratio"] = ratio if round(dim * ratio) == hidden_dim else hidden_dim / dim
    fields = settle(where, ARGUMENT, found, {"num_heads": heads, "norm_eps": 1e-6}, given)
    check_number(ARGUMENT, "norm_eps", fields["norm_eps"])
    return fields


def patch_nums(where: str, state_dict: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Sides of the token maps, from how often each level occurs."""
    axes(where, state_dict, LEVELS, 2)
    levels, counts = torch.unique_consecutive(state_dict[LEVELS].flatten().long(), return_counts=True)
    sides = [isqrt(count) for count in counts.tolist()]
    if levels.tolist() != list(range(len(levels))) or any(
        side**2 != count for side, count in zip(sides, counts.tolist())
    ):
        raise ValueError(
            f"{where}: {LEVELS} must hold 0, 1, 2, ..., each as often as a square map has tokens, but holds "
            f"{levels.tolist()[:16]}, {counts.tolist()[:16]} times."
        )
    return tuple(sides)


def transformer_origin(name: str, shape: tuple[int, ...], shared_aln: bool) -> Origin:
    """Where a parameter comes from in the original file."""
    names, prefix, rest = MODEL_NAMES, "", name
    if name.startswith("transformer_blocks."):
        _, block, rest = name.split(".", 2)
        prefix = f"blocks.{block}."
        names = {**BLOCK_NAMES, "modulation": "ada_gss" if shared_aln else "ada_lin.1"}
    if rest == "attn.to_qkv.bias":
        # The key has no bias, and the zeros in its place are in the file too.
        sources: dict[str, tuple[int, ...]] = {
            f"{prefix}attn.{part}": (shape[0] // 3,) for part in ("q_bias", ZERO_BIAS, "v_bias")
        }
        return Origin(sources, lambda *biases: torch.cat([bias.float() for bias in biases]))
    return Origin({prefix + original_name(rest, names): shape})


def check_buffers(where: str, state_dict: dict[str, torch.Tensor], model: VARTransformer2DModel):
    """
    Refuse a file whose derived tensors differ from what they are derived from.

    Raises:
        `ValueError`: naming the tensor.
    """
    lengths = model.schedule.lengths
    mask = state_dict[MASK][0, 0]
    for begin, end in zip(model.schedule.prefixes, accumulate(lengths)):
        # Tokens see their own scale and those before it. Minus infinity is not the same number in every dtype.
        rows = mask[begin:end].float()
        if rows[:, :end].count_nonzero() or (rows[:, end:] == 0).any():
            raise ValueError(
                f"{where}: {MASK} must hide later scales and nothing else, but does not in rows {begin} to {end}."
            )
    layers = range(model.config["num_layers"])
    check_zeros(where, state_dict, (f"blocks.{layer}.attn.{ZERO_BIAS}" for layer in layers))
