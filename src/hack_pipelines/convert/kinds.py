"""Telling what a state dict is from its keys."""

import re
from collections.abc import Iterable

from .original import shown


VAR, MSVQ = "a VAR transformer", "the image tokenizer of VAR"

# The first kind of which any key matches is the answer, so what is particular comes before what is general.
KINDS = (
    ("an Infinity transformer", r"cfg_uncond|text_proj_for_(ca|sos)\..+|block_chunks\..+"),
    ("an image tokenizer of Infinity", r"(vae\.)?quantizer?\.lfq\..+"),
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


def check_kind(argument: str, where: str, keys: Iterable[str], wanted: str):
    """
    Refuse a file that is something else than its argument says.

    Raises:
        `ValueError`: naming what the file is, if that can be told, and what belongs there.
    """
    keys = list(keys)
    kind = kind_of(keys)
    if kind == wanted:
        return
    message = f"`{argument}` must be {wanted}, but {where} "
    if kind is None:
        raise ValueError(f"{message}is of no known kind; its keys are {shown(keys)}.")
    hint = ""
    if kind in (VAR, MSVQ):
        hint = " Are `transformer` and `tokenizer` swapped?"
    elif "already" in kind:
        hint = " Load its pipeline folder with `HackVARPipeline.from_pretrained`."
    raise ValueError(f"{message}is {kind}.{hint}")
