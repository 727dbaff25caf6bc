"""Pipelines, one a backbone."""

from .pipeline_hack_var import HackVARPipeline
from .pipeline_hack_var_class import HackVARClassPipeline
from .pipeline_output import HackVARPipelineOutput


PIPELINES: tuple[type[HackVARPipeline], ...] = (HackVARClassPipeline,)

__all__ = ["PIPELINES", "HackVARClassPipeline", "HackVARPipeline", "HackVARPipelineOutput"]
