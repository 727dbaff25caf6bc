"""Sampling settings, and the checks of what a user may write for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


@dataclass(frozen=True)
class SamplingSettings:
    """
    How tokens are drawn, with one entry a scale.

    Args:
        guidance (`tuple[float, ...]`):
            Weight of the conditional logits over the unconditional ones; 1 is no guidance.
        temperature (`tuple[float, ...]`):
            Divisor of the logits.
        top_k (`tuple[int, ...]`):
            Entries that stay; 0 keeps all.
        top_p (`tuple[float, ...]`):
            Probability mass that stays; 1 keeps all.
        more_smooth (`bool`, *optional*, defaults to `False`):
            Whether a soft mixture of codes feeds the latent instead of the drawn one.
        guidance_layers (`tuple[int, ...]`, *optional*, defaults to `(0,)`):
            Where guidance acts: 0 is on the logits, `-j` on the output of the block with `j - 1` blocks after it.
    """

    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    more_smooth: bool = False
    guidance_layers: tuple[int, ...] = (0,)

    @property
    def guided(self) -> bool:
        """Whether any scale needs unconditional rows."""
        return any(weight != 1 for weight in self.guidance)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def per_scale(
    name: str, value: Any, num_scales: int, lower: float, upper: float, whole: bool = False, open_lower: bool = False
) -> tuple:
    """
    A number, or one number a scale, as a tuple with one entry a scale.

    Raises:
        `ValueError`: if there are too few numbers, or one is out of its range.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * num_scales
    if len(values) != num_scales:
        raise ValueError(f"`{name}` must be a number or a list of {num_scales}, one a scale, but has {len(values)}.")
    for entry in values:
        number = is_whole(entry) if whole else isinstance(entry, Real) and not isinstance(entry, bool)
        inside = number and isfinite(entry) and lower <= entry <= upper and not (open_lower and entry == lower)
        if not inside:
            bracket = "(" if open_lower else "["
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"`{name}` must be {kind} in {bracket}{lower}, {upper}] but is {entry!r}.")
    return values


def callback_inputs(callback: Any, names: Sequence[str]) -> Sequence[str]:
    """Names that a callback wants, which a diffusers callback object says itself."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return callback.tensor_inputs
    return names
