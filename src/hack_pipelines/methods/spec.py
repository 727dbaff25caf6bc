"""Methods as text: a name, and options where they are not the defaults."""

import types
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, get_args

from .base import Method


BOOLEANS = {"true": True, "false": False}
# In the order in which a text is tried: "3" is a whole number before it is a fraction, and everything is a text.
KINDS = (types.NoneType, bool, int, float, str)


def parse_method(text: str, methods: Mapping[str, type[Method]]) -> Method:
    """
    The method that a text such as `"hack"` or `"hack:rules=contextual,alpha=0.4"` stands for.

    Args:
        text (`str`):
            `name[:option=value,...]`.
        methods (`Mapping[str, type[Method]]`):
            All there are, by name.

    Raises:
        `ValueError`: if there is no such method, option or value; the message lists those that there are.
    """
    name, colon, rest = text.partition(":")
    if name not in methods:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, methods))}, also with options such as 'hack:alpha=0.4', or an "
            f"instance of a method, but is {text!r}. One of your own is known once `register_method` has run in this process: "
            "see docs/adding-a-method.md."
        )
    # Methods are dataclasses with a default for every option, though their base class cannot say so.
    known = {field.name: field for field in fields(methods[name])}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for entry in rest.split(",") if colon else []:
        option, equals, value = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(f"{text!r} must have the form name:option=value,option=value but has {entry!r}.")
        if option not in known:
            raise ValueError(
                f"Method {name!r} has no option {option!r}; its options are {', '.join(map(repr, known)) or 'none'}."
            )
        if option in options:
            raise ValueError(f"{text!r} names the option {option!r} twice.")
        options[option] = parse_value(name, known[option], value)
    return methods[name](**options)


def method_text(method: Method) -> str:
    """A method as [`parse_method`] reads it, with all of its options, so that it means the same when a default changes."""
    options = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    # As it is usual to write them, though capitals are read, too.
    words = {name: str(value).lower() if value in (None, True, False) else value for name, value in options.items()}
    return ":".join(filter(None, (method.name, ",".join(f"{name}={word}" for name, word in words.items()))))


def parse_value(method: str, field: Field, text: str) -> Any:
    """The value of an option as its field is typed: `"none"`, `"true"`, a number or a text."""
    kinds = get_args(field.type) or (field.type,)
    for kind in KINDS:
        if kind not in kinds:
            continue
        if kind is types.NoneType and text.lower() == "none":
            return None
        if kind is bool and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in KINDS if kind in kinds)
    raise ValueError(f"Option {field.name!r} of method {method!r} must be {expected} but is {text!r}.")
