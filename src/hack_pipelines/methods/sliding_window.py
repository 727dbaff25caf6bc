"""The most recent tokens and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Ranking, StepView
from .baseline import Baseline, equal_scores, recent_tiers


@dataclass
class SlidingWindow(Baseline):
    """
    Keep the last tokens of the sequence.

    Args:
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "sliding_window"
    source: ClassVar[str] = "the window of arXiv 2309.17453 without its sinks"

    protocol: str = "post"

    def rank(self, view: StepView) -> Ranking:
        return Ranking(equal_scores(view), recent_tiers(view, view.num_kept))
