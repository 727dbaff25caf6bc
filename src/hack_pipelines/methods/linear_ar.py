"""LineAR: the first line, the last ones, and what the last one looked at (arXiv 2512.04857)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Geometry, Method, Plan, Ranking, StepView
from .lines import even_columns
from .uniform import uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class LineAR(Method):
    """
    For models that draw token by token. The cache is seen as lines: the first ones anchor the image, the last ones are what
    the next line continues, and of all between, what the line just drawn attended to is what the next one will need.

    The authors have not published their code: how many lines are protected, and that scores are means over the queries of
    the last line alone, is our reading.

    Args:
        anchors (`int`, *optional*, defaults to 1):
            First lines that always stay.
        recent (`int`, *optional*, defaults to 1):
            Last lines that always stay.
        observe (`int`, *optional*, defaults to 8):
            Queries of a line that score the tokens, evenly spaced.
    """

    name: ClassVar[str] = "linear_ar"
    source: ClassVar[str] = "arXiv 2512.04857"
    protocol = "post"

    anchors: int = 1
    recent: int = 1
    observe: int = 8

    def __post_init__(self):
        if self.anchors < 0 or self.recent < 1 or self.observe < 1:
            raise ValueError(
                f"`anchors` must be at least 0, `recent` and `observe` at least 1, but they are {self.anchors}, "
                f"{self.recent}, {self.observe}."
            )

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return (self.anchors + self.recent) * geometry.schedule.lengths[0]

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        return uniform_plan(geometry, budget, self.protocol)

    def observed_queries(self, plan: Plan, step: int) -> Sequence[int]:
        return even_columns(plan.schedule.lengths[step], self.observe)

    def rank(self, view: StepView) -> Ranking:
        queries = torch.arange(view.query.shape[2], device=view.query.device)
        scores = view.attention_columns(queries) / len(queries)
        width = view.key.shape[2]
        tiers = torch.zeros(view.num_present, dtype=torch.long)
        tiers[view.num_present - self.recent * width :] = 1
        # No budget is smaller than what is protected, so the first lines are still the first that are present.
        tiers[: self.anchors * width] = 1
        return Ranking(scores, tiers)

    def scored_queries(self, label: str, length: int) -> int:
        return min(length, self.observe)
