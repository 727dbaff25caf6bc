"""Compression methods, one file each, and the list of them."""

from .base import Geometry, LayerPlan, Method, Plan, Ranking, StepView
from .full import Full
from .hack import HACK
from .hack_plus_plus import HACKPlusPlus
from .headkv import HeadKV
from .random import Random
from .scale_window import ScaleWindow


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        HACK,
        HACKPlusPlus,
        HeadKV,
        Random,
        ScaleWindow,
    )
}


def get_method(method: str | Method) -> Method:
    """
    A method by name, with its default options, or the instance itself.

    Raises:
        `ValueError`: if there is no method of that name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, METHODS))} or an instance of a method but is {method!r}."
        )
    return METHODS[method]()


__all__ = [
    "METHODS",
    "HACK",
    "Full",
    "Geometry",
    "HACKPlusPlus",
    "HeadKV",
    "LayerPlan",
    "Method",
    "Plan",
    "Random",
    "Ranking",
    "ScaleWindow",
    "StepView",
    "get_method",
]
