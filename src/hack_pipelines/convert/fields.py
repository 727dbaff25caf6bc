"""Configuration: what a file shows, what its user says, and where the two disagree."""

from typing import Any

import torch


def axes(where: str, state_dict: dict[str, torch.Tensor], key: str, count: int) -> tuple[int, ...]:
    """
    Shape of a tensor that the configuration is read from.

    Raises:
        `ValueError`: if it is missing or has another number of axes.
    """
    if key not in state_dict:
        raise ValueError(f"{where} lacks {key}, from which the configuration is read.")
    shape = tuple(state_dict[key].shape)
    if len(shape) != count or not all(shape):
        raise ValueError(f"{where}: {key} has shape {shape} but must have {count} axes, none of them empty.")
    return shape


def settle(
    where: str, argument: str, found: dict[str, Any], free: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """
    The configuration in the original's field names.

    Args:
        where (`str`):
            The file, for messages.
        argument (`str`):
            Which part of `config` it is, for messages.
        found (`dict[str, Any]`):
            Fields that the file shows, or that are the same in every model that can be loaded.
        free (`dict[str, Any]`):
            Fields that no file shows, with their defaults.
        given (`dict[str, Any]`):
            Fields that the user says.

    Raises:
        `ValueError`: if a field is unknown, or differs from what the file shows.
    """
    known = {**free, **found}
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in known:
            raise ValueError(f"`config[{argument!r}]` has no field {name!r}: it has {', '.join(sorted(known))}.")
        if name in found and value != found[name]:
            raise ValueError(
                f"`config[{argument!r}][{name!r}]` is {value!r}, but {where} shows {found[name]!r}: leave it out, or give "
                "the file that belongs to it."
            )
        known[name] = value
    return known


def check_number(argument: str, name: str, value: Any, whole: bool = False):
    """
    Refuse a field that no file shows and that is no positive number.

    Raises:
        `ValueError`: naming the field and its value.
    """
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        kind = "whole number" if whole else "number"
        raise ValueError(f"`config[{argument!r}][{name!r}]` must be a positive {kind} but is {value!r}.")
