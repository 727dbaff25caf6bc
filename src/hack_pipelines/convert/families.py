"""The families of models whose original files can be read: a table with one entry each."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.autoencoder_bsq import PATCH_SIDE
from ..models.infinity_schedules import DEFAULT_SAMPLING, template_schedule
from . import bsq, infinity, msvq, var
from .conversion import Conversion
from .kinds import BSQ, INFINITY, MSVQ, VAR


IMAGENET_CLASSES = 1000
DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"

Part = Conversion[Any]
Convert = Callable[[str, dict[str, torch.Tensor], dict[str, Any]], Part]


@dataclass(frozen=True)
class Family:
    """
    A family of models.

    Args:
        name (`str`):
            The `family` of its pipeline class.
        transformer_kind (`str`):
            What the keys of its transformers are those of, as in `kinds.py`; the family is recognised from it.
        tokenizer_kind (`str`):
            The same of its image tokenizers.
        convert_transformer (`Callable`):
            Recognises a transformer and checks its file.
        convert_tokenizer (`Callable`):
            Recognises an image tokenizer and checks its file.
        match (`Callable`):
            Called with both parts and `config`: refuses two that do not belong together, and settles what only the pair shows.
        pipeline_config (`Callable`):
            Called with both parts: what the pipeline is made with besides its models.
        takes_text (`bool`, *optional*, defaults to `False`):
            Whether its pipeline takes a text encoder, its tokenizer and a schedule.
    """

    name: str
    transformer_kind: str
    tokenizer_kind: str
    convert_transformer: Convert
    convert_tokenizer: Convert
    match: Callable[[Part, Part, dict[str, dict[str, Any]]], None]
    pipeline_config: Callable[[Part, Part], dict[str, Any]]
    takes_text: bool = False

    def check_text_arguments(self, text_encoder: str | Path | None, scale_schedule: Sequence[Sequence[int]] | None):
        """
        Refuse what only text-to-image families take.

        Raises:
            `ValueError`: naming the argument.
        """
        if self.takes_text:
            return
        if text_encoder is not None:
            raise ValueError(
                f"`text_encoder` is {str(text_encoder)!r} but class-conditional models have no text encoder: leave it out."
            )
        if scale_schedule is not None:
            raise ValueError(
                f"`scale_schedule` is {scale_schedule!r} but class-conditional models draw one schedule only, which their "
                "file shows: leave it out."
            )


def match_var(transformer: Part, tokenizer: Part, config: dict[str, dict[str, Any]]):
    """Refuse a transformer of VAR and an image tokenizer that do not belong together."""
    for name in ("vocab_size", "latent_channels"):
        wanted, got = transformer.model.config[name], tokenizer.model.config[name]
        if wanted != got:
            raise apart(transformer, tokenizer, f"`{name}` is {wanted} in the transformer but {got} in the tokenizer")


def var_pipeline_config(transformer: Part, tokenizer: Part) -> dict[str, Any]:
    """Class names where the classes are those of ImageNet."""
    if transformer.model.config["num_classes"] != IMAGENET_CLASSES:
        return {}
    return {"id2label": json.loads((DATA_FOLDER / "imagenet_classes.json").read_text(encoding="utf-8"))}


def match_infinity(transformer: Part, tokenizer: Part, config: dict[str, dict[str, Any]]):
    """Find out whether the latent is patchified, and refuse files that do not belong together."""
    bits, channels = transformer.model.config["bits_per_token"], tokenizer.model.config["latent_channels"]
    patchify = bits == channels * PATCH_SIDE**2
    if not patchify and bits != channels:
        raise apart(
            transformer,
            tokenizer,
            f"a token has {bits} bits in the transformer, but {channels} in the tokenizer, or {channels * PATCH_SIDE**2} with "
            "spatial patchify",
        )
    given = config["transformer"].get("apply_spatial_patchify")
    if given is not None and given != patchify:
        raise ValueError(
            f"`config['transformer']['apply_spatial_patchify']` is {given!r}, but {transformer.where} and {tokenizer.where} "
            f"show {patchify}: leave it out, or give the files that belong to it."
        )
    tokenizer.model.register_to_config(patchify=patchify)


def infinity_pipeline_config(transformer: Part, tokenizer: Part) -> dict[str, Any]:
    """Settings of the released model of this kind, and the square schedule of its largest pixel class."""
    patchified = tokenizer.model.config["patchify"]
    sampling = {**DEFAULT_SAMPLING, "temperature": 1.0} if patchified else dict(DEFAULT_SAMPLING)
    return {"sampling": sampling, "scale_schedule": [list(size) for size in template_schedule(1.0, "1M").sizes]}


def apart(transformer: Part, tokenizer: Part, difference: str) -> ValueError:
    """The error for two files of which each is fine."""
    return ValueError(f"{transformer.where} and {tokenizer.where} do not belong together: {difference}.")


FAMILIES = (
    Family(
        name="var",
        transformer_kind=VAR,
        tokenizer_kind=MSVQ,
        convert_transformer=var.transformer_conversion,
        convert_tokenizer=msvq.tokenizer_conversion,
        match=match_var,
        pipeline_config=var_pipeline_config,
    ),
    Family(
        name="infinity",
        transformer_kind=INFINITY,
        tokenizer_kind=BSQ,
        convert_transformer=infinity.transformer_conversion,
        convert_tokenizer=bsq.tokenizer_conversion,
        match=match_infinity,
        pipeline_config=infinity_pipeline_config,
        takes_text=True,
    ),
)
