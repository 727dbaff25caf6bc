"""Original image tokenizers of Infinity (FoundationVision/Infinity)."""

from typing import Any

import torch

from ..models.autoencoder_bsq import MultiScaleBSQModel
from .conversion import Conversion, Origin, empty_model
from .fields import axes, check_number, settle
from .names import coder_fields, coder_name


ARGUMENT = "tokenizer"
# The original registers its quantiser, which has no parameters, under two names.
MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")
# The first of these that divides a width is the number of groups of its normalisation.
GROUPS = (32, 24)


def tokenizer_conversion(
    where: str, state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> Conversion[MultiScaleBSQModel]:
    """
    Recognise a tokenizer and check its file completely. Whether its latent is patchified only its transformer shows.

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
    # Every convolution and norm of the original is wrapped in a module; its own loader also reads files without that level.
    wrapped = "encoder.conv_in.conv.weight" in state_dict
    fields = tokenizer_fields(where, state_dict, config, wrapped)
    model = empty_model(
        MultiScaleBSQModel,
        where,
        latent_channels=fields["codebook_dim"],
        block_out_channels=tuple(fields["base_channels"] * multiplier for multiplier in fields["ch_mult"]),
        layers_per_block=fields["num_res_blocks"],
        norm_num_groups=fields["num_groups"],
    )
    levels = len(fields["ch_mult"])
    origins = {
        name: Origin({tokenizer_key(name, levels, wrapped): tuple(parameter.shape)})
        for name, parameter in model.state_dict().items()
    }
    conversion = Conversion(where, state_dict, model, origins, ignored=MASKS)
    conversion.check()
    return conversion


def tokenizer_fields(
    where: str, state_dict: dict[str, torch.Tensor], given: dict[str, Any], wrapped: bool
) -> dict[str, Any]:
    """Configuration of a tokenizer in the original's field names, read off the shapes."""
    conv = ".conv" if wrapped else ""
    in_channels, width, multipliers, blocks = coder_fields(where, state_dict, conv)
    found = {
        "codebook_dim": axes(where, state_dict, f"encoder.conv_out{conv}.weight", 4)[0],
        "base_channels": width,
        "ch_mult": multipliers,
        "num_res_blocks": blocks,
        # Every level but the last halves the sides.
        "patch_size": 2 ** (len(multipliers) - 1),
        "in_channels": in_channels,
    }
    groups = given.get("num_groups")
    if groups is None:
        groups = norm_groups(where, [width * multiplier for multiplier in multipliers])
    check_number(ARGUMENT, "num_groups", groups, whole=True)
    return settle(where, ARGUMENT, found, {"num_groups": groups}, given)


def norm_groups(where: str, widths: list[int]) -> int:
    """Groups of all normalisations, by the original's rule."""
    groups = {next((count for count in GROUPS if width % count == 0), None) for width in widths}
    count = groups.pop()
    if groups or count is None:
        raise ValueError(
            f"{where} does not show how many groups its normalisations have: its widths {widths} are neither all multiples "
            f"of {GROUPS[0]} nor all multiples of {GROUPS[1]} only. Give "
            "`config={'tokenizer': {'num_groups': ...}}`."
        )
    return count


def tokenizer_key(name: str, levels: int, wrapped: bool) -> str:
    """Name of a parameter in the original file."""
    module, _, kind = coder_name(name, levels).rpartition(".")
    if not wrapped:
        return f"{module}.{kind}"
    wrapper = "norm" if module.rpartition(".")[2].startswith("norm") else "conv"
    return f"{module}.{wrapper}.{kind}"
