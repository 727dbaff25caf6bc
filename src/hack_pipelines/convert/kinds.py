"""Telling what a state dict is from its keys."""

import re
from collections.abc import Iterable

from .original import shown


VAR, MSVQ = "a VAR transformer", "the image tokenizer of VAR"
INFINITY, BSQ = "an Infinity transformer", "an image tokenizer of Infinity"

# The first kind of which any key matches is the answer, so what is particular comes before what is general.
KINDS = (
    (INFINITY, r"cfg_uncond|text_proj_for_(ca|sos)\..+|block_chunks\..+"),
    (BSQ, r"quantizer?\.lfq\..+|(encoder|decoder)\.conv_in\.conv\..+"),
    (VAR, r"class_emb\.weight|pos_1LC|blocks\.\d+\.attn\.mat_qkv\.weight"),
    (MSVQ, r"quantize\.quant_resi\..+"),
    ("a transformer that this package has converted already", r"transformer_blocks\.\d+\.attn\.to_qkv\.weight"),
    ("an image tokenizer that this package has converted already", r"quantizer\.residual_convs\..+"),
    ("a whole Stable Diffusion checkpoint", r"(model\.diffusion_model|first_stage_model|cond_stage_model)\..+"),
    ("an autoencoder of diffusers", r"(encoder\.down_blocks|decoder\.up_blocks)\..+"),
    ("a VQGAN, without the residual convolutions of VAR", r"quantize\.embedding\.weight"),
    ("a Stable Diffusion VAE", r"(encoder\.down|decoder\.up)\.\d+\.block\..+"),
    ("a diffusion transformer of diffusers", r"transformer_blocks\..+"),
)


def kind_of(keys: Iterable[str]) -> str | None:
    """What the keys are those of, or `None` where they tell nothing."""
    keys = list(keys)
    for kind, pattern in KINDS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return kind
    return None


def check_kind(argument: str, where: str, keys: Iterable[str], wanted: tuple[str, ...]) -> str:
    """
    Refuse a file that is something else than its argument says.

    Args:
        argument (`str`):
            Name of the argument, for messages.
        where (`str`):
            The file, for messages.
        keys (`Iterable[str]`):
            What it holds.
        wanted (`tuple[str, ...]`):
            Kinds that the argument may be of.

    Returns:
        `str`: which of them the file is.

    Raises:
        `ValueError`: naming what the file is, if that can be told, and what belongs there.
    """
    keys = list(keys)
    kind = kind_of(keys)
    if kind in wanted:
        return kind
    message = f"`{argument}` must be {' or '.join(wanted)}, but {where} "
    if kind is None:
        raise ValueError(f"{message}is of no known kind; its keys are {shown(keys)}.")
    hint = ""
    if kind in (MSVQ, BSQ) and argument == "transformer":
        hint = " Are `transformer` and `tokenizer` swapped?"
    elif kind in (VAR, MSVQ, INFINITY, BSQ):
        hint = " Give the one that belongs to the transformer."
    elif "already" in kind:
        hint = " Load its pipeline folder with `HackVARPipeline.from_pretrained`."
    raise ValueError(f"{message}is {kind}.{hint}")
