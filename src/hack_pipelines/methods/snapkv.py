"""SnapKV: what a window of the last queries looks at (arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Geometry, Ranking, StepView, check_choice
from .baseline import Baseline
from .selection import observed_count, observed_positions
from .window import check_window, last_positions, min_window_budget, pooled, window_size, window_tiers


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class SnapKV(Baseline):
    """
    Keep a window of the current tokens, and what their queries look at most.

    A score is the attention that a token gets from the window, averaged over its queries and then over five neighbours
    in the sequence.

    Args:
        window (`int`, *optional*, defaults to 32):
            Tokens of the window; at most a quarter of the budget, and what a scale has.
        window_positions (`"recent"` or `"uniform"`, *optional*, defaults to `"recent"`):
            Where they lie: the last ones in raster order, or spread over the grid as HACK's observing queries are, which
            are all tokens of a scale with at most twice as many.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "arXiv 2404.14469"

    window: int = 32
    window_positions: str = "recent"
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.window)
        check_choice("window_positions", self.window_positions, ("recent", "uniform"))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return min_window_budget(geometry)

    def rank(self, view: StepView) -> Ranking:
        count = window_size(self.window, view.budget, view.query.shape[2])
        if self.window_positions == "recent":
            positions = last_positions(view, count)
        else:
            positions = observed_positions(view.schedule.sizes[view.step], count, "lattice", view.query.device)
        scores = pooled(view.attention_rows(positions).mean(2))
        return Ranking(scores, window_tiers(view, positions))

    def scored_queries(self, label: str, length: int) -> int:
        if self.window_positions == "uniform":
            return observed_count(length, min(self.window, length))
        return min(self.window, length)
