"""Compression methods, one file each, and the list of them."""

from .base import Geometry, LayerPlan, Method, Plan, Ranking, StepView
from .cake import CAKE
from .full import Full
from .h2o import H2O
from .hack import HACK
from .hack_plus_plus import HACKPlusPlus
from .headkv import HeadKV
from .heatkv import HeatKV
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


def get_method(method: str | Method) -> Method:
    """
    A method by name, with its default options or others, `"hack:rules=contextual,alpha=0.4"`; or the instance itself.

    Raises:
        `ValueError`: if there is no such method, option or value.
    """
    return method if isinstance(method, Method) else parse_method(str(method), METHODS)


__all__ = [
    "CAKE",
    "H2O",
    "METHODS",
    "HACK",
    "Full",
    "Geometry",
    "HACKPlusPlus",
    "HeadKV",
    "HeatKV",
    "LayerPlan",
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
]
