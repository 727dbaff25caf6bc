"""Scores from a window of observing queries, as SnapKV, PyramidKV and CAKE take them."""

import torch
import torch.nn.functional as F

from .base import Geometry, StepView


# A window is at most a quarter of the budget: one of 32 tokens is small for a text of thousands, but not here.
WINDOW_PART = 4
POOLING_KERNEL = 5


def check_window(window: int):
    """Refuse a window without a query."""
    if window < 1:
        raise ValueError(f"`window` must be at least 1 but is {window}.")


def min_window_budget(geometry: Geometry) -> int:
    """The smallest budget whose quarter is a window, and that holds more than the first two scales, or two lines."""
    return max(WINDOW_PART, sum(geometry.schedule.lengths[:2]) + (not geometry.schedule.raster))


def window_size(window: int, budget: int, tokens: int) -> int:
    """Queries of a step with so many tokens that observe: at most `window`, and at most a quarter of the budget."""
    return min(window, tokens, budget // WINDOW_PART)


def last_positions(view: StepView, count: int) -> torch.Tensor:
    """The last queries of a step in raster order, `[count]`."""
    tokens = view.query.shape[2]
    return torch.arange(tokens - count, tokens, device=view.query.device)


def window_tiers(view: StepView, positions: torch.Tensor) -> torch.Tensor:
    """Tiers of a step's tokens, `[present]`: 1 for the current ones at these positions, 0 for all others."""
    tiers = torch.zeros(view.num_present, dtype=torch.long)
    tiers[view.num_stored + positions.cpu()] = 1
    return tiers


def pooled(scores: torch.Tensor) -> torch.Tensor:
    """Mean over five neighbours in the sequence of all present tokens, with zeros beyond its ends."""
    return F.avg_pool1d(scores, POOLING_KERNEL, stride=1, padding=POOLING_KERNEL // 2)
