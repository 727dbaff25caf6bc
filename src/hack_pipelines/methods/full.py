"""The cache that loses nothing, by the name of a method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Geometry, Method, Plan, Ranking, StepView
from .uniform import uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class Full(Method):
    """Keep every token that a later scale reads."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "no compression"
    protocol = "post"

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return geometry.schedule.cacheable

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        return uniform_plan(geometry, budget, self.protocol)

    def rank(self, view: StepView) -> Ranking:
        raise ValueError("Nothing has to go from a full cache, so there is nothing to rank.")
