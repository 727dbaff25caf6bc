"""Which slots of an arena hold which tokens, known before they are written."""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from ..methods.segment_plan import SegmentPlan


Pieces = tuple[tuple[int, int], ...]
"""Intervals of slots, each with its first slot and the one behind its last."""


class Segment(NamedTuple):
    """
    Tokens of one scale in one head of one layer, which live and die together.

    Args:
        layer, head, scale (`int`):
            Whose tokens.
        start, end (`int`):
            Checkpoints after which they are written and freed. Checkpoint `step * num_layers + layer` is the moment after
            the attention of a layer in a step.
        size (`int`):
            How many tokens.
    """

    layer: int
    head: int
    scale: int
    start: int
    end: int
    size: int


class SlotMap:
    """
    Slots of all that a plan ever stores of some layers, in an arena as large as what is stored at the worst checkpoint.

    Segments never move. Each takes the smallest free interval that it fits into (in the order of start, then end, larger
    ones first, as the released HeatKV does). One that fits into no interval is split over several, so that the arena has
    no slot too many: fragmentation is zero.

    Args:
        plan ([`SegmentPlan`]):
            What is stored when.
        layers (`Collection[int]`, *optional*):
            The layers that share the arena, all by default.
    """

    def __init__(self, plan: SegmentPlan, layers: Collection[int] | None = None):
        segments = segments_of(plan)
        if layers is not None:
            segments = [segment for segment in segments if segment.layer in layers]
        self.capacity = most_alive(segments)
        """Slots of the arena."""
        self._pieces = {
            (segment.layer, segment.head, segment.scale): pieces
            for segment, pieces in assigned(segments, self.capacity)
        }

    def pieces(self, layer: int, head: int, scale: int) -> Pieces:
        """Slots of one segment, which the plan must store."""
        return self._pieces[layer, head, scale]

    def slots(self, layer: int, heads: Iterable[tuple[int, Sequence[int]]]) -> np.ndarray:
        """
        Slots of some segments of a layer, one after the other, in int32.

        Args:
            layer (`int`):
                Index of the layer.
            heads (`Iterable[tuple[int, Sequence[int]]]`):
                Heads, each with its scales.
        """
        pieces = [piece for head, scales in heads for scale in scales for piece in self.pieces(layer, head, scale)]
        return np.concatenate([np.arange(*piece, dtype=np.int32) for piece in pieces])


def segments_of(plan: SegmentPlan) -> list[Segment]:
    """All that a plan ever stores."""
    layers = len(plan.layers)
    return [
        Segment(layer, head, scale, scale * layers + layer, (end - 1) * layers + layer, plan.schedule.lengths[scale])
        for layer, heads in enumerate(plan.until)
        for head, ends in enumerate(heads)
        for scale, end in enumerate(ends)
        if plan.stores(layer, scale, head)
    ]


def most_alive(segments: Sequence[Segment]) -> int:
    """The most slots that are taken after any checkpoint."""
    changes = np.zeros(max((segment.end for segment in segments), default=0) + 1, dtype=np.int64)
    for segment in segments:
        changes[segment.start] += segment.size
        changes[segment.end] -= segment.size
    return int(changes.cumsum().max())


def assigned(segments: Sequence[Segment], capacity: int) -> Iterable[tuple[Segment, Pieces]]:
    """Each segment with its slots, out of `capacity` of them."""
    free = FreeList(capacity)
    taken: list[tuple[int, Pieces]] = []
    for segment in sorted(segments, key=lambda segment: (segment.start, segment.end, -segment.size)):
        while taken and taken[0][0] <= segment.start:
            for piece in heappop(taken)[1]:
                free.give(*piece)
        pieces = free.take(segment.size)
        heappush(taken, (segment.end, pieces))
        yield segment, pieces


class FreeList:
    """
    Free slots as intervals, none of which touches another.

    Args:
        capacity (`int`):
            Slots, all of them free at first.
    """

    def __init__(self, capacity: int):
        self.starts: list[int] = []
        self.by_size: list[tuple[int, int]] = []
        self.sizes: dict[int, int] = {}
        if capacity:
            self._add(0, capacity)

    def take(self, size: int) -> Pieces:
        """
        So many slots: from the smallest interval that has them, else the largest one whole and the rest in the same way.

        Raises:
            `ValueError`: if fewer are free.
        """
        pieces = []
        while size:
            if not self.by_size:
                raise ValueError(f"{size} slots of the arena are missing.")
            place = min(bisect_left(self.by_size, (size, 0)), len(self.by_size) - 1)
            length, start = self.by_size[place]
            used = min(length, size)
            self._remove(start)
            if used < length:
                self._add(start + used, length - used)
            pieces.append((start, start + used))
            size -= used
        return tuple(pieces)

    def give(self, start: int, stop: int):
        """Free an interval, and join it with those that it touches."""
        place = bisect_left(self.starts, start)
        if place < len(self.starts) and self.starts[place] == stop:
            stop += self._remove(stop)
        if place and self.starts[place - 1] + self.sizes[self.starts[place - 1]] == start:
            start = self.starts[place - 1]
            self._remove(start)
        self._add(start, stop - start)

    def _add(self, start: int, size: int):
        insort(self.starts, start)
        insort(self.by_size, (size, start))
        self.sizes[start] = size

    def _remove(self, start: int) -> int:
        """Take an interval out of the list; its size."""
        size = self.sizes.pop(start)
        del self.starts[bisect_left(self.starts, start)]
        del self.by_size[bisect_left(self.by_size, (size, start))]
        return size
