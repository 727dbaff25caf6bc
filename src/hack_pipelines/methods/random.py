"""Random eviction, the floor under every method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Geometry, Method, Plan, Ranking, StepView, check_choice, uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class Random(Method):
    """
    Keep tokens at random, the same ones for every image. A method that does not beat it at its own budget is broken.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "a floor, published by nobody"

    seed: int = 0
    protocol: str = "post"

    def __post_init__(self):
        check_choice("protocol", self.protocol, ("post", "pre"))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return sum(geometry.schedule.lengths[:2]) + 1

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        return uniform_plan(geometry, budget, self.protocol)

    def rank(self, view: StepView) -> Ranking:
        generator = torch.Generator().manual_seed((self.seed * 1_000 + view.layer) * 1_000 + view.step)
        scores = torch.rand(len(view.heads), view.num_present, generator=generator)
        return Ranking(scores.to(view.query.device).expand(len(view.query), -1, -1))
