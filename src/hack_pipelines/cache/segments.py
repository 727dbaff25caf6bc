"""The cache for plans that drop whole scales of single heads: all layers share one arena."""

import numpy as np
import torch

from ..methods.segment_plan import SegmentPlan
from .arena import SlotMap
from .attention import attention
from .cache import Cache, joined
from .storage import PlainStorage, Planes, Storage


class SegmentCache(Cache):
    """
    Holds keys and values of all layers in one arena, whose slots serve one layer after another.

    The arena is as large as what is stored at the worst checkpoint, so what is allocated is what the plan accounts for. It
    is allocated when the first scale is stored, and freed after the last layer of the last scale. Heads that read the same
    number of tokens are attended to together. As long as nothing is missing these are all heads of a layer, and the results
    are those of [`FullCache`] to the last bit.

    Args:
        plan ([`SegmentPlan`]):
            Which scales every head reads and stores, by layer and step.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance.
        storage (`Storage`, *optional*):
            The form in which keys and values are held; as attention reads them by default.
    """

    def __init__(self, plan: SegmentPlan, guided: bool = False, storage: Storage | None = None):
        self.plan = plan
        self.storage = storage or PlainStorage()
        self.slot_map = SlotMap(plan)
        super().__init__(plan.schedule, len(plan.layers), guided)

    def reset(self):
        super().reset()
        self.key_arena: Planes = ()
        self.value_arena: Planes = ()
        self._stored_tokens = [0] * self.num_layers

    def _tensors(self, layer_idx):
        return self._views(layer_idx, slice(0, 1))

    def _metadata(self, layer_idx):
        return self._views(layer_idx, slice(1, None))

    def _views(self, layer_idx: int, planes: slice):
        """
        Views of the arena of as many tokens as a layer holds. Those who measure read their shapes and the storage behind
        them, not which slots they are.
        """
        for arena in (self.key_arena, self.value_arena):
            for plane in arena[planes]:
                yield plane[:, None, : self._stored_tokens[layer_idx]]

    def _attend(self, layer_idx, step, query, key, value, scale):
        lengths = self.plan.layers[layer_idx].attend[step]
        together: dict[int, list[int]] = {}
        for head, count in enumerate(lengths):
            together.setdefault(count, []).append(head)
        if len(together) == 1:
            output = self._attend_heads(layer_idx, step, list(range(len(lengths))), (query, key, value), scale)
        else:
            output = torch.empty_like(query)
            for heads in together.values():
                index = torch.tensor(heads, device=query.device)
                own = tuple(part.index_select(1, index) for part in (query, key, value))
                output.index_copy_(1, index, self._attend_heads(layer_idx, step, heads, own, scale))
        self._store(layer_idx, step, key, value)
        if step == len(self.schedule) - 1 and layer_idx == self.num_layers - 1:
            self.key_arena = self.value_arena = ()
        return output, sum(lengths)

    def _attend_heads(
        self, layer_idx: int, step: int, heads: list[int], current: tuple[torch.Tensor, ...], scale: float
    ) -> torch.Tensor:
        """Attention of heads that read equally many tokens; `current` are their own queries, keys and values."""
        query, key, value = current
        history = [(head, self.plan.read(layer_idx, step, head)) for head in heads]
        if not history[0][1]:
            return attention(query, joined(None, key), joined(None, value), scale)
        slots = on_device(self.slot_map.slots(layer_idx, history), key.device)
        # Without names for what is gathered, so that the keys' copies are gone before values are.
        key = joined(self._gathered(self.key_arena, slots, key), key)
        value = joined(self._gathered(self.value_arena, slots, value), value)
        return attention(query, key, value, scale)

    def _gathered(self, arena: Planes, slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Tokens of some slots, `[rows, heads, tokens, head_dim]`, as attention reads them."""
        rows, heads = like.shape[:2]
        planes = (plane.index_select(1, slots).view(rows, heads, -1, plane.shape[-1]) for plane in arena)
        return self.storage.decode(tuple(planes), like.dtype)

    def _store(self, layer_idx: int, step: int, key: torch.Tensor, value: torch.Tensor):
        """Write what a later step reads of the current scale; slots of what none reads any more are free already."""
        self._stored_tokens[layer_idx] = sum(self.plan.layers[layer_idx].store[step])
        heads = [head for head in range(key.shape[1]) if self.plan.stores(layer_idx, step, head)]
        if not heads:
            return
        slots = on_device(self.slot_map.slots(layer_idx, ((head, (step,)) for head in heads)), key.device)
        if len(heads) < key.shape[1]:
            index = torch.tensor(heads, device=key.device)
            key, value = key.index_select(1, index), value.index_select(1, index)
        self.key_arena = self._written(self.key_arena, slots, key)
        self.value_arena = self._written(self.value_arena, slots, value)

    def _written(self, arena: Planes, slots: torch.Tensor, tensor: torch.Tensor) -> Planes:
        """The arena after tokens `[rows, heads, tokens, head_dim]` went into some slots; a new one where there is none."""
        planes = self.storage.encode(tensor)
        if not arena:
            arena = tuple(plane.new_empty(len(plane), self.slot_map.capacity, plane.shape[-1]) for plane in planes)
        for own, plane in zip(arena, planes):
            own.index_copy_(1, slots, plane.flatten(1, 2))
        return arena


def on_device(slots: np.ndarray, device: torch.device) -> torch.Tensor:
    """Slots as an index, made when it is needed and dropped afterwards: those of all layers and steps would add up."""
    return torch.from_numpy(slots).to(device).long()
