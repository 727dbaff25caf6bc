"""Which tokens of a schedule lie near each other."""

import torch

from .profiles.statistics import LOCAL_MIN_TOKENS, LOCAL_RADII
from .schedule import Schedule


class NearTokens:
    """
    Which tokens are `r`-local to a query: `|(y + 1/2) / h_k - (y_j + 1/2) / h_s| <= (r + 1/2) / h_s`, and the same across.

    Both sides are multiplied by `2 h_k h_s`, so that whole numbers decide.
    """

    def __init__(self, schedule: Schedule, step: int, device: torch.device):
        self.size = schedule.sizes[step]
        sizes = torch.tensor(schedule.sizes[: step + 1])
        lengths = torch.tensor(schedule.lengths[: step + 1])
        starts = torch.tensor(schedule.prefixes[: step + 1])
        places = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        self.heights, self.widths = (side.to(device) for side in sizes.repeat_interleave(lengths, dim=0).unbind(1))
        places = places.to(device)
        self.rows, self.columns = places // self.widths, places % self.widths
        self.counted = (lengths >= LOCAL_MIN_TOKENS).repeat_interleave(lengths).to(device)

    def masks(self, start: int, count: int) -> list[torch.Tensor]:
        """Boolean masks `[count, T_k]` of the queries from position `start` on, one for each of `LOCAL_RADII`."""
        height, width = self.size
        queries = torch.arange(start, start + count, device=self.rows.device).unsqueeze(1)
        down = ((2 * (queries // width) + 1) * self.heights - (2 * self.rows + 1) * height).abs()
        across = ((2 * (queries % width) + 1) * self.widths - (2 * self.columns + 1) * width).abs()
        return [
            (down <= (2 * radius + 1) * height) & (across <= (2 * radius + 1) * width) & self.counted
            for radius in LOCAL_RADII
        ]
