"""What the baselines have in common: methods for language models, adapted to steps that add whole scales."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .base import Geometry, Method, Plan, StepView, check_choice
from .uniform import layer_plan, uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


LEAST_LOG_WEIGHT = -200.0


class Baseline(Method):
    """
    A method that gives all heads of a layer one length.

    Of the tokens that are present it keeps its budget, before the attention of the step or after it, or all of them while
    they fit. "Recent" tokens are those with the largest ids: of a scale that is kept in part, the bottom rows.
    """

    def __post_init__(self):
        check_choice("protocol", self.protocol, ("post", "pre"))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        # A scale that is kept in part has one token at least; lines are as long as those before them.
        return sum(geometry.schedule.lengths[:2]) + (not geometry.schedule.raster)

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        return uniform_plan(geometry, budget, self.protocol)


class LayerBaseline(Baseline):
    """A baseline whose layers share the budget unevenly, step by step."""

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        present, by_step = [0] * geometry.num_layers, []
        for step, length in enumerate(geometry.schedule.lengths):
            present = [count + length for count in present]
            present = self.layer_budgets(geometry, budget, profile, step, present)
            by_step.append(present)
        return layer_plan(geometry, budget, list(zip(*by_step)), self.protocol)

    @abstractmethod
    def layer_budgets(
        self, geometry: Geometry, budget: int, profile: "HeadProfile | None", step: int, present: Sequence[int]
    ) -> list[int]:
        """
        Tokens that a head of each layer keeps after a step, `budget` on average where as many are there.

        Args:
            geometry ([`Geometry`]):
                Of the model.
            budget (`int`):
                Average over layers.
            profile ([`HeadProfile`], *optional*):
                Of the model.
            step (`int`):
                Index of the scale, from 0.
            present (`Sequence[int]`):
                Tokens that a head of each layer has in this step.
        """


def recorded(method: Method, profile: "HeadProfile | None", name: str, step: int) -> torch.Tensor:
    """
    An array of the head profile at one step, `[layers, heads]` in float64.

    Raises:
        `ValueError`: if there is no profile.
    """
    if profile is None:
        raise ValueError(
            f"Method {method.name!r} divides its budget over layers by a head profile but got none: attach one with "
            "`pipe.load_head_profile(...)`, or make it with `hack-pipelines calibrate`."
        )
    return profile.mean[name][:, :, step].double()


def relative_weights(logs: torch.Tensor) -> list[float]:
    """Weights with these logarithms over the largest weight, none of them so small that it would not divide."""
    return (logs - logs.max()).clamp_min(LEAST_LOG_WEIGHT).exp().tolist()


def recent_tiers(view: StepView, count: int, sinks: int = 0) -> torch.Tensor:
    """
    Tiers of a step's tokens, `[present]`: 2 for the first `sinks`, 1 for the last `count`, 0 for the rest.

    A method that always keeps the first tokens of all has them in the first places.
    """
    tiers = torch.zeros(view.num_present, dtype=torch.long)
    tiers[view.num_present - count :] = 1
    tiers[:sinks] = 2
    return tiers


def equal_scores(view: StepView) -> torch.Tensor:
    """Scores for methods whose tiers decide alone, `[rows, heads, present]`."""
    rows, heads = view.query.shape[:2]
    return torch.zeros(1, device=view.query.device).expand(rows, heads, view.num_present)
