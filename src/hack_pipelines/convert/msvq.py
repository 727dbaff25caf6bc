"""Original image tokenizer of VAR (FoundationVision/VAR)."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..models.autoencoder_msvq import MultiScaleVQModel
from .conversion import Conversion, Origin, empty_model
from .fields import axes, check_number, settle
from .names import coder_fields, coder_name


ARGUMENT = "tokenizer"
RESIDUAL_CONVS = "quantize.quant_resi."
USAGE = "quantize.ema_vocab_hit_SV"

# This package's names and the original's beside those of `CODER_NAMES`, replaced one after the other.
NAMES = (
    (r"\.group_norm\.", ".norm."),
    (r"\.to_[qkv]\.", ".qkv."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"^quantizer\.embedding\.", "quantize.embedding."),
)


def tokenizer_conversion(
    where: str, state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> Conversion[MultiScaleVQModel]:
    """
    Recognise a tokenizer and check its file completely.

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
    prefix, num_convs, shared = residual_convs(state_dict)
    fields = tokenizer_fields(where, state_dict, config, shared)
    model = empty_model(
        MultiScaleVQModel,
        where,
        vocab_size=fields["vocab_size"],
        latent_channels=fields["z_channels"],
        block_out_channels=tuple(fields["ch"] * multiplier for multiplier in fields["ch_mult"]),
        layers_per_block=fields["num_res_blocks"],
        residual_ratio=fields["quant_resi"],
        num_residual_convs=num_convs,
        norm_num_groups=fields["num_groups"],
    )
    origins = {
        name: tokenizer_origin(name, tuple(parameter.shape), len(fields["ch_mult"]), prefix)
        for name, parameter in model.state_dict().items()
    }
    conversion = Conversion(where, state_dict, model, origins, ignored=(USAGE,))
    conversion.check()
    return conversion


def residual_convs(state_dict: dict[str, torch.Tensor]) -> tuple[Callable[[int], str], int, int]:
    """How the file names its residual convolutions, how many it has, and the `share_quant_resi` that this stands for."""
    names = {key[len(RESIDUAL_CONVS) :].rpartition(".")[0] for key in state_dict if key.startswith(RESIDUAL_CONVS)}
    if names == {"qresi"}:
        return lambda index: f"{RESIDUAL_CONVS}qresi", 1, 1
    if any(name.startswith("qresi_ls.") for name in names):
        return lambda index: f"{RESIDUAL_CONVS}qresi_ls.{index}", len(names), len(names)
    return lambda index: f"{RESIDUAL_CONVS}{index}", len(names), 0


def tokenizer_fields(
    where: str, state_dict: dict[str, torch.Tensor], given: dict[str, Any], shared: int
) -> dict[str, Any]:
    """Configuration of a tokenizer in the original's field names, read off the shapes."""
    vocab_size, channels = axes(where, state_dict, "quantize.embedding.weight", 2)
    in_channels, width, multipliers, blocks = coder_fields(where, state_dict)
    found = {
        "vocab_size": vocab_size,
        "z_channels": channels,
        "ch": width,
        "ch_mult": multipliers,
        "num_res_blocks": blocks,
        "in_channels": in_channels,
        "quant_conv_ks": axes(where, state_dict, "quant_conv.weight", 4)[2],
        "share_quant_resi": shared,
        # The same in every tokenizer that MultiScaleVQModel can be.
        "norm_eps": 1e-6,
        "using_znorm": False,
    }
    # The tokenizer serves any schedule: the one it was trained with says nothing about its weights.
    free = {"quant_resi": 0.5, "num_groups": 32, "patch_nums": None}
    fields = settle(where, ARGUMENT, found, free, given)
    check_number(ARGUMENT, "num_groups", fields["num_groups"], whole=True)
    ratio = fields["quant_resi"]
    check_number(ARGUMENT, "quant_resi", -ratio if isinstance(ratio, (int, float)) and ratio < 0 else ratio)
    return fields


def tokenizer_origin(name: str, shape: tuple[int, ...], levels: int, conv_name: Callable[[int], str]) -> Origin:
    """Where a parameter comes from in the original file."""
    if name.startswith("quantizer.residual_convs."):
        _, _, index, kind = name.split(".")
        return Origin({f"{conv_name(int(index))}.{kind}": shape})
    key = coder_name(name, levels)
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    part = re.search(r"\.to_([qkv])\.", name)
    if part is None and ".to_out." not in name:
        return Origin({key: shape})
    # Linear layers here, convolutions with 1x1 kernels there.
    kernel = (1, 1) if name.endswith(".weight") else ()
    if part is None:
        return Origin({key: (*shape, *kernel)}, partial(torch.reshape, shape=shape))
    return Origin({key: (3 * shape[0], *shape[1:], *kernel)}, partial(third, index="qkv".index(part[1]), shape=shape))


def third(tensor: torch.Tensor, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Query, key or value out of the rows that the original stacks; a copy, because shared memory cannot be saved."""
    return tensor.chunk(3)[index].reshape(shape).clone()
