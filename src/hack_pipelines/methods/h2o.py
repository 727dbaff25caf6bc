"""H2O: heavy hitters by the attention of all steps so far, and recent tokens (arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

from .base import SCORED_QUERIES, Ranking, StepView, check_choice
from .baseline import Baseline
from .heavy_hitters import heavy_hitters


@dataclass
class H2O(Baseline):
    """
    Keep the tokens that got the most attention in all steps so far, and as many of the last ones.

    Every stored token carries the attention that it got, summed over all queries of all steps. It takes one more product
    of queries and keys.

    Args:
        normalise (`"sum"` or `"mean"`, *optional*, defaults to `"sum"`):
            What a step adds: the sum over its queries, so that later steps, which have more of them, weigh more, as in
            the original; or their mean.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "h2o"
    carries_scores: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2306.14048"

    normalise: str = "sum"
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        check_choice("normalise", self.normalise, ("sum", "mean"))

    def rank(self, view: StepView) -> Ranking:
        return heavy_hitters(view, normalise=self.normalise)

    def scored_queries(self, label: str, length: int) -> int:
        return min(length, SCORED_QUERIES)
