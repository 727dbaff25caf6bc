"""The cache for plans that drop whole scales of single heads: all layers of a device share one arena."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..methods.segment_plan import SegmentPlan
from .arena import SlotMap
from .attention import AttentionCall, attention
from .cache import Cache, joined
from .storage import PlainStorage, Planes, Storage


@dataclass
class Arena:
    """
    Keys and values of the layers of one device.

    Args:
        slot_map ([`SlotMap`]):
            Which slots hold which tokens.
        parts (`list[Planes]`):
            Keys, then values; every plane is `[rows, slots, channels]`, and made when it is first written to.
    """

    slot_map: SlotMap
    parts: list[Planes] = field(default_factory=lambda: [(), ()])


class SegmentCache(Cache):
    """
    Holds keys and values of all layers of a device in one arena, whose slots serve one layer after another.

    An arena is as large as what its layers store at their worst checkpoint, so what is allocated is what the plan accounts
    for; with layers on several devices the sum of the arenas is larger where these checkpoints differ. Where layers are is
    known when all of them have attended once: until then the first scale is held by layer. The arenas are freed after the
    last layer of the last scale. Heads that read the same number of tokens are attended to together. As long as nothing is
    missing these are all heads of a layer, and the results are those of [`FullCache`] to the last bit.

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
        self._slot_maps: dict[tuple[int, ...], SlotMap] = {}
        super().__init__(plan.schedule, len(plan.layers), guided)

    def reset(self):
        super().reset()
        self.arenas: dict[torch.device, Arena] = {}
        self._first: dict[int, tuple[list[int], list[Planes]]] = {}
        self._devices: dict[int, torch.device] = {}
        self._stored_tokens = [0] * self.num_layers

    def _tensors(self, layer_idx):
        return self._views(layer_idx, slice(0, 1))

    def _metadata(self, layer_idx):
        return self._views(layer_idx, slice(1, None))

    def _views(self, layer_idx: int, planes: slice):
        """
        Views of as many slots as a layer holds tokens. Those who measure read their shapes and the storage behind them, not
        which slots they are.
        """
        parts: list[Planes] = []
        if layer_idx in self._first:
            _, parts = self._first[layer_idx]
        elif self.arenas:
            parts = self.arenas[self._devices[layer_idx]].parts
        for part in parts:
            for plane in part[planes]:
                yield plane[:, None, : self._stored_tokens[layer_idx]]

    def _attend(self, layer_idx, step, query, key, value, call):
        if step and not self.arenas:
            self._make_arenas()
        lengths = self.plan.layers[layer_idx].attend[step]
        together: dict[int, list[int]] = {}
        for head, count in enumerate(lengths):
            together.setdefault(count, []).append(head)
        if len(together) == 1:
            output = self._attend_heads(layer_idx, step, list(range(len(lengths))), (query, key, value), call)
        else:
            output = torch.empty_like(query)
            for heads in together.values():
                index = torch.tensor(heads, device=query.device)
                own = tuple(part.index_select(1, index) for part in (query, key, value))
                output.index_copy_(1, index, self._attend_heads(layer_idx, step, heads, own, call))
        self._store(layer_idx, step, key, value)
        if step == len(self.schedule) - 1 and layer_idx == self.num_layers - 1:
            self.arenas = {}
        return output, sum(lengths)

    def _attend_heads(
        self, layer_idx: int, step: int, heads: list[int], current: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> torch.Tensor:
        """Attention of heads that read equally many tokens; `current` are their own queries, keys and values."""
        query, key, value = current
        history = [(head, self.plan.read(layer_idx, step, head)) for head in heads]
        if not history[0][1]:
            return attention(query, joined(None, key), joined(None, value), call.scale, backend=call.backend)
        arena = self.arenas[key.device]
        slots = on_device(arena.slot_map.slots(layer_idx, history), key.device)
        # Without names for what is gathered, so that the keys' copies are gone before values are.
        key = joined(self._gathered(arena.parts[0], slots, key), key)
        value = joined(self._gathered(arena.parts[1], slots, value), value)
        return attention(query, key, value, call.scale, backend=call.backend)

    def _gathered(self, part: Planes, slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Tokens of some slots, `[rows, heads, tokens, head_dim]`, as attention reads them."""
        rows, heads = like.shape[:2]
        planes = (plane.index_select(1, slots).view(rows, heads, -1, plane.shape[-1]) for plane in part)
        return self.storage.decode(tuple(planes), like.dtype)

    def _make_arenas(self):
        """One for the layers of each device; what was stored so far goes into them."""
        for device in set(self._devices.values()):
            layers = tuple(layer for layer, own in self._devices.items() if own == device)
            if layers not in self._slot_maps:
                self._slot_maps[layers] = SlotMap(self.plan, layers)
            self.arenas[device] = Arena(self._slot_maps[layers])
        while self._first:
            layer_idx, (heads, parts) = self._first.popitem()
            arena = self.arenas[self._devices[layer_idx]]
            slots = self._slots(layer_idx, 0, heads)
            for index, part in enumerate(parts):
                arena.parts[index] = written(arena.parts[index], arena.slot_map.capacity, slots, part)

    def _store(self, layer_idx: int, step: int, key: torch.Tensor, value: torch.Tensor):
        """Write what a later step reads of the current scale; slots of what none reads any more are free already."""
        self._devices[layer_idx] = key.device
        self._stored_tokens[layer_idx] = sum(self.plan.layers[layer_idx].store[step])
        heads = [head for head in range(key.shape[1]) if self.plan.stores(layer_idx, step, head)]
        if not heads:
            return
        if len(heads) < key.shape[1]:
            chosen = torch.tensor(heads, device=key.device)
            key, value = key.index_select(1, chosen), value.index_select(1, chosen)
        if not step:
            self._first[layer_idx] = (
                heads,
                [tuple(plane.clone() for plane in self._encoded(tensor)) for tensor in (key, value)],
            )
            return
        arena, slots = self.arenas[key.device], self._slots(layer_idx, step, heads)
        for index, tensor in enumerate((key, value)):
            arena.parts[index] = written(arena.parts[index], arena.slot_map.capacity, slots, self._encoded(tensor))

    def _slots(self, layer_idx: int, step: int, heads: Sequence[int]) -> torch.Tensor:
        """Slots of the tokens of a scale in some heads."""
        device = self._devices[layer_idx]
        slots = self.arenas[device].slot_map.slots(layer_idx, ((head, (step,)) for head in heads))
        return on_device(slots, device)

    def _encoded(self, tensor: torch.Tensor) -> Planes:
        """Tokens `[rows, heads, tokens, head_dim]` as they are held, `[rows, heads * tokens, channels]`."""
        return tuple(plane.flatten(1, 2) for plane in self.storage.encode(tensor))


def written(part: Planes, capacity: int, slots: torch.Tensor, planes: Planes) -> Planes:
    """Part of an arena after tokens went into some slots; a new one of `capacity` slots where there is none."""
    if not part:
        part = tuple(plane.new_empty(len(plane), capacity, plane.shape[-1]) for plane in planes)
    for own, plane in zip(part, planes):
        own.index_copy_(1, slots, plane)
    return part


def on_device(slots: np.ndarray, device: torch.device) -> torch.Tensor:
    """Slots as an index, made when it is needed and dropped afterwards: those of all layers and steps would add up."""
    return torch.from_numpy(slots).to(device).long()
