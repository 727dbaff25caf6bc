"""The cache that watches: it attends as the full cache does, and records what the heads attend to."""

import torch

from ..locality import NearTokens
from ..profiles.statistics import TOP_COUNTS, statistic_shapes
from ..schedule import Schedule
from .cache import FullCache, joined


# 64 MiB of float32: what a chunk of attention rows may take, whatever the number of keys. A few such tensors are alive.
MAX_CHUNK_ELEMENTS = 2**24


class RecordingCache(FullCache):
    """
    Attends exactly as [`FullCache`] and records statistics of the attention of the conditional rows, image by image.

    `statistics` holds one float64 array on the CPU for each name of [`statistic_shapes`], with the images as an extra
    first dimension; entries of steps that were not drawn are zero. The attention matrix of a step never exists as a whole.

    Args:
        schedule (`Schedule`):
            The scales.
        num_layers (`int`):
            Self-attention layers of the model.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance, which are not recorded.
        query_chunk (`int`, *optional*, defaults to 256):
            Queries that are looked at together, fewer where their attention would take more than 64 MiB.
    """

    def __init__(self, schedule: Schedule, num_layers: int, guided: bool = False, query_chunk: int = 256):
        if query_chunk < 1:
            raise ValueError(f"`query_chunk` must be at least 1 but is {query_chunk}.")
        self.query_chunk = query_chunk
        super().__init__(schedule, num_layers, guided)

    def reset(self):
        super().reset()
        self.statistics: dict[str, torch.Tensor] = {}
        self.dtype: torch.dtype | None = None

    def _attend(self, layer_idx, step, query, key, value, call):
        self._record(layer_idx, step, query, key, value, call.scale)
        return super()._attend(layer_idx, step, query, key, value, call)

    @torch.no_grad()
    def _record(
        self, layer_idx: int, step: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ):
        images = len(query) // 2 if self.guided else len(query)
        query, key, value = query[:images], key[:images], value[:images]
        if not self.statistics:
            self.dtype = query.dtype
            shapes = statistic_shapes(self.num_layers, query.shape[1], len(self.schedule))
            self.statistics = {
                name: torch.zeros(images, *shape, dtype=torch.float64) for name, shape in shapes.items()
            }
        stored = self.keys[layer_idx]
        if stored is not None:
            key = joined(stored[:images], key)
        found = attention_statistics(query, key, self.schedule, step, scale, self.query_chunk)
        found["vnorm"] = value.float().norm(dim=-1).mean(-1)
        for name, values in found.items():
            self.statistics[name][:, layer_idx, :, step] = values.cpu().double()


def attention_statistics(
    query: torch.Tensor, key: torch.Tensor, schedule: Schedule, step: int, scale: float = 1.0, query_chunk: int = 256
) -> dict[str, torch.Tensor]:
    """
    Statistics of the attention of one layer and step, all that [`statistic_shapes`] names but `vnorm`.

    Args:
        query (`torch.Tensor`):
            `[rows, heads, n_k, head_dim]`, the queries of the step as attention reads them.
        key (`torch.Tensor`):
            `[rows, heads, T_k, head_dim]`, all keys up to and including the step.
        schedule (`Schedule`):
            The scales.
        step (`int`):
            Index of the scale, from 0.
        scale (`float`, *optional*, defaults to 1.0):
            Factor of the logits.
        query_chunk (`int`, *optional*, defaults to 256):
            Queries that are looked at together, at most.

    Returns:
        `dict[str, torch.Tensor]`: `[rows, heads, ...]` by name.
    """
    rows, heads, queries, _ = query.shape
    chunk = max(1, min(query_chunk, MAX_CHUNK_ELEMENTS // (rows * heads * key.shape[2])))
    key = key.float().transpose(-1, -2)
    sums = AttentionSums(schedule, step, query.device)
    # Autocast would take the product of float32 tensors in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, queries, chunk):
            logits = (query[:, :, start : start + chunk].float() @ key).mul_(scale)
            sums.add(logits.softmax(-1), start)
    return sums.means()


class AttentionSums:
    """
    Sums over the queries of one layer and step, chunk by chunk.

    The variance of the columns is `mean |A_i|^2 - |mean A_i|^2` over queries `i`, taken of `A_i - p` with the mean row `p`
    of the first chunk: that leaves the value unchanged but keeps the difference from cancelling in contextual heads, whose
    rows are almost equal.
    """

    def __init__(self, schedule: Schedule, step: int, device: torch.device):
        self.schedule = schedule
        self.step = step
        self.prefix = schedule.prefixes[step]
        # Apple's GPUs have no float64.
        self.precision = torch.float32 if device.type == "mps" else torch.float64
        self.near = NearTokens(schedule, step, device)
        self.queries = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, attention: torch.Tensor, start: int):
        """
        Take in the attention `[rows, heads, queries, T_k]` of the queries from position `start` on; it is overwritten.
        """
        queries = attention.shape[2]
        if not self.queries:
            self.pivot = attention.mean(2, keepdim=True)
        by_query = {
            "topk_hist": self._top_mass(attention),
            "local": self._local_mass(attention, start),
            "entropy": torch.special.entr(attention).sum(-1),
        }
        centred = attention.sub_(self.pivot)
        columns = centred.sum(2).to(self.precision)
        by_query["squares"] = centred.square_().sum(-1)
        totals = {name: values.to(self.precision).sum(2) for name, values in by_query.items()}
        totals["columns"] = columns
        self.sums = {name: self.sums.get(name, 0) + total for name, total in totals.items()}
        self.queries += queries

    def means(self) -> dict[str, torch.Tensor]:
        """The statistics, means over the queries."""
        means = {name: total / self.queries for name, total in self.sums.items()}
        offset = means.pop("columns")
        means["colvar"] = (means.pop("squares") - offset.square().sum(-1)).clamp_min(0)
        columns = (offset + self.pivot.squeeze(2)).split(self.schedule.lengths[: self.step + 1], dim=-1)
        means["mass"] = torch.zeros(*offset.shape[:2], len(self.schedule), dtype=offset.dtype, device=offset.device)
        for source, part in enumerate(columns):
            means["mass"][..., source] = part.sum(-1)
        return means

    def _top_mass(self, attention: torch.Tensor) -> torch.Tensor:
        """Mass of the largest entries of earlier scales, `[rows, heads, queries, len(TOP_COUNTS)]`."""
        if not self.prefix:
            return attention.new_zeros(*attention.shape[:3], len(TOP_COUNTS))
        largest = attention[..., : self.prefix].topk(min(max(TOP_COUNTS), self.prefix), dim=-1).values
        return largest.cumsum(-1)[..., [min(count, self.prefix) - 1 for count in TOP_COUNTS]]

    def _local_mass(self, attention: torch.Tensor, start: int) -> torch.Tensor:
        """Mass of the tokens near their query, `[rows, heads, queries, len(LOCAL_RADII)]`."""
        masks = self.near.masks(start, attention.shape[2])
        return torch.stack([(attention * near).sum(-1) for near in masks], dim=-1)
