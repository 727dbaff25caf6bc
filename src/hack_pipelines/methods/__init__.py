"""Compression methods, one file each, and the list of them."""

from .base import Geometry, LayerPlan, Method, Plan, Ranking, StepView
from .full import Full
from .hack import HACK
from .hack_plus_plus import HACKPlusPlus
from .headkv import HeadKV
from .heatkv import HeatKV
from .random import Random
from .scale_window import ScaleWindow
from .scalekv import ScaleKV
from .segment_plan import SegmentPlan
from .spec import parse_method


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        HACK,
        HACKPlusPlus,
        HeadKV,
        HeatKV,
        Random,
        ScaleWindow,
        ScaleKV,
    )
}


def get_method(method: str | Method) -> Method:
    """
    A method by name, with its default options or others, `"hack:rules=contextual,alpha=0.4"`; or the instance itself.

    Raises:
        `ValueError`: if there is no such method, option or value.
    """
    return method if isinstance(method, Method) else parse_method(str(method), METHODS)


__all__ = [
    "METHODS",
    "HACK",
    "Full",
    "Geometry",
    "HACKPlusPlus",
    "HeadKV",
    "HeatKV",
    "LayerPlan",
    "Method",
    "Plan",
    "Random",
    "Ranking",
    "ScaleKV",
    "ScaleWindow",
    "SegmentPlan",
    "StepView",
    "get_method",
]
