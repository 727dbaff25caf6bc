"""PyramidKV: SnapKV with budgets that fall from layer to layer (arXiv 2406.02069)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .allocation import allocate
from .base import Geometry, Ranking, StepView
from .baseline import LayerBaseline
from .window import check_window, last_positions, min_window_budget, pooled, window_size, window_tiers


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class PyramidKV(LayerBaseline):
    """
    Keep what SnapKV keeps, the most of it in the first layer and the least in the last.

    With the average `B`, a window of `W` and `B' = B - W`, the budgets beside the window fall in equal steps from
    `2 B' - B' / beta` to `B' / beta`. What a layer has no tokens for goes to the others.

    Args:
        beta (`float`, *optional*, defaults to 20.0):
            Average budget beside the window over that of the last layer.
        window (`int`, *optional*, defaults to 32):
            Last tokens of the current scale that are kept and whose queries score the others; at most a quarter of the
            budget, and what a scale has.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "pyramidkv"
    source: ClassVar[str] = "arXiv 2406.02069"

    beta: float = 20.0
    window: int = 32
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        if not self.beta >= 1:
            raise ValueError(f"`beta` must be at least 1 but is {self.beta}.")

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return min_window_budget(geometry)

    def layer_budgets(
        self, geometry: Geometry, budget: int, profile: "HeadProfile | None", step: int, present: Sequence[int]
    ) -> list[int]:
        window, layers = window_size(self.window, budget, geometry.schedule.lengths[step]), geometry.num_layers
        # One layer alone is the middle of its pyramid.
        heights = [1 - 2 * layer / (layers - 1) if layers > 1 else 0.0 for layer in range(layers)]
        wanted = [window + (budget - window) * (1 + height * (1 - 1 / self.beta)) for height in heights]
        return allocate([1] * layers, wanted, present, [window] * layers, min(budget * layers, sum(present)))

    def rank(self, view: StepView) -> Ranking:
        positions = last_positions(view, window_size(self.window, view.budget, view.query.shape[2]))
        scores = pooled(view.attention_rows(positions).mean(2))
        return Ranking(scores, window_tiers(view, positions))

    def scored_queries(self, label: str, length: int) -> int:
        return min(self.window, length)
