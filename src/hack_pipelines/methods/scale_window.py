"""Coarsest and newest scales, after AMS-KV (arXiv 2511.16047): the best that needs neither data nor scores."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..schedule import Schedule
from .base import Ranking, StepView
from .baseline import Baseline


CONDENSED_SCALES = 2
# 1 / p and 1 / p^2 of the plastic number p: multiples of them fill the unit interval evenly along both axes of a grid.
PLASTIC_ROW, PLASTIC_COLUMN = 0.7548776662466927, 0.5698402909980532


@dataclass
class ScaleWindow(Baseline):
    """
    Keep the first two scales and whole scales from the newest backwards; the first that does not fit gives an even
    subsample of its grid.

    Args:
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "scale_window"
    source: ClassVar[str] = "the scale rule of arXiv 2511.16047"

    protocol: str = "post"

    def rank(self, view: StepView) -> Ranking:
        kept = kept_ids(view.schedule, view.budget, view.step)
        before = kept_ids(view.schedule, view.budget, view.step - 1) if view.step else frozenset()
        first = view.schedule.prefixes[view.step]
        present = sorted(before) + list(range(first, first + view.schedule.lengths[view.step]))
        scores = torch.tensor([float(token in kept) for token in present], device=view.query.device)
        return Ranking(scores.expand(*view.query.shape[:2], -1))


@lru_cache(maxsize=1024)
def kept_ids(schedule: Schedule, budget: int, step: int) -> frozenset[int]:
    """Ids that are kept after a step, out of all ids up to it."""
    prefixes, lengths = schedule.prefixes, schedule.lengths
    condensed = range(min(sum(lengths[:CONDENSED_SCALES]), prefixes[step] + lengths[step]))
    kept = set(condensed)
    room = budget - len(kept)
    for scale in range(step, CONDENSED_SCALES - 1, -1):
        size = min(room, lengths[scale])
        kept.update(prefixes[scale] + position for position in even_subsample(schedule.sizes[scale], size))
        room -= size
    return frozenset(kept)


def even_subsample(size: tuple[int, int], count: int) -> list[int]:
    """
    `count` raster positions spread evenly over a grid. A smaller count gives a subset of a larger one, so a scale can
    lose more tokens later.
    """
    height, width = size
    order = sorted(
        range(height * width),
        key=lambda position: (position // width * PLASTIC_ROW + position % width * PLASTIC_COLUMN) % 1.0,
    )
    return order[:count]
