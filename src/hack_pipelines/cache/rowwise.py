"""Rows of a batch whose plans differ: a cache for each."""

from collections.abc import Callable
from itertools import chain

import torch

from ..schedule import Schedule
from .cache import Cache


class RowwiseCache(Cache):
    """
    Gives every row of the batch a cache of its own, for methods whose plans depend on what is drawn.

    Args:
        schedule (`Schedule`):
            The scales.
        num_layers (`int`):
            Self-attention layers of the model.
        make_cache (`Callable[[], Cache]`):
            Makes the cache of one row.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance.
        wants_projection (`bool`, *optional*, defaults to `False`):
            Whether the rows' caches read the bare projections of the queries.
    """

    def __init__(
        self,
        schedule: Schedule,
        num_layers: int,
        make_cache: Callable[[], Cache],
        guided: bool = False,
        wants_projection: bool = False,
    ):
        self.make_cache = make_cache
        self.wants_projection = wants_projection
        super().__init__(schedule, num_layers, guided)

    def reset(self):
        super().reset()
        self.rows: list[Cache] = []

    def _attend(self, layer_idx, step, query, key, value, call):
        if not self.rows:
            self.rows = [self.make_cache() for _ in range(len(query))]
        outputs, attended = [], 0
        for index, cache in enumerate(self.rows):
            own = slice(index, index + 1)
            output, count = cache._attend(layer_idx, step, query[own], key[own], value[own], call.of_rows(own))
            outputs.append(output)
            attended += count
        return torch.cat(outputs), attended / len(self.rows)

    def _tensors(self, layer_idx):
        return chain.from_iterable(cache._tensors(layer_idx) for cache in self.rows)

    def _metadata(self, layer_idx):
        return chain.from_iterable(cache._metadata(layer_idx) for cache in self.rows)
