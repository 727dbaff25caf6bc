"""Libraries whose models `hack-pipelines generate` draws with."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .families import Family, family_of
from .options import load_next_token_pipeline, load_pipeline


if TYPE_CHECKING:
    from ..methods import Method


@dataclass(frozen=True)
class Backend:
    """
    What differs between the libraries.

    Args:
        default_method (`str`):
            Method where none is typed.
        methods (`Callable`):
            Gives the methods that its models take, by name.
        load (`Callable`):
            Opens the model of some parsed arguments on a device.
        find (`Callable`):
            The model's folder, fetched if it is not here.
        refused (`dict[str, str]`, *optional*):
            Options that mean nothing to it, by their names in the parsed arguments.
    """

    default_method: str
    methods: "Callable[[], Mapping[str, type[Method]]]"
    load: Callable[[argparse.Namespace, str | None], Family]
    find: Callable[[argparse.Namespace], Path]
    refused: dict[str, str] = field(default_factory=dict)

    def check(self, args: argparse.Namespace):
        """
        Refuse options that mean nothing here.

        Raises:
            `ValueError`: if one was typed, or the model is one of another library.
        """
        for name, option in self.refused.items():
            if getattr(args, name) is not None:
                raise ValueError(f"`{option}` is not for `--backend {args.backend}`: leave it out.")


def scale_methods() -> "Mapping[str, type[Method]]":
    from ..methods import METHODS

    return METHODS


def line_methods() -> "Mapping[str, type[Method]]":
    from ..methods import RASTER_METHODS

    return RASTER_METHODS


def find_diffusers(args: argparse.Namespace) -> Path:
    """
    The folder of a pipeline in diffusers layout.

    Raises:
        `ValueError`: if there is none, or it is a model of transformers.
    """
    from ..hub import locate
    from ..hub.files import read_json

    folder = locate(args.model, args.variant).folder
    config = folder / "config.json"
    if config.is_file() and not (folder / "model_index.json").is_file():
        kind = read_json(config).get("model_type")
        if kind is not None:
            raise ValueError(
                f"{args.model} is a model of transformers, of type {kind!r}: add `--backend transformers`."
            )
    return folder


def find_transformers(args: argparse.Namespace) -> Path:
    """The folder of a model of transformers."""
    from ..integrations.next_token import find_folder

    return find_folder(args.model)


def load_diffusers(args: argparse.Namespace, device: str | None = None) -> Family:
    """A pipeline in diffusers layout."""
    find_diffusers(args)
    return family_of(load_pipeline(args, device))


def load_transformers(args: argparse.Namespace, device: str | None = None) -> Family:
    """A next-token model of transformers."""
    return family_of(load_next_token_pipeline(args, device))


BACKENDS = {
    "diffusers": Backend("hack++", scale_methods, load_diffusers, find_diffusers),
    "transformers": Backend(
        "headkv_ar",
        line_methods,
        load_transformers,
        find_transformers,
        {
            "attention_budget": "--attention-budget",
            "kv_dtype": "--kv-dtype",
            "variant": "--variant",
            "device_map": "--device-map",
            "offload": "--offload",
            "head_profile": "--head-profile",
            "more_smooth": "--more-smooth",
        },
    ),
}
