"""MEDA: LOOK-M with budgets by the entropy of a layer's attention (arXiv 2502.17599)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .allocation import allocate
from .base import SCORED_QUERIES, Geometry, Ranking, StepView
from .baseline import LayerBaseline, recorded, relative_weights
from .hack import merge_by_cosine
from .heavy_hitters import HALF_WITH_SINKS, SINKS, average, heavy_hitters


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# No layer gets less than a hundredth of its tokens.
LEAST_PART = 100


@dataclass
class MEDA(LayerBaseline):
    """
    Keep what LOOK-M keeps, and merge every other token into the mean with the kept one whose key is most similar; layers
    whose attention has a larger entropy keep more.

    A layer's weight at a step is the exponential of its entropy, a mean over heads and queries from the head profile. No
    layer gets less than a hundredth of its tokens, nor less than twice the four sinks, less one.

    Args:
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "meda"
    needs_profile: ClassVar[bool] = True
    profile_arrays: ClassVar[tuple[str, ...]] = ("entropy",)
    carries_scores: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2502.17599"

    protocol: str = "post"

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return max(super().min_budget(geometry, profile), least_tokens(geometry.schedule.total))

    def layer_budgets(
        self, geometry: Geometry, budget: int, profile: "HeadProfile | None", step: int, present: Sequence[int]
    ) -> list[int]:
        entropies = recorded(self, profile, "entropy", step).mean(1)
        weights = relative_weights(entropies)
        floors = [min(count, least_tokens(count)) for count in present]
        layers = geometry.num_layers
        return allocate([1] * layers, weights, present, floors, min(budget * layers, sum(present)))

    def rank(self, view: StepView) -> Ranking:
        return heavy_hitters(view, SINKS)

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_by_cosine(view, kept, key, value, average)

    def merges(self, label: str, last: bool) -> bool:
        return True

    def scored_queries(self, label: str, length: int) -> int:
        return min(length, SCORED_QUERIES)


def least_tokens(present: int) -> int:
    """The fewest tokens that a layer with so many may keep."""
    return max(HALF_WITH_SINKS, -(-present // LEAST_PART))
