"""Pipelines, one a backbone."""

from .pipeline_hack_var import HackVARPipeline
from .pipeline_hack_var_class import HackVARClassPipeline
from .pipeline_hack_var_text import HackVARTextPipeline
from .pipeline_output import HackVARPipelineOutput


PIPELINES: tuple[type[HackVARPipeline], ...] = (HackVARClassPipeline, HackVARTextPipeline)

__all__ = ["PIPELINES", "HackVARClassPipeline", "HackVARPipeline", "HackVARPipelineOutput", "HackVARTextPipeline"]
