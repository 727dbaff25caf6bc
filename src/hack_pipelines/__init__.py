"""Visual autoregressive image generation in diffusers' form, with head-aware compression of the key/value cache."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Importing torch, transformers and diffusers takes seconds: each name is imported when it is first used (PEP 562), so
# that `hack-pipelines --help` and tools that only ask for the version do not pay for them.
_EXPORTS = {
    "Cache": "cache.cache",
    "CacheReport": "cache.report",
    "CAKE": "methods.cake",
    "FullCache": "cache.cache",
    "H2O": "methods.h2o",
    "HACK": "methods.hack",
    "HACKPlusPlus": "methods.hack_plus_plus",
    "HackVARClassPipeline": "pipelines.pipeline_hack_var_class",
    "HackVARPipeline": "pipelines.pipeline_hack_var",
    "HackVARPipelineOutput": "pipelines.pipeline_output",
    "HackVARTextPipeline": "pipelines.pipeline_hack_var_text",
    "HeadGroupCache": "cache.head_group",
    "HeadKV": "methods.headkv",
    "HeadProfile": "profiles.head_profile",
    "HeatKV": "methods.heatkv",
    "InfinityTransformer2DModel": "models.transformer_infinity",
    "LookM": "methods.lookm",
    "MEDA": "methods.meda",
    "Method": "methods.base",
    "MultiScaleBSQModel": "models.autoencoder_bsq",
    "MultiScaleVQModel": "models.autoencoder_msvq",
    "PyramidKV": "methods.pyramidkv",
    "Random": "methods.random",
    "register_method": "methods",
    "ScaleKV": "methods.scalekv",
    "ScaleWindow": "methods.scale_window",
    "SlidingWindow": "methods.sliding_window",
    "SnapKV": "methods.snapkv",
    "StreamingLLM": "methods.streaming_llm",
    "ValueNorm": "methods.value_norm",
    "VARTransformer2DModel": "models.transformer_var",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .cache.cache import Cache, FullCache
    from .cache.head_group import HeadGroupCache
    from .cache.report import CacheReport
    from .methods import register_method
    from .methods.base import Method
    from .methods.cake import CAKE
    from .methods.h2o import H2O
    from .methods.hack import HACK
    from .methods.hack_plus_plus import HACKPlusPlus
    from .methods.headkv import HeadKV
    from .methods.heatkv import HeatKV
    from .methods.lookm import LookM
    from .methods.meda import MEDA
    from .methods.pyramidkv import PyramidKV
    from .methods.random import Random
    from .methods.scale_window import ScaleWindow
    from .methods.scalekv import ScaleKV
    from .methods.sliding_window import SlidingWindow
    from .methods.snapkv import SnapKV
    from .methods.streaming_llm import StreamingLLM
    from .methods.value_norm import ValueNorm
    from .models.autoencoder_bsq import MultiScaleBSQModel
    from .models.autoencoder_msvq import MultiScaleVQModel
    from .models.transformer_infinity import InfinityTransformer2DModel
    from .models.transformer_var import VARTransformer2DModel
    from .pipelines.pipeline_hack_var import HackVARPipeline
    from .pipelines.pipeline_hack_var_class import HackVARClassPipeline
    from .pipelines.pipeline_hack_var_text import HackVARTextPipeline
    from .pipelines.pipeline_output import HackVARPipelineOutput
    from .profiles.head_profile import HeadProfile
else:
    # Hidden from type checkers, which would otherwise accept any misspelt name.
    def __getattr__(name):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _EXPORTS.keys())
