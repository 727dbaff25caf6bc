from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..cache.report import CacheReport


@dataclass
class HackVARPipelineOutput(BaseOutput):
    """
    Output of the pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images, as `output_type` says.
        tokens (`list[torch.Tensor]`):
            The tokens drawn, one tensor a scale: ids `[images, n_k]`.
        cache_report ([`CacheReport`]):
            What the cache held, measured from its tensors.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: list[torch.Tensor]
    cache_report: CacheReport
