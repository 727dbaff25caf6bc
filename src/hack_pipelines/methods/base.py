"""What a compression method is: it plans how much is kept, and ranks what is there."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from ..schedule import Schedule


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# Keys of a head, and queries, that are scored at once.
SCORED_KEYS = 1024
SCORED_QUERIES = 256
# Bytes of a token of a head beside its key and value.
ID_BYTES, SCORE_BYTES = 2, 4
PROTOCOLS = ("pre", "post", "decoupled", "static")


@dataclass(frozen=True)
class Geometry:
    """
    What a method may know of a model.

    Args:
        schedule (`Schedule`):
            The scales that will be drawn.
        num_layers (`int`):
            Self-attention layers.
        num_heads (`int`):
            Heads of a layer.
        head_dim (`int`):
            Channels of a head.
    """

    schedule: Schedule
    num_layers: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class LayerPlan:
    """
    Lengths of one layer's head groups, known before the first step.

    Args:
        groups (`tuple[tuple[int, ...], ...]`):
            Heads of every group; together each head once.
        labels (`tuple[str, ...]`):
            Name of every group, for the method's own use.
        attend (`tuple[tuple[int, ...], ...]`):
            Tokens that a head attends to, current ones included, by step and group.
        store (`tuple[tuple[int, ...], ...]`):
            Tokens that a head holds after the step, by step and group; 0 at the last step.
    """

    groups: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    attend: tuple[tuple[int, ...], ...]
    store: tuple[tuple[int, ...], ...]

    @classmethod
    def from_limits(
        cls,
        schedule: Schedule,
        groups: tuple[tuple[int, ...], ...],
        labels: tuple[str, ...],
        limits: Sequence[Sequence[int]],
        protocol: str,
    ) -> "LayerPlan":
        """
        A plan that holds at most `limits[k][g]` tokens for each head of group `g` after step `k`; `"pre"` attends to no
        more either.
        """
        attend: list[tuple[int, ...]] = []
        store: list[tuple[int, ...]] = []
        stored = (0,) * len(groups)
        for step, length in enumerate(schedule.lengths):
            present = tuple(count + length for count in stored)
            kept = tuple(min(count, limit) for count, limit in zip(present, limits[step]))
            attend.append(kept if protocol == "pre" else present)
            stored = kept if step < len(schedule) - 1 else (0,) * len(groups)
            store.append(stored)
        return cls(groups, labels, tuple(attend), tuple(store))


@dataclass(frozen=True)
class Plan:
    """
    Lengths of every layer, head group and step.

    Args:
        schedule (`Schedule`):
            The scales.
        budget (`int`):
            Tokens that may stay stored between steps, averaged over layers and heads.
        layers (`tuple[LayerPlan, ...]`):
            One entry a layer.
        tables (`Mapping[str, torch.Tensor]`, *optional*):
            What ranking needs of the profile, `[layers, heads, ...]` each; a step is shown the rows of its heads.
    """

    schedule: Schedule
    budget: int
    layers: tuple[LayerPlan, ...]
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        heads = {sum(len(group) for group in layer.groups) for layer in self.layers}
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)
        for step in range(len(self.schedule)):
            held = sum(
                len(group) * count for layer in self.layers for group, count in zip(layer.groups, layer.store[step])
            )
            allowed = self.budget * len(self.layers) * max(heads)
            if held > allowed:
                raise ValueError(
                    f"The plan holds {held} head-tokens after step {step} but the budget of {self.budget} allows {allowed}."
                )

    def strict(self) -> "Plan":
        """
        The plan that keeps its budget at every checkpoint too, not only between steps.

        Layers that grow in a step may commit before layers that shrink. Those layers, last ones first, store less after
        the step before, down to what they will hold anyway, until what is held fits after each layer of the step.
        """
        store = [[list(counts) for counts in layer.store] for layer in self.layers]
        sizes = [[len(group) for group in layer.groups] for layer in self.layers]
        allowed = self.budget * sum(map(sum, sizes))

        def held(layer: int, step: int) -> int:
            return sum(size * count for size, count in zip(sizes[layer], store[layer][step]))

        for step in range(len(self.schedule) - 1, 0, -1):
            total = sum(held(index, step - 1) for index in range(len(store)))
            worst = total
            for index in range(len(store)):
                total += held(index, step) - held(index, step - 1)
                worst = max(worst, total)
            excess = worst - allowed
            for index in range(len(store) - 1, -1, -1):
                for group, size in enumerate(sizes[index]):
                    spare = store[index][step - 1][group] - store[index][step][group]
                    if excess > 0 and spare > 0:
                        cut = min(spare, -(-excess // size))
                        store[index][step - 1][group] -= cut
                        excess -= cut * size
        layers = []
        for layer, counts in zip(self.layers, store):
            present = [
                [(counts[step - 1][group] if step else 0) + length for group in range(len(layer.groups))]
                for step, length in enumerate(self.schedule.lengths)
            ]
            attend = tuple(tuple(map(min, wanted, there)) for wanted, there in zip(layer.attend, present))
            layers.append(replace(layer, attend=attend, store=tuple(map(tuple, counts))))
        return replace(self, layers=tuple(layers))

    def _check_layer(self, index: int, layer: LayerPlan):
        heads = sorted(head for group in layer.groups for head in group)
        if heads != list(range(len(heads))) or any(list(group) != sorted(group) for group in layer.groups):
            raise ValueError(
                f"The groups of layer {index} must hold every head once, ascending, but are {layer.groups}."
            )
        stored = (0,) * len(layer.groups)
        for step, length in enumerate(self.schedule.lengths):
            present = [count + length for count in stored]
            stored = layer.store[step]
            if any(not 0 < a <= p or not 0 <= s <= p for a, s, p in zip(layer.attend[step], stored, present)):
                raise ValueError(
                    f"Layer {index} has {present} tokens a group at step {step}; the plan attends to "
                    f"{layer.attend[step]} and stores {stored} of them."
                )


@dataclass(frozen=True)
class StepView:
    """
    One head group of one layer in the middle of a step, before its attention.

    Args:
        schedule (`Schedule`):
            The scales.
        step (`int`):
            Index of the scale, from 0.
        layer (`int`):
            Index of the layer.
        heads (`tuple[int, ...]`):
            Heads of the group.
        label (`str`):
            Name of the group in the plan.
        budget (`int`):
            The plan's budget.
        query (`torch.Tensor`):
            `[rows, heads, n_k, head_dim]`, as attention reads it.
        key, value (`torch.Tensor`):
            Of the current scale, `[rows, heads, n_k, head_dim]`.
        stored_key, stored_value (`torch.Tensor`):
            History, `[rows, heads, stored, head_dim]`, in ascending id order.
        attend, store (`int`):
            Tokens that a head attends to in this step, and that it holds afterwards.
        scale (`float`):
            Factor of the logits.
        guided (`bool`):
            Whether the second half of the rows are the unconditional ones of guidance.
        stored_ids (`torch.Tensor`, *optional*):
            Ids of the history, `[rows, heads, stored]`, for methods that need them; `None` while nothing has left.
        stored_carried (`torch.Tensor`, *optional*):
            What the method's rankings of earlier steps gave each token of the history to carry, `[rows, heads, stored]` in
            float32.
        tables (`Mapping[str, torch.Tensor]`, *optional*):
            The plan's tables for these heads, `[heads, ...]` each.
        projection (`torch.Tensor`, *optional*):
            The bare projections of the queries, `[rows, heads, n_k, head_dim]`, for methods that need them.
        without_ids (`str`, *optional*):
            Name of the method, where it does not say `needs_ids`: the cache keeps no ids for it.
    """

    schedule: Schedule
    step: int
    layer: int
    heads: tuple[int, ...]
    label: str
    budget: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    stored_key: torch.Tensor
    stored_value: torch.Tensor
    attend: int
    store: int
    scale: float
    guided: bool
    stored_ids: torch.Tensor | None = None
    stored_carried: torch.Tensor | None = None
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    projection: torch.Tensor | None = None
    without_ids: str | None = None

    @property
    def num_stored(self) -> int:
        """Tokens of the history that are left."""
        return self.stored_key.shape[2]

    @property
    def num_present(self) -> int:
        """Tokens of the history that are left, and those of the current scale."""
        return self.num_stored + self.key.shape[2]

    @property
    def is_last(self) -> bool:
        """Whether this is the last scale."""
        return self.step == len(self.schedule) - 1

    @property
    def num_kept(self) -> int:
        """Tokens that the first selection of the step leaves: those attended to, or where that is all, those stored."""
        return self.attend if self.attend < self.num_present or not self.store else self.store

    @property
    def ids(self) -> torch.Tensor:
        """Ids of the present tokens, `[rows, heads, present]`, ascending; for methods with `needs_ids`."""
        if self.without_ids is not None:
            raise ValueError(f"Method {self.without_ids!r} reads `view.ids`: set `needs_ids = True` in its class.")
        rows, heads, count, _ = self.key.shape
        first = self.schedule.prefixes[self.step]
        stored = self.stored_ids
        if stored is None:
            stored = torch.arange(self.num_stored, device=self.key.device).expand(rows, heads, -1)
        current = torch.arange(first, first + count, device=self.key.device).expand(rows, heads, -1)
        return torch.cat((stored.long(), current), dim=-1)

    def attention_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Attention of some of the current queries to all present tokens.

        History and current keys are multiplied apart and a chunk at a time, so that they are never joined, nor copied to
        float32 as a whole.

        Args:
            positions (`torch.Tensor`):
                Which of the current queries, `[observed]`.

        Returns:
            `torch.Tensor`: `[rows, heads, observed, present]` in float32; rows sum to 1.
        """
        query = self.query[:, :, positions].float() * self.scale
        keys = [part for key in (self.stored_key, self.key) for part in key.split(SCORED_KEYS, dim=2)]
        logits = torch.cat([query @ key.float().transpose(-1, -2) for key in keys], dim=-1)
        return logits.softmax(-1)

    def attention_columns(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Attention that each present token gets from some of the current queries, summed over them.

        Args:
            positions (`torch.Tensor`):
                Which of the current queries, `[observed]`; they are taken a chunk at a time.

        Returns:
            `torch.Tensor`: `[rows, heads, present]` in float32.
        """
        parts = positions.split(SCORED_QUERIES)
        total = self.attention_rows(parts[0]).sum(2)
        for part in parts[1:]:
            total += self.attention_rows(part).sum(2)
        return total


class Ranking(NamedTuple):
    """
    How a method orders the present tokens.

    Args:
        scores (`torch.Tensor`):
            Finite, `[rows, heads, present]` in float32; of equal scores the token with the smaller id is better.
        tiers (`torch.Tensor`, *optional*):
            Integers from 0 to 7, `[present]` or `[rows, heads, present]`: tokens of a higher tier go before all of a lower
            one.
        carried (`torch.Tensor`, *optional*):
            What each token carries to the next step, `[rows, heads, present]` in float32, for methods with
            `carries_scores`.
        store_scores (`torch.Tensor`, *optional*):
            Scores that decide what is stored, where they are not those that decide what is attended to.
    """

    scores: torch.Tensor
    tiers: torch.Tensor | None = None
    carried: torch.Tensor | None = None
    store_scores: torch.Tensor | None = None


class Method(ABC):
    """
    A rule for what stays in the cache. Subclasses are dataclasses, one file each; their fields are the method's options.

    A method decides lengths before the first step ([`~Method.plan`]) and ranks tokens in a step ([`~Method.rank`]); the
    cache selects, stores and attends. Budgets are functions of plan and step only, scores of one row only, so that no
    image depends on another.
    """

    name: ClassVar[str]
    """What `method="..."` calls it."""
    protocol: str
    """
    `"pre"`: what a step attends to is what it stores. `"post"`: it attends to all that is there and stores a part.
    `"decoupled"`: both are parts of what is there, with a budget each. `"static"`: a plan made before the first step says
    which tokens are stored.
    """
    needs_profile: ClassVar[bool] = False
    """Whether planning reads a head profile."""
    profile_arrays: ClassVar[tuple[str, ...]] = ()
    """Which arrays of the profile it reads."""
    needs_ids: ClassVar[bool] = False
    """Whether ranking reads the ids of the tokens, which the cache then keeps beside them."""
    carries_scores: ClassVar[bool] = False
    """Whether a ranking builds on those of earlier steps, so that every step is ranked and the tokens carry a number."""
    needs_projection: ClassVar[bool] = False
    """Whether ranking reads the bare projections of the queries."""
    source: ClassVar[str] = ""
    """Where the method was published."""
    attention_budget: float | int | str | None = None
    """What a step may attend to where the caller does not say, for the `"decoupled"` protocol."""

    @property
    def plans_by_row(self) -> bool:
        """Whether lengths depend on what is drawn, see [`~Method.replan`], so that every row needs a plan of its own."""
        return False

    @property
    def metadata_bytes(self) -> int:
        """Bytes that a token of a head needs beside its key and value."""
        return ID_BYTES * self.needs_ids + SCORE_BYTES * self.carries_scores

    @abstractmethod
    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        """The smallest budget, in tokens per head, that the method can work with."""

    @abstractmethod
    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        """
        Lengths for a budget of at least [`~Method.min_budget`] tokens per head.

        Args:
            geometry ([`Geometry`]):
                Of the model.
            budget (`int`):
                Tokens that may stay stored between steps, averaged over layers and heads.
            profile ([`HeadProfile`], *optional*):
                Of the model.
            attention_budget (`int`, *optional*):
                Tokens that a head may attend to in a step, for the `"decoupled"` protocol; `None` is no limit.
        """

    @abstractmethod
    def rank(self, view: StepView) -> Ranking:
        """
        Order the tokens that are present: first the history (`view.stored_key`, `view.stored_value`), then the current scale.

        Called for a group of heads in steps in which some of its tokens have to go, and with `carries_scores` in every step
        but the last, also while nothing has to go.

        Args:
            view ([`StepView`]):
                The group. At the first step it has no history, and its `stored_carried` is `None`.

        Returns:
            [`Ranking`]: a score for each row, head and present token.
        """

    def replan(self, view: StepView, layer: LayerPlan) -> LayerPlan | None:
        """
        A new plan for a layer, from what it attends to in this step on; called at every step of methods with
        `plans_by_row`, before anything is ranked.

        Args:
            view ([`StepView`]):
                The step, with all heads of the layer and one row.
            layer ([`LayerPlan`]):
                The plan so far.
        """
        return None

    def observed_queries(self, plan: Plan, step: int) -> Sequence[int] | None:
        """
        Which queries of a line [`~Method.rank`] reads, of models that draw token by token and so have to keep them until the
        line is complete; by default all.

        Args:
            plan ([`Plan`]):
                Of the image.
            step (`int`):
                Index of the line, from 0.
        """
        return None

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fold what is dropped into what stays; by default nothing is, and the same tensors come back.

        Called once for what a step attends to, where that is a part, and once for what it stores, where that is another
        part.

        Args:
            view ([`StepView`]):
                The step.
            kept (`torch.Tensor`):
                Positions that stay among the present tokens, `[rows, heads, kept]`, ascending.
            key, value (`torch.Tensor`):
                Keys and values at these positions, `[rows, heads, kept, head_dim]`.
        """
        return key, value

    def merges(self, label: str, last: bool) -> bool:
        """
        Whether [`~Method.merge`] folds what some heads drop into what they keep; by default it never does. Estimates of memory
        ask, before anything is drawn.

        Args:
            label (`str`):
                Name of the heads' group in the plan.
            last (`bool`):
                Whether the step is the last one.
        """
        return False

    def scored_queries(self, label: str, length: int) -> int:
        """
        The most queries whose products with all present keys [`~Method.rank`] holds at once; by default none, for methods
        that rank without such products. Estimates of memory ask, before anything is drawn.

        Args:
            label (`str`):
                Name of the heads' group in the plan.
            length (`int`):
                Tokens of the scale.
        """
        return 0


def check_choice(name: str, value: object, choices: tuple[str, ...]):
    """Refuse an option that is not one of its choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))} but is {value!r}.")
