"""StreamingLLM: attention sinks and a window of recent tokens (arXiv 2309.17453)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Geometry, Ranking, StepView, check_choice
from .baseline import Baseline, equal_scores, recent_tiers
from .scale_window import even_subsample


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class StreamingLLM(Baseline):
    """
    Keep the first scales, which soak up attention, and the last tokens of the sequence.

    Keys are not rotated anew, as they are for language models: a position is a place in a grid here, not in a sequence.

    Args:
        sinks (1 or 2, *optional*, defaults to 2):
            First scales, or lines, that always stay.
        recent (`"sequence"` or `"uniform"`, *optional*, defaults to `"sequence"`):
            What is recent of a scale that is kept in part: its last tokens, which are its bottom rows, or an even
            subsample of its grid.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "streaming_llm"
    source: ClassVar[str] = "arXiv 2309.17453"

    sinks: int = 2
    recent: str = "sequence"
    protocol: str = "post"

    def __post_init__(self):
        super().__post_init__()
        if self.sinks not in (1, 2):
            raise ValueError(f"`sinks` must be 1 or 2 but is {self.sinks}.")
        check_choice("recent", self.recent, ("sequence", "uniform"))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        if geometry.schedule.raster:
            # One recent line beside the sinks.
            return sum(geometry.schedule.lengths[: self.sinks + 1])
        return super().min_budget(geometry, profile)

    def rank(self, view: StepView) -> Ranking:
        # No budget is smaller than the first scales and one token, so these are still the first that are present.
        sinks = min(sum(view.schedule.lengths[: self.sinks]), view.num_present)
        room = max(0, view.num_kept - sinks)
        tiers = recent_tiers(view, room, sinks)
        size = view.schedule.sizes[view.step]
        if self.recent == "uniform" and room < view.key.shape[2]:
            tiers[sinks:] = 0
            # A scale that is a sink itself is whole before there is a choice.
            tiers[view.num_stored + torch.tensor(spread_positions(size, room), dtype=torch.long)] = 1
        return Ranking(equal_scores(view), tiers)


@lru_cache(maxsize=256)
def spread_positions(size: tuple[int, int], count: int) -> tuple[int, ...]:
    """[`even_subsample`], remembered: every layer asks for the same one."""
    return tuple(even_subsample(size, count))
