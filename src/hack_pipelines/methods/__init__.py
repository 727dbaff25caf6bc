"""Compression methods, one file each, and the list of them."""

from collections.abc import Mapping
from dataclasses import is_dataclass

from .base import PROTOCOLS, Geometry, LayerPlan, Method, Plan, Ranking, StepView
from .cake import CAKE
from .full import Full
from .h2o import H2O
from .hack import HACK
from .hack_plus_plus import HACKPlusPlus
from .headkv import HeadKV
from .headkv_ar import HeadKVAR
from .heatkv import HeatKV
from .linear_ar import LineAR
from .lookm import LookM
from .meda import MEDA
from .pyramidkv import PyramidKV
from .random import Random
from .scale_window import ScaleWindow
from .scalekv import ScaleKV
from .segment_plan import SegmentPlan
from .sliding_window import SlidingWindow
from .snapkv import SnapKV
from .spec import parse_method
from .streaming_llm import StreamingLLM
from .uniform import layer_plan, uniform_plan
from .value_norm import ValueNorm


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        CAKE,
        H2O,
        HACK,
        HACKPlusPlus,
        HeadKV,
        HeatKV,
        LookM,
        MEDA,
        PyramidKV,
        Random,
        ScaleWindow,
        ScaleKV,
        SlidingWindow,
        SnapKV,
        StreamingLLM,
        ValueNorm,
    )
}

# For models that draw token by token, where a line is what a scale is elsewhere.
RASTER_METHODS: dict[str, type[Method]] = {
    method.name: method for method in (H2O, HeadKVAR, LineAR, Random, SlidingWindow, SnapKV, StreamingLLM, ValueNorm)
}

# The best that is known at equal bytes, see docs/comparison.md.
DEFAULT_METHOD = HACKPlusPlus.name


def register_method(method: type[Method]) -> type[Method]:
    """
    Make a method known by its name, to pipelines and to the command line of this process; usable as a decorator.

    A class of the same module and name replaces the one before it, so that a cell of a notebook can be run again.

    Args:
        method (`type[Method]`):
            A dataclass whose fields all have defaults.

    Raises:
        `TypeError`: if it is no such class.
        `ValueError`: if the name is missing, taken or would not be read back from a text, or there is no such protocol.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise TypeError(f"A method must be a dataclass derived from `Method` but {method!r} is none.")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name or set(name) & set(": ,=@/"):
        raise ValueError(f"`name` of {method.__name__} must be a word without any of ':,=@/' but is {name!r}.")
    known = METHODS.get(name, method)
    # A cell of a notebook that runs again makes the same class anew.
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"There is a method {name!r} already, {METHODS[name].__name__}: choose another name.")
    protocol = getattr(method(), "protocol", None)
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"`protocol` of {method.__name__} must be one of {', '.join(map(repr, PROTOCOLS))} but is {protocol!r}."
        )
    METHODS[name] = method
    return method


def get_method(method: str | Method, methods: Mapping[str, type[Method]] = METHODS) -> Method:
    """
    A method by name, with its default options or others, `"hack:rules=contextual,alpha=0.4"`; or the instance itself.

    Args:
        method (`str` or [`Method`]):
            What is wanted.
        methods (`Mapping[str, type[Method]]`, *optional*):
            Those to choose from, by name; `METHODS` by default.

    Raises:
        `ValueError`: if there is no such method, option or value.
    """
    return method if isinstance(method, Method) else parse_method(str(method), methods)


__all__ = [
    "CAKE",
    "H2O",
    "DEFAULT_METHOD",
    "METHODS",
    "RASTER_METHODS",
    "HACK",
    "Full",
    "Geometry",
    "HACKPlusPlus",
    "HeadKV",
    "HeadKVAR",
    "HeatKV",
    "LayerPlan",
    "LineAR",
    "LookM",
    "MEDA",
    "Method",
    "Plan",
    "PyramidKV",
    "Random",
    "Ranking",
    "ScaleKV",
    "ScaleWindow",
    "SegmentPlan",
    "SlidingWindow",
    "SnapKV",
    "StepView",
    "StreamingLLM",
    "ValueNorm",
    "get_method",
    "layer_plan",
    "register_method",
    "uniform_plan",
]
