"""The plan of methods that drop whole scales of single heads, known before the first step."""

from dataclasses import dataclass, field

import numpy as np

from ..schedule import Schedule
from .base import LayerPlan, Plan


Lifetimes = tuple[tuple[tuple[int, ...], ...], ...]
"""A number for each layer, head and scale but the last."""


@dataclass(frozen=True)
class SegmentPlan(Plan):
    """
    Lengths as in any [`Plan`], with every head a group of its own, and which tokens they are: all of a scale, or none.

    It keeps its budget after each layer of a step, not only between steps.

    Args:
        until (`tuple[tuple[tuple[int, ...], ...], ...]`):
            First step that does not read a scale any more, `until[layer][head][scale]`. From the step after the scale's own
            on; that step itself where the scale is never stored. The last scale is not in it, because nothing reads it.
    """

    until: Lifetimes = field(kw_only=True, repr=False)

    @classmethod
    def from_lifetimes(cls, schedule: Schedule, budget: int, until: np.ndarray) -> "SegmentPlan":
        """
        The plan in which every head reads a scale in all steps before a given one.

        Args:
            schedule (`Schedule`):
                The scales.
            budget (`int`):
                Tokens that may stay stored, averaged over layers and heads.
            until (`np.ndarray`):
                Integers `[num_layers, num_heads, num_scales - 1]`, as in [`SegmentPlan`].
        """
        steps, lengths = len(schedule), np.array(schedule.lengths[:-1], dtype=np.int64)
        history = [(until[..., :step] > step) @ lengths[:step] for step in range(steps)]
        store = np.stack([*history[1:], np.zeros(until.shape[:2], np.int64)])
        attend = np.stack(history) + np.array(schedule.lengths)[:, None, None]
        groups = tuple((head,) for head in range(until.shape[1]))
        layers = tuple(
            LayerPlan(
                groups,
                tuple(str(head) for (head,) in groups),
                tuple(map(tuple, attend[:, layer].tolist())),
                tuple(map(tuple, store[:, layer].tolist())),
            )
            for layer in range(len(until))
        )
        return cls(schedule, budget, layers, until=tuple(tuple(map(tuple, heads)) for heads in until.tolist()))

    @property
    def checkpoint_peak(self) -> int:
        """The most tokens of all heads together that are stored after any layer of any step."""
        stored = np.array([[sum(counts) for counts in layer.store] for layer in self.layers])
        before = np.concatenate((np.zeros_like(stored[:, :1]), stored[:, :-1]), axis=1)
        return int((before.sum(0) + np.cumsum(stored - before, axis=0)).max())

    def strict(self) -> "SegmentPlan":
        """The plan itself, which keeps its budget at every checkpoint."""
        return self

    def read(self, layer: int, step: int, head: int) -> tuple[int, ...]:
        """Source scales that a head reads in a step, ascending, beside the current one."""
        return tuple(scale for scale, end in enumerate(self.until[layer][head][:step]) if end > step)

    def stores(self, layer: int, step: int, head: int) -> bool:
        """Whether a head stores the scale of a step."""
        return step < len(self.schedule) - 1 and self.until[layer][head][step] > step + 1
