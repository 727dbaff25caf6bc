"""LOOK-M: heavy hitters, with what is evicted merged into what stays (arXiv 2406.18139)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import SCORED_QUERIES, Geometry, Ranking, StepView, check_choice
from .baseline import Baseline
from .hack import merge_by_cosine
from .heavy_hitters import HALF_WITH_SINKS, MERGES, SINKS, heavy_hitters


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class LookM(Baseline):
    """
    Keep what H2O keeps, and the first four tokens; merge every other one into the kept token with the most similar key.

    With `X_r` a kept token and `X_e` those that are merged into it, for keys and values alike in float32:

    - `"pivot"`: the mean of `X_r` and of all `(X_e + X_r) / 2`;
    - `"average"`: the mean of `X_r` and of all `X_e`;
    - `"weighted"`: the mean of `X_r` and of all `cos(K_e, K_r) X_e`, where only those are merged whose cosine, averaged
      over heads, is at least the mean cosine of the row. Heads evict different tokens: the first one that each of them
      evicts go together, then the second ones and so on, as in the original.

    Args:
        merging (`"pivot"`, `"average"` or `"weighted"`, *optional*, defaults to `"pivot"`):
            How tokens are merged.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "lookm"
    carries_scores: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2406.18139"

    merging: str = "pivot"
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        check_choice("merging", self.merging, tuple(MERGES))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return max(HALF_WITH_SINKS, super().min_budget(geometry, profile))

    def rank(self, view: StepView) -> Ranking:
        return heavy_hitters(view, SINKS)

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_by_cosine(view, kept, key, value, MERGES[self.merging])

    def merges(self, label: str, last: bool) -> bool:
        return True

    def scored_queries(self, label: str, length: int) -> int:
        return min(length, SCORED_QUERIES)
