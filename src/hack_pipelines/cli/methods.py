"""`hack-pipelines methods`: the compression methods and their options."""

import argparse
import inspect
from dataclasses import fields
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..methods import Method


PROTOCOLS = {
    "pre": "pre, a step attends to no more than it will store",
    "post": "post, a step attends to all that is there and then stores a part",
    "decoupled": "decoupled, a step attends to one part of what is there and stores another",
    "static": "static, a plan made before the first step says which tokens are stored",
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "methods", help="list the compression methods", description="List the compression methods and their options."
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace):
    """Print the list."""
    from ..methods import METHODS, RASTER_METHODS

    methods = {**METHODS, **RASTER_METHODS}
    print("\n\n".join("\n".join(method_lines(method)) for method in methods.values()))


def method_lines(method: "type[Method]") -> list[str]:
    """What there is to know of a method."""
    from ..methods import METHODS, RASTER_METHODS

    summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    kinds = [
        name for name, methods in (("next-scale", METHODS), ("next-token", RASTER_METHODS)) if method.name in methods
    ]
    # Methods are dataclasses with a default for every option, though their base class cannot say so.
    options = {option.name: option.default for option in fields(method)}  # type: ignore[arg-type]
    # Some facts follow from the options.
    default = method()
    return [
        f"{method.name}: {summary}",
        f"  models: {' and '.join(kinds)}",
        f"  protocol: {PROTOCOLS[default.protocol]}",
        f"  head profile: {profile_text(default)}",
        f"  options: {', '.join(f'{name}={value_text(value)}' for name, value in options.items())}",
        f"  source: {method.source or 'not given'}",
    ]


def profile_text(method: "Method") -> str:
    """Whether a method needs a head profile, and which arrays of it."""
    return f"needed ({', '.join(method.profile_arrays)})" if method.needs_profile else "not needed"


def value_text(value: object) -> str:
    """A default in short."""
    return f"{value:.3g}" if isinstance(value, float) else repr(value)
