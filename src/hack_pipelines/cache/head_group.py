"""The cache that compresses: heads of equal length are stored and attended to together."""

from dataclasses import dataclass

import torch

from ..methods.base import Method, Plan, StepView
from ..methods.selection import count_before, top
from .attention import attention
from .cache import Cache, joined


KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass
class HeadGroup:
    """Heads of one layer that hold the same number of tokens; keys and values are `[rows, heads, tokens, head_dim]`."""

    heads: tuple[int, ...]
    label: str
    index: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class HeadGroupCache(Cache):
    """
    Holds what a method keeps: a few groups of heads a layer, each one contiguous tensor without padding or mask.

    A plan gives the lengths, a method the ranking; this class selects, frees, attends and counts. As long as nothing has
    to go, all heads stay together and the results are those of [`FullCache`] to the last bit.

    Args:
        plan (`Plan`):
            Lengths of every layer, group and step.
        method (`Method`):
            Ranks the tokens when some have to go.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance.
    """

    def __init__(self, plan: Plan, method: Method, guided: bool = False):
        self.plan = plan
        self.method = method
        super().__init__(plan.schedule, len(plan.layers), guided)

    def reset(self):
        super().reset()
        self.groups: list[list[HeadGroup]] = [[] for _ in range(self.num_layers)]
        self._non_finite: dict[torch.device, torch.Tensor] = {}

    def _tensors(self, layer_idx):
        return (tensor for group in self.groups[layer_idx] for tensor in (group.key, group.value))

    def _attend(self, layer_idx, step, query, key, value, scale):
        if not self.groups[layer_idx]:
            self.groups[layer_idx] = [self._whole(layer_idx, key, value)]
        groups = self.groups[layer_idx] = self._split(layer_idx, step)
        plan = self.plan.layers[layer_idx]
        lengths = list(zip(groups, plan.attend[step], plan.store[step]))
        if len(groups) == 1:
            _, attend, store = lengths[0]
            output = self._attend_group(layer_idx, step, groups[0], (query, key, value), scale, attend, store)
        else:
            output = torch.empty_like(query)
            for group, attend, store in lengths:
                # A name for what is copied would keep it alive through the next group's attention.
                output.index_copy_(
                    1,
                    group.index,
                    self._attend_group(layer_idx, step, group, (query, key, value), scale, attend, store),
                )
        if step == len(self.schedule) - 1:
            self.groups[layer_idx] = []
        if layer_idx == self.num_layers - 1:
            self._check_finite()
        return output, sum(len(group.heads) * attend for group, attend, _ in lengths)

    def _whole(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> HeadGroup:
        """All heads of a layer in one group, without a history yet."""
        plan = self.plan.layers[layer_idx]
        heads = tuple(range(key.shape[1]))
        label = plan.labels[0] if len(plan.groups) == 1 else ""
        return HeadGroup(heads, label, torch.tensor(heads, device=key.device), key[:, :, :0], value[:, :, :0])

    def _split(self, layer_idx: int, step: int) -> list[HeadGroup]:
        """The layer's groups: all heads together until lengths differ, because one call is exact and faster."""
        groups, plan = self.groups[layer_idx], self.plan.layers[layer_idx]
        if len(groups) == len(plan.groups):
            return groups
        whole = groups[0]
        present = whole.key.shape[2] + self.schedule.lengths[step]
        stored = present if step < len(self.schedule) - 1 else 0
        if all(count == present for count in plan.attend[step]) and all(count == stored for count in plan.store[step]):
            return groups
        split = []
        for heads, label in zip(plan.groups, plan.labels):
            index = torch.tensor(heads, device=whole.key.device)
            parts = whole.key.index_select(1, index), whole.value.index_select(1, index)
            split.append(HeadGroup(heads, label, index, *parts))
        return split

    def _attend_group(
        self,
        layer_idx: int,
        step: int,
        group: HeadGroup,
        current: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        attend: int,
        store: int,
    ) -> torch.Tensor:
        """Attention of one group, which afterwards holds `store` tokens; `current` are all heads' queries, keys and values."""
        if len(group.heads) < current[0].shape[1]:
            query, key, value = (part.index_select(1, group.index) for part in current)
        else:
            query, key, value = current
        view = StepView(
            schedule=self.schedule,
            step=step,
            layer=layer_idx,
            heads=group.heads,
            label=group.label,
            budget=self.plan.budget,
            query=query,
            key=key,
            value=value,
            stored_key=group.key,
            stored_value=group.value,
            scale=scale,
            guided=self.guided,
        )
        seen, (group.key, group.value) = self._selected(view, attend, store)
        # These are the last to hold the old history and copies of the current tokens: attention runs without them.
        del view, key, value
        return attention(query, *seen, scale)

    def _selected(self, view: StepView, attend: int, store: int) -> tuple[KeyValue, KeyValue]:
        """Keys and values that a group attends to, and those that it holds afterwards."""
        present = view.num_present
        if attend < present or 0 < store < present:
            scores, tiers = self.method.rank(view)
            self._note_finite(scores)
        if attend < present:
            kept = top(scores, attend, tiers)
            seen = self.method.merge(view, kept, *kept_of(view, kept, tiers))
        else:
            seen = joined(view.stored_key, view.key), joined(view.stored_value, view.value)
        if store == 0:
            return seen, (view.key[:, :, :0].clone(), view.value[:, :, :0].clone())
        if store == attend:
            return seen, seen
        return seen, kept_of(view, top(scores, store, tiers), tiers)

    def _note_finite(self, scores: torch.Tensor):
        """Remember on the device whether a score was not finite: asking at once would wait for a GPU at every layer."""
        bad = ~torch.isfinite(scores).all()
        known = self._non_finite.get(bad.device)
        self._non_finite[bad.device] = bad if known is None else known | bad

    def _check_finite(self):
        if any(bool(bad) for bad in self._non_finite.values()):
            raise ValueError(
                f"Method {self.method.name!r} got scores that are not finite. The model's keys or values overflowed: "
                "use a dtype with a larger range (bfloat16 or float32)."
            )


def kept_of(view: StepView, kept: torch.Tensor, tiers: torch.Tensor | None) -> KeyValue:
    """Keys and values at the positions that `top` took with these tiers."""
    num_old = count_before(view.num_stored, kept.shape[2], view.num_present, tiers)
    return gathered(view.stored_key, view.key, kept, num_old), gathered(view.stored_value, view.value, kept, num_old)


def gathered(
    stored: torch.Tensor, current: torch.Tensor, kept: torch.Tensor, num_old: int | None = None
) -> torch.Tensor:
    """
    Tokens at some positions of history and current tokens together, without joining the two.

    Args:
        stored, current (`torch.Tensor`):
            `[rows, heads, tokens, head_dim]`.
        kept (`torch.Tensor`):
            Positions `[rows, heads, kept]`, ascending, counted through history and then the current tokens.
        num_old (`int`, *optional*):
            How many of them lie in the history, where that is the same for every row and head.
    """
    count = stored.shape[2]
    if num_old is None:
        # Both parts are read for every position: which of the two is right differs by row and head.
        old = tokens_at(stored, kept.clamp_max(count - 1))
        new = tokens_at(current, (kept - count).clamp_min(0))
        return torch.where(kept.unsqueeze(-1) < count, old, new)
    if num_old == 0:
        return tokens_at(current, kept - count)
    old = stored if num_old == count else tokens_at(stored, kept[..., :num_old])
    num_new = kept.shape[2] - num_old
    new = current if num_new == current.shape[2] else tokens_at(current, kept[..., num_old:] - count)
    return joined(old, new)


def tokens_at(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[rows, heads, positions, head_dim]`, copied a token at a time: `gather` would go channel by channel."""
    rows, heads, tokens, head_dim = tensor.shape
    starts = torch.arange(0, rows * heads * tokens, tokens, device=tensor.device).view(rows, heads, 1)
    return (
        tensor.reshape(-1, head_dim).index_select(0, (positions + starts).flatten()).view(*positions.shape, head_dim)
    )
