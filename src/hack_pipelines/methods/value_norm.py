"""The largest values, a floor that looks at what is stored but at no query."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Ranking, StepView
from .baseline import Baseline


@dataclass
class ValueNorm(Baseline):
    """
    Keep the tokens whose values have the largest Euclidean norm. Keys cannot serve: theirs is 1.

    Args:
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "value_norm"
    source: ClassVar[str] = "a floor, published by nobody"

    protocol: str = "post"

    def rank(self, view: StepView) -> Ranking:
        norms = [
            torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32) for value in (view.stored_value, view.value)
        ]
        return Ranking(torch.cat(norms, dim=-1))
