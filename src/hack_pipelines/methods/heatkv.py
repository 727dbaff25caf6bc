"""HeatKV: whole scales leave single heads on a schedule made before the first step (arXiv 2605.14877)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..schedule import Schedule
from .base import Geometry, Method, Ranking, StepView
from .segment_plan import SegmentPlan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


@dataclass
class HeatKV(Method):
    """
    Forget whole scales, head by head, by how much later scales look back at them. No score is computed while drawing.

    Args:
        sinks (`int`, *optional*, defaults to 3):
            First scales that no head loses.
    """

    name: ClassVar[str] = "heatkv"
    protocol = "static"
    needs_profile: ClassVar[bool] = True
    profile_arrays: ClassVar[tuple[str, ...]] = ("mass",)
    source: ClassVar[str] = "arXiv 2605.14877"

    sinks: int = 3

    def __post_init__(self):
        if type(self.sinks) is not int or self.sinks < 0:
            raise ValueError(f"`sinks` must be an int of at least 0 but is {self.sinks!r}.")

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return sink_tokens(geometry.schedule, self.sinks)

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> SegmentPlan:
        if profile is None:
            raise ValueError("HeatKV needs a head profile to know where each head looks back but got none.")
        shape = geometry.num_layers, geometry.num_heads
        orders = pruning_orders(profile_scores(profile, self.sinks))
        head_tokens = budget * geometry.num_layers * geometry.num_heads
        until = lifetimes(orders, geometry.schedule, shape, self.sinks, head_tokens)
        return SegmentPlan.from_lifetimes(geometry.schedule, budget, until)

    def rank(self, view: StepView) -> Ranking:
        raise ValueError("HeatKV's plan says which tokens stay, so there is nothing to rank.")


def sink_tokens(schedule: Schedule, sinks: int) -> int:
    """Tokens of the first scales that no head loses; the last scale is no sink, because it is never stored."""
    return sum(schedule.lengths[: min(sinks, len(schedule) - 1)])


def profile_scores(profile: "HeadProfile", sinks: int) -> np.ndarray:
    """
    S-CAS from a head profile, see [`cumulative_scores`].

    Raises:
        `ValueError`: if the profile does not say how heads look back at all scales but the sinks.
    """
    if "mass" not in profile.mean:
        raise ValueError(
            f"The head profile of {profile.title} has no `mass`, which HeatKV needs: calibrate the model."
        )
    ordered_from = profile.sampling.get("sinks", 0)
    if ordered_from > sinks:
        raise ValueError(
            f"The head profile of {profile.title} was read from HeatKV orders that begin after {ordered_from} sinks, so it "
            f"does not say which heads lose an earlier scale: set `sinks` to {ordered_from} or more instead of {sinks}."
        )
    return cumulative_scores(profile.mean["mass"].double().numpy(), sinks)


def cumulative_scores(mass: np.ndarray, sinks: int) -> np.ndarray:
    """
    Scale-dependent cumulative attention scores (S-CAS): attention on a scale, averaged over all later steps.

    Args:
        mass (`np.ndarray`):
            Attention of step `k` on scale `s`, `[num_layers, num_heads, num_scales, num_scales]` in float64, averaged over
            queries and samples.
        sinks (`int`):
            First scales, which have no score.

    Returns:
        `np.ndarray`: `[num_scales - 1 - sinks, num_layers, num_heads]` in float64.
    """
    layers, heads, scales, _ = mass.shape
    scores = [mass[:, :, scale + 1 :, scale].mean(-1) for scale in range(sinks, scales - 1)]
    return np.stack(scores) if scores else np.empty((0, layers, heads))


def pruning_orders(scores: np.ndarray) -> np.ndarray:
    """
    Heads of each source scale in the order in which they lose it: ascending by score, head, layer.

    Args:
        scores (`np.ndarray`):
            `[num_sources, num_layers, num_heads]`.

    Returns:
        `np.ndarray`: pairs of head and layer, `[num_sources, num_layers * num_heads, 2]`.
    """
    layers, heads = (axis.ravel() for axis in np.indices(scores.shape[1:]))
    orders = [np.lexsort((layers, heads, source.ravel())) for source in scores]
    pairs = np.stack((heads, layers), axis=-1)
    return np.stack([pairs[order] for order in orders]) if orders else np.empty((0, *pairs.shape), pairs.dtype)


def forgotten_counts(schedule: Schedule, num_heads_total: int, sinks: int, head_tokens: float) -> np.ndarray:
    """
    How many heads must have forgotten each scale but the sinks when a step starts, `x_k`, `[num_scales]`.

    As few as leave `x_k T + (num_heads_total - x_k) P_k` tokens within the budget, with `T` tokens of the sinks and `P_k` of
    all scales before the step.

    Args:
        schedule (`Schedule`):
            The scales.
        num_heads_total (`int`):
            Heads of all layers.
        sinks (`int`):
            First scales that no head loses.
        head_tokens (`float`):
            Budget of all heads together.
    """
    kept = sink_tokens(schedule, sinks)
    counts = []
    for prefix in schedule.prefixes:
        excess = num_heads_total * prefix - head_tokens
        counts.append(int(-(-excess // (prefix - kept))) if excess > 0 else 0)
    return np.array(counts)


def lifetimes(
    orders: np.ndarray, schedule: Schedule, shape: tuple[int, int], sinks: int, head_tokens: float
) -> np.ndarray:
    """
    When each head forgets each scale, so that what all layers hold stays within the budget after each layer of each step.

    Between two steps the first heads of every order have forgotten their scale, as many as [`forgotten_counts`] says.
    Inside a step the layers grow one after the other, the last ones still hold what they will lose. Where that is too much,
    later layers give up early what the step would take from them after its attention: the last layer first, then the larger
    scale, then the head that comes first in its order.

    Args:
        orders (`np.ndarray`):
            Pairs of head and layer of every source scale from the first that is no sink, as [`pruning_orders`] gives them.
        schedule (`Schedule`):
            The scales.
        shape (`tuple[int, int]`):
            Layers, and heads of a layer.
        sinks (`int`):
            First scales that no head loses.
        head_tokens (`float`):
            Budget of all heads together, a whole number or not.

    Returns:
        `np.ndarray`: first step that does not read a scale any more, `[num_layers, num_heads, num_scales - 1]`, as
        [`SegmentPlan`] takes it.

    Raises:
        `ValueError`: if the sinks alone exceed the budget.
    """
    layers, heads = shape
    steps, lengths = len(schedule), np.array(schedule.lengths)
    smallest = sink_tokens(schedule, sinks) * layers * heads
    if head_tokens < smallest:
        raise ValueError(
            f"The first {sinks} scales, which no head loses, take {smallest} head-tokens but the budget is {head_tokens:g}."
        )
    until = np.full((steps - 1, layers, heads), steps)
    counts = forgotten_counts(schedule, layers * heads, sinks, head_tokens)
    sources = np.arange(min(sinks, steps - 1), steps - 1)
    ranks = np.empty((len(sources), layers, heads), dtype=np.int64)
    for rank, order in zip(ranks, orders):
        rank[order[:, 1], order[:, 0]] = np.arange(layers * heads)
    # Counts never fall from step to step: the first step at whose start a head is among those that have forgotten.
    gone = np.searchsorted(counts, ranks, side="right")
    until[sources] = gone
    for step in range(steps - 1):
        held_by_sinks = schedule.prefixes[min(step, sinks)] * layers * heads
        excess = held_inside(gone, sources, lengths, step) + held_by_sinks - head_tokens
        leaving = np.argwhere((gone == step + 1) & (sources < step)[:, None, None])
        own_ranks = ranks[tuple(leaving.T)]
        leaving = leaving[np.lexsort((own_ranks, -leaving[:, 0], -leaving[:, 1]))]
        freed = np.cumsum(lengths[sources[leaving[:, 0]]])
        # What leaves early is a beginning of this list, long enough for the worst layer.
        needed = np.searchsorted(freed, excess[excess > 0]) + 1
        early = leaving[: max(needed, default=0)]
        until[(sources[early[:, 0]], early[:, 1], early[:, 2])] = step
    own_next = np.arange(1, steps)[:, None, None]
    return np.maximum(until, own_next).transpose(1, 2, 0)


def held_inside(gone: np.ndarray, sources: np.ndarray, lengths: np.ndarray, step: int) -> np.ndarray:
    """
    Tokens of scales that are no sinks after each layer of a step, `[num_layers]`, if nothing leaves early.

    Args:
        gone (`np.ndarray`):
            Step at whose start a head has forgotten a scale, `[num_sources, num_layers, num_heads]`.
        sources (`np.ndarray`):
            Indices of these scales.
        lengths (`np.ndarray`):
            Tokens of every scale.
        step (`int`):
            Index of the scale.
    """
    kept_before = np.tensordot(lengths[sources] * (sources < step), (gone > step).sum(-1), 1)
    kept_after = np.tensordot(lengths[sources] * (sources <= step), (gone > step + 1).sum(-1), 1)
    return np.cumsum(kept_after) + kept_before.sum() - np.cumsum(kept_before)
