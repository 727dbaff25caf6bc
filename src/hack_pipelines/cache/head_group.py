"""The cache that compresses: heads of equal length are stored and attended to together."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..methods.base import Method, Plan, Ranking, StepView
from ..methods.selection import count_before, top
from .attention import AttentionCall, attention
from .cache import Cache, joined
from .checks import check_held, check_ranking
from .storage import PlainStorage, Planes, Storage


KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Held:
    """
    What heads hold of their tokens; every plane is `[rows, heads, tokens, ...]`.

    Args:
        key, value (`Planes`):
            Keys and values in their stored form.
        ids (`Planes`):
            Ids of the tokens, where the method reads them and a token has left; nothing otherwise.
        carried (`Planes`):
            Numbers that the method gave the tokens to carry; nothing for methods that do not.
    """

    key: Planes
    value: Planes
    ids: Planes = ()
    carried: Planes = ()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Held":
        """The same of all planes."""
        return Held(*(tuple(map(function, getattr(self, part.name))) for part in fields(self)))


@dataclass
class HeadGroup:
    """Heads of one layer that hold the same number of tokens."""

    heads: tuple[int, ...]
    label: str
    index: torch.Tensor
    held: Held


@dataclass
class Choice:
    """
    Some of the present tokens.

    Args:
        tokens (`tuple[torch.Tensor, torch.Tensor]`):
            Their keys and values, as attention reads them.
        kept (`torch.Tensor`, *optional*):
            Where they were, `[rows, heads, kept]`, ascending; `None` is everywhere.
        num_old (`int`, *optional*):
            How many of them lie in the history, where that is the same for every row and head.
        merged (`bool`):
            Whether others were folded into them.
    """

    tokens: KeyValue
    kept: torch.Tensor | None = None
    num_old: int | None = None
    merged: bool = False

    def of(self, stored: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """The same tokens of history and current tokens of another plane, `[rows, heads, tokens, channels]`."""
        if self.kept is None:
            return joined(stored, current)
        return gathered(stored, current, self.kept, self.num_old)

    def of_present(self, values: torch.Tensor) -> torch.Tensor:
        """The same tokens of a tensor of all that are present, `[rows, heads, present]`."""
        return values.clone() if self.kept is None else values.gather(-1, self.kept)


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
        storage (`Storage`, *optional*):
            The form in which keys and values are held; as attention reads them by default.
    """

    def __init__(self, plan: Plan, method: Method, guided: bool = False, storage: Storage | None = None):
        self.plan = plan
        self.method = method
        self.storage = storage or PlainStorage()
        self.wants_projection = method.needs_projection
        super().__init__(plan.schedule, len(plan.layers), guided)

    def reset(self):
        super().reset()
        self.layer_plans = list(self.plan.layers)
        self._replanned = False
        self.groups: list[list[HeadGroup]] = [[] for _ in range(self.num_layers)]
        self._tables: dict[torch.device, dict[str, torch.Tensor]] = {}
        self._non_finite: dict[torch.device, torch.Tensor] = {}

    def _tensors(self, layer_idx):
        return (planes[0] for group in self.groups[layer_idx] for planes in (group.held.key, group.held.value))

    def _metadata(self, layer_idx):
        for group in self.groups[layer_idx]:
            held = group.held
            yield from (*held.key[1:], *held.value[1:], *held.ids, *held.carried)

    def _attend(self, layer_idx, step, query, key, value, call):
        current = query, key, value
        if not self.groups[layer_idx]:
            self.groups[layer_idx] = [self._whole(layer_idx, key, value)]
            if key.device not in self._tables:
                self._tables[key.device] = {name: table.to(key.device) for name, table in self.plan.tables.items()}
        if self.method.plans_by_row:
            self._replan(layer_idx, step, current, call)
            if layer_idx == self.num_layers - 1 and self._replanned:
                check_held(self.method, self.plan.budget, self.layer_plans, range(step, len(self.schedule)))
                self._replanned = False
        groups = self.groups[layer_idx] = self._split(layer_idx, step)
        plan = self.layer_plans[layer_idx]
        lengths = list(zip(groups, plan.attend[step], plan.store[step]))
        if len(groups) == 1:
            _, attend, store = lengths[0]
            output = self._attend_group(layer_idx, step, groups[0], current, call, attend, store)
        else:
            output = torch.empty_like(query)
            for group, attend, store in lengths:
                # A name for what is copied would keep it alive through the next group's attention.
                output.index_copy_(
                    1, group.index, self._attend_group(layer_idx, step, group, current, call, attend, store)
                )
        if step == len(self.schedule) - 1:
            self.groups[layer_idx] = []
        if layer_idx == self.num_layers - 1:
            self._check_finite()
        return output, sum(len(group.heads) * attend for group, attend, _ in lengths)

    def _whole(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> HeadGroup:
        """All heads of a layer in one group, without a history yet."""
        plan = self.layer_plans[layer_idx]
        heads = tuple(range(key.shape[1]))
        label = plan.labels[0] if len(plan.groups) == 1 else ""
        held = Held(*(self.storage.encode(part[:, :, :0]) for part in (key, value)))
        return HeadGroup(heads, label, torch.tensor(heads, device=key.device), held)

    def _replan(self, layer_idx: int, step: int, current: tuple[torch.Tensor, ...], call: AttentionCall):
        """Let a method that looks at the heads first change what is planned for them, while they are still together."""
        groups = self.groups[layer_idx]
        if len(groups) > 1:
            return
        plan = self.layer_plans[layer_idx]
        view = self._view(layer_idx, step, groups[0], current, call, plan.attend[step][0], plan.store[step][0])
        changed = self.method.replan(view, plan)
        if changed is not None:
            self.layer_plans[layer_idx] = changed
            self._replanned = True

    def _split(self, layer_idx: int, step: int) -> list[HeadGroup]:
        """The layer's groups: all heads together until lengths differ, because one call is exact and faster."""
        groups, plan = self.groups[layer_idx], self.layer_plans[layer_idx]
        if len(groups) == len(plan.groups):
            return groups
        whole = groups[0]
        present = whole.held.key[0].shape[2] + self.schedule.lengths[step]
        stored = present if step < len(self.schedule) - 1 else 0
        if all(count == present for count in plan.attend[step]) and all(count == stored for count in plan.store[step]):
            return groups
        split = []
        for heads, label in zip(plan.groups, plan.labels):
            index = torch.tensor(heads, device=whole.index.device)
            split.append(HeadGroup(heads, label, index, whole.held.map(lambda plane: plane.index_select(1, index))))
        return split

    def _view(
        self,
        layer_idx: int,
        step: int,
        group: HeadGroup,
        current: tuple[torch.Tensor, ...],
        call: AttentionCall,
        attend: int,
        store: int,
    ) -> StepView:
        """What the method is shown of a group; `current` are its own queries, keys and values."""
        query, key, value = current
        held, dtype, projection = group.held, value.dtype, call.projection
        if projection is not None and len(group.heads) < projection.shape[1]:
            projection = projection.index_select(1, group.index)
        return StepView(
            schedule=self.schedule,
            step=step,
            layer=layer_idx,
            heads=group.heads,
            label=group.label,
            budget=self.plan.budget,
            query=query,
            key=key,
            value=value,
            stored_key=self.storage.decode(held.key, dtype),
            stored_value=self.storage.decode(held.value, dtype),
            attend=attend,
            store=store,
            scale=call.scale,
            guided=self.guided,
            stored_ids=held.ids[0].squeeze(-1) if held.ids else None,
            stored_carried=held.carried[0].squeeze(-1) if held.carried else None,
            tables={
                name: table[layer_idx].index_select(0, group.index)
                for name, table in self._tables[query.device].items()
            },
            projection=projection,
            without_ids=None if self.method.needs_ids else self.method.name,
        )

    def _attend_group(
        self,
        layer_idx: int,
        step: int,
        group: HeadGroup,
        current: tuple[torch.Tensor, ...],
        call: AttentionCall,
        attend: int,
        store: int,
    ) -> torch.Tensor:
        """Attention of one group, which afterwards holds `store` tokens; `current` are all heads' queries, keys and values."""
        if len(group.heads) < current[0].shape[1]:
            current = tuple(part.index_select(1, group.index) for part in current)
        query = current[0]
        view = self._view(layer_idx, step, group, current, call, attend, store)
        seen, group.held = self._selected(view, group.held)
        # These are the last to hold the old history and copies of the current tokens: attention runs without them.
        del view, current
        return attention(query, *seen, call.scale, backend=call.backend)

    def _selected(self, view: StepView, held: Held) -> tuple[KeyValue, Held]:
        """Keys and values that a group attends to, and what it holds afterwards."""
        ranking = self._ranking(view)
        seen = self._choose(view, ranking, view.attend)
        if not view.store:
            return seen.tokens, Held(*(self.storage.encode(part[:, :, :0].clone()) for part in (view.key, view.value)))
        stored = seen
        if ranking is not None and ranking.store_scores is not None:
            stored = self._choose(view, ranking._replace(scores=ranking.store_scores), view.store)
        elif view.store != view.attend:
            stored = self._choose(view, ranking, view.store)
        return seen.tokens, self._held(view, held, ranking, stored)

    def _ranking(self, view: StepView) -> Ranking | None:
        """The method's ranking, where something has to go or to be carried."""
        present = view.num_present
        if not (view.attend < present or 0 < view.store < present or (view.store and self.method.carries_scores)):
            return None
        ranking = self.method.rank(view)
        check_ranking(self.method, view, ranking)
        for scores in ranking.scores, ranking.store_scores:
            if scores is not None:
                self._note_finite(scores)
        return ranking

    def _choose(self, view: StepView, ranking: Ranking | None, count: int) -> Choice:
        """The best tokens of a ranking; all that are present where they are as many."""
        if ranking is None or count == view.num_present:
            return Choice((joined(view.stored_key, view.key), joined(view.stored_value, view.value)))
        kept = top(ranking.scores, count, ranking.tiers)
        num_old = count_before(view.num_stored, count, view.num_present, ranking.tiers)
        tokens = kept_of(view, kept, num_old)
        merged = self.method.merge(view, kept, *tokens)
        return Choice(merged, kept, num_old, merged=merged[0] is not tokens[0])

    def _held(self, view: StepView, held: Held, ranking: Ranking | None, stored: Choice) -> Held:
        """What a group holds of the tokens that were chosen to be stored."""
        if self.storage.exact or stored.merged:
            key, value = (self.storage.encode(part) for part in stored.tokens)
        else:
            # Chosen in the form in which they were held: reading and writing them again would round once more.
            key, value = (
                tuple(stored.of(old, new) for old, new in zip(planes, self.storage.encode(current)))
                for planes, current in ((held.key, view.key), (held.value, view.value))
            )
        ids: Planes = ()
        if self.method.needs_ids and (held.ids or stored.kept is not None):
            ids = (stored.of_present(view.ids).to(id_dtype(self.schedule.total)).unsqueeze(-1),)
        carried: Planes = ()
        if ranking is not None and ranking.carried is not None:
            carried = (stored.of_present(ranking.carried).unsqueeze(-1),)
        return Held(key, value, ids, carried)

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


def id_dtype(total: int) -> torch.dtype:
    """The smallest dtype for ids below `total` that every device can index."""
    return torch.int16 if total <= torch.iinfo(torch.int16).max else torch.int32


def kept_of(view: StepView, kept: torch.Tensor, num_old: int | None) -> KeyValue:
    """Keys and values at some positions of the present tokens, of which `num_old` lie in the history, see [`gathered`]."""
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
    if not count:
        num_old = 0
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
