"""CAKE: budgets by how widely and how variably a layer attends (ICLR 2025, arXiv 2503.12491)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .allocation import allocate
from .base import Geometry, Ranking, StepView
from .baseline import LayerBaseline, recorded, relative_weights
from .window import check_window, last_positions, min_window_budget, pooled, window_size, window_tiers


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# Stands for an entropy or variance of zero, which has no logarithm.
TINY = 1e-30


@dataclass
class CAKE(LayerBaseline):
    """
    Keep a window of the last current tokens and what their queries look at most, or most differently; layers with wide
    and variable attention keep more.

    A layer's preference at a step is `H^(1 / tau1) V^(1 / tau2)`: `H` is the entropy of its attention and `V` the
    variance over queries, summed over its heads, both from the head profile. So lengths are known before the first step,
    and need no cascade that shortens earlier layers when later ones are seen.

    Args:
        gamma (`float`, *optional*, defaults to 200.0):
            Weight of the variance over the window beside the mean in a token's score.
        tau1, tau2 (`float`, *optional*, defaults to 1.0):
            Temperatures of entropy and variance; the original tunes them for every model.
        window (`int`, *optional*, defaults to 32):
            Last tokens of the current scale that are kept and whose queries score the others; at most a quarter of the
            budget, and what a scale has.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "cake"
    needs_profile: ClassVar[bool] = True
    profile_arrays: ClassVar[tuple[str, ...]] = ("entropy", "colvar")
    source: ClassVar[str] = "arXiv 2503.12491"

    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    window: int = 32
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        if not self.gamma >= 0:
            raise ValueError(f"`gamma` must be at least 0 but is {self.gamma}.")
        if not (self.tau1 > 0 and self.tau2 > 0):
            raise ValueError(f"`tau1` and `tau2` must be above 0 but are {self.tau1} and {self.tau2}.")

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return min_window_budget(geometry)

    def preferences(self, profile: "HeadProfile | None", step: int) -> list[float]:
        """Preference of every layer at a step, over that of the layer with the largest."""
        logs = [
            recorded(self, profile, name, step).sum(1).clamp_min(TINY).log() / temperature
            for name, temperature in (("entropy", self.tau1), ("colvar", self.tau2))
        ]
        return relative_weights(logs[0] + logs[1])

    def layer_budgets(
        self, geometry: Geometry, budget: int, profile: "HeadProfile | None", step: int, present: Sequence[int]
    ) -> list[int]:
        window = window_size(self.window, budget, geometry.schedule.lengths[step])
        beside = [count - window for count in present]
        total = (budget - window) * len(present)
        return [window + count for count in cascaded(self.preferences(profile, step), beside, total)]

    def rank(self, view: StepView) -> Ranking:
        positions = last_positions(view, window_size(self.window, view.budget, view.query.shape[2]))
        attention = view.attention_rows(positions)
        scores = pooled(attention.mean(2) + self.gamma * attention.var(2, correction=0))
        return Ranking(scores, window_tiers(view, positions))

    def scored_queries(self, label: str, length: int) -> int:
        return min(self.window, length)


def cascaded(preferences: Sequence[float], beside: Sequence[int], total: int) -> list[int]:
    """
    Tokens beside the window of the layers that are known so far.

    Args:
        preferences (`Sequence[float]`):
            Of each of these layers.
        beside (`Sequence[int]`):
            Tokens beside the window that each of them has.
        total (`int`):
            Tokens beside the window of all layers together, also of those that are not known yet.
    """
    layers = len(preferences)
    return allocate([1] * layers, preferences, beside, [0] * layers, min(total, sum(beside)))
