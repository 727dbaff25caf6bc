"""What a compression method is: it plans how much is kept, and ranks what is there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..schedule import Schedule


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# Keys of a head that are scored at once.
SCORED_KEYS = 1024


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
        limits: tuple[int, ...],
        protocol: str,
    ) -> "LayerPlan":
        """A plan that holds at most `limits[g]` tokens for each head of group `g`; `"pre"` attends to no more either."""
        attend: list[tuple[int, ...]] = []
        store: list[tuple[int, ...]] = []
        stored = (0,) * len(groups)
        for step, length in enumerate(schedule.lengths):
            present = tuple(count + length for count in stored)
            kept = tuple(min(count, limit) for count, limit in zip(present, limits))
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
    """

    schedule: Schedule
    budget: int
    layers: tuple[LayerPlan, ...]

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
        scale (`float`):
            Factor of the logits.
        guided (`bool`):
            Whether the second half of the rows are the unconditional ones of guidance.
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
    scale: float
    guided: bool

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

    def attention_columns(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Attention that each present token gets from some of the current queries, summed over them.

        The softmax runs over all present tokens. History and current keys are multiplied apart and a chunk at a time, so
        that they are never joined, nor copied to float32 as a whole.

        Args:
            positions (`torch.Tensor`):
                Which of the current queries, `[observed]`.

        Returns:
            `torch.Tensor`: `[rows, heads, present]` in float32.
        """
        query = self.query[:, :, positions].float() * self.scale
        keys = [part for key in (self.stored_key, self.key) for part in key.split(SCORED_KEYS, dim=2)]
        logits = torch.cat([query @ key.float().transpose(-1, -2) for key in keys], dim=-1)
        return logits.softmax(-1).sum(2)


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
    """`"pre"`: what a step attends to is what it stores; `"post"`: it attends to all and stores a part."""
    needs_profile: ClassVar[bool] = False
    """Whether planning reads a head profile."""
    source: ClassVar[str]
    """Where the method was published."""

    @abstractmethod
    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        """The smallest budget, in tokens per head, that the method can work with."""

    @abstractmethod
    def plan(self, geometry: Geometry, budget: int, profile: "HeadProfile | None") -> Plan:
        """Lengths for a budget of at least [`~Method.min_budget`] tokens per head."""

    @abstractmethod
    def rank(self, view: StepView) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Order the tokens that are present, called when some of them have to go.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: finite scores `[rows, heads, present]` in float32, and the tier
            `[present]` of each token, an integer from 0 to 7: tokens of a higher tier go before all of a lower one.
        """

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fold what is dropped before attention into what stays; by default nothing is.

        Args:
            view (`StepView`):
                The step.
            kept (`torch.Tensor`):
                Positions that stay among the present tokens, `[rows, heads, kept]`, ascending.
            key, value (`torch.Tensor`):
                Keys and values at these positions, `[rows, heads, kept, head_dim]`.
        """
        return key, value


def uniform_plan(geometry: Geometry, budget: int, protocol: str) -> Plan:
    """The plan that gives every head the same budget, as the head-agnostic methods do."""
    heads = tuple(range(geometry.num_heads))
    layer = LayerPlan.from_limits(geometry.schedule, (heads,), ("all",), (budget,), protocol)
    return Plan(geometry.schedule, budget, (layer,) * geometry.num_layers)


def check_choice(name: str, value: object, choices: tuple[str, ...]):
    """Refuse an option that is not one of its choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))} but is {value!r}.")
