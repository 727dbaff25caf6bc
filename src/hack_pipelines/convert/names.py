"""What the original files of all families have in common: how their layers are named, and biases that are stored apart."""

import re
from collections.abc import Iterable

import torch

from .fields import axes


ZERO_BIAS = "zero_k_bias"

# This package's names of an image tokenizer's layers and the originals', replaced one after the other.
CODER_NAMES = (
    (r"\.down_blocks\.", ".down."),
    (r"\.up_blocks\.", ".up."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def original_name(name: str, names: dict[str, str]) -> str:
    """Original name of a transformer's parameter, of which `names` has the module or the parameter itself."""
    module = next(ours for ours in names if name == ours or name.startswith(f"{ours}."))
    return names[module] + name[len(module) :]


def coder_name(name: str, levels: int) -> str:
    """Original name of a parameter of an image tokenizer's encoder or decoder."""
    for pattern, replacement in CODER_NAMES:
        name = re.sub(pattern, replacement, name)
    # The originals count the decoder's levels from the finest, which runs last.
    return re.sub(r"\.up\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", name)


def coder_fields(
    where: str, state_dict: dict[str, torch.Tensor], conv: str = ""
) -> tuple[int, int, tuple[int, ...], int]:
    """
    What the encoder of an image tokenizer shows.

    Args:
        where (`str`):
            The file, for messages.
        state_dict (`dict[str, torch.Tensor]`):
            What it holds.
        conv (`str`, *optional*, defaults to `""`):
            What comes between the name of a convolution and `.weight`.

    Returns:
        `tuple[int, int, tuple[int, ...], int]`: image channels, width of the finest level, multiples of it that the levels
        have, and residual blocks of a level.
    """
    width, in_channels, _, _ = axes(where, state_dict, f"encoder.conv_in{conv}.weight", 4)
    levels = {key.split(".")[2] for key in state_dict if key.startswith("encoder.down.")}
    widths = [
        axes(where, state_dict, f"encoder.down.{level}.block.0.conv1{conv}.weight", 4)[0]
        for level in range(len(levels))
    ]
    if not levels or any(entry % width for entry in widths):
        raise ValueError(f"{where}: the encoder's widths {widths} must be multiples of its first, {width}.")
    blocks = {key.split(".")[4] for key in state_dict if key.startswith("encoder.down.0.block.")}
    return in_channels, width, tuple(entry // width for entry in widths), len(blocks)


def joined_with_zeros(*biases: torch.Tensor, zeros: int) -> torch.Tensor:
    """Biases of queries, if there are some, and values, with zeros at place `zeros` for those of the keys."""
    parts = [bias.float() for bias in biases]
    parts.insert(zeros, torch.zeros_like(parts[-1]))
    return torch.cat(parts)


def check_zeros(where: str, state_dict: dict[str, torch.Tensor], keys: Iterable[str]):
    """
    Refuse a file whose keys have a bias after all.

    Raises:
        `ValueError`: naming the tensor.
    """
    for key in keys:
        if state_dict[key].float().count_nonzero():
            raise ValueError(f"{where}: {key} must be all zeros, because keys have no bias, but is not.")
