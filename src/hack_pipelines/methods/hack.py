"""HACK: head-aware compression with two head types (arXiv 2504.09261)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from .base import SCORED_QUERIES, Geometry, LayerPlan, Method, Plan, Ranking, StepView, check_choice
from .head_types import CONTEXTUAL, STRUCTURAL, typed_heads
from .selection import observed_count, observed_positions


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# Cosines that a merge holds at once for each row: 16 MiB, where all of Infinity's largest scale would take gigabytes.
MERGE_CHUNK = 2**22


@dataclass
class HACK(Method):
    """
    Two head types, two budgets, two rules; what a step attends to is what it stores.

    Contextual heads, whose attention hardly depends on the query, get a small budget and keep the tokens with the most
    attention. Structural heads, which follow position, get a large one and keep the first scales, the current scale and
    the best of what lies between. At the last step, what contextual heads drop is merged into what they keep.

    Args:
        alpha (`float`, *optional*, defaults to 0.5):
            Share of heads that are contextual: those with the lowest variance over queries (section 3.2 of the paper).
        contextual_ratio (`float`, *optional*, defaults to 1/3):
            Budget of a contextual head over the average budget. The paper does not print it; a third gives the
            tolerances that it reports, 10 % and 50 % of the tokens, at its setting of 70 % compression.
        n_obs (`int`, *optional*, defaults to 32):
            Queries that score the keys; all of them while a scale has at most twice as many.
        query_sampling (`"lattice"` or `"linspace"`, *optional*, defaults to `"lattice"`):
            Where these queries lie: spread over the grid, or at equal distances in raster order.
        init_scales (`int`, *optional*, defaults to 2):
            First scales that structural heads never lose.
        merge_at (`"final"`, `"every"` or `"never"`, *optional*, defaults to `"final"`):
            At which steps contextual heads merge what they drop into what they keep.
        cfg_sets (`"separate"` or `"from_cond"`, *optional*, defaults to `"separate"`):
            Whether unconditional rows choose for themselves or take over the choice of their conditional rows.
        rules (`"matched"`, `"swapped"` or `"contextual"`, *optional*, defaults to `"matched"`):
            `"swapped"` gives each head type the other one's selection rule, the paper's ablation; `"contextual"` gives all
            heads the rule of contextual ones, so that only the budgets differ.
        protocol (`"pre"` or `"post"`, *optional*, defaults to `"pre"`):
            `"pre"` is HACK. `"post"` attends to all that is there and stores what HACK would, without a merge: to tell what
            its choice of tokens is worth from what it costs to attend to these only.
    """

    name: ClassVar[str] = "hack"
    needs_profile: ClassVar[bool] = True
    profile_arrays: ClassVar[tuple[str, ...]] = ("colvar",)
    source: ClassVar[str] = "arXiv 2504.09261"

    alpha: float = 0.5
    contextual_ratio: float = 1 / 3
    n_obs: int = 32
    query_sampling: str = "lattice"
    init_scales: int = 2
    merge_at: str = "final"
    cfg_sets: str = "separate"
    rules: str = "matched"
    protocol: str = "pre"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1] but is {self.alpha}.")
        if not 0 < self.contextual_ratio <= 1:
            raise ValueError(f"`contextual_ratio` must lie in (0, 1] but is {self.contextual_ratio}.")
        if self.n_obs < 1 or self.init_scales < 0:
            raise ValueError(
                f"`n_obs` must be at least 1 and `init_scales` at least 0 but they are {self.n_obs}, {self.init_scales}."
            )
        check_choice("query_sampling", self.query_sampling, ("lattice", "linspace"))
        check_choice("merge_at", self.merge_at, ("final", "every", "never"))
        check_choice("cfg_sets", self.cfg_sets, ("separate", "from_cond"))
        check_choice("rules", self.rules, ("matched", "swapped", "contextual"))
        check_choice("protocol", self.protocol, ("pre", "post"))

    def budgets(self, budget: int, num_contextual: int, num_structural: int, largest: int) -> tuple[int, int]:
        """
        Tokens for a contextual and for a structural head, `(B_C, B_S)`, that average to at most `budget`.

        Args:
            budget (`int`):
                Average over all heads.
            num_contextual, num_structural (`int`):
                Heads of each type in the whole model.
            largest (`int`):
                Tokens that no head can exceed.
        """
        if not num_contextual or not num_structural:
            return min(budget, largest), min(budget, largest)
        everything = budget * (num_contextual + num_structural)
        contextual = int(budget * self.contextual_ratio + 1e-6)
        structural = (everything - contextual * num_contextual) // num_structural
        if structural >= largest:
            # What these heads cannot take is left for the others.
            structural = largest
            contextual = min(largest, (everything - structural * num_structural) // num_contextual)
        return contextual, structural

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        layers = typed_heads(profile, self.alpha)
        protected = sum(geometry.schedule.lengths[: self.init_scales])
        for budget in range(1, geometry.schedule.total + 1):
            contextual, structural = self._limits(geometry, budget, layers).values()
            if contextual >= 1 and structural > protected:
                return budget
        return geometry.schedule.total

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        types = typed_heads(profile, self.alpha)
        limits = self._limits(geometry, budget, types)
        layers = tuple(
            LayerPlan.from_limits(
                geometry.schedule,
                tuple(members.values()),
                tuple(members),
                [tuple(limits[label] for label in members)] * len(geometry.schedule),
                self.protocol,
            )
            for members in types
        )
        return Plan(geometry.schedule, budget, layers)

    def rank(self, view: StepView) -> Ranking:
        positions = observed_positions(
            view.schedule.sizes[view.step], self.n_obs, self.query_sampling, view.query.device
        )
        scores = view.attention_columns(positions)
        if self.cfg_sets == "from_cond" and view.guided:
            scores = scores[: len(scores) // 2].repeat(2, 1, 1)
        protected_label = {"matched": STRUCTURAL, "swapped": CONTEXTUAL}.get(self.rules)
        return Ranking(scores, self._structural_tiers(view) if view.label == protected_label else None)

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.merges(view.label, view.is_last):
            return key, value
        return merge_by_cosine(view, kept, key, value)

    def merges(self, label: str, last: bool) -> bool:
        wanted = self.merge_at == "every" or (self.merge_at == "final" and last)
        return wanted and label == CONTEXTUAL and self.protocol == "pre"

    def scored_queries(self, label: str, length: int) -> int:
        return min(observed_count(length, self.n_obs), SCORED_QUERIES)

    def _limits(self, geometry: Geometry, budget: int, layers: list[dict[str, tuple[int, ...]]]) -> dict[str, int]:
        """Tokens of a head of each type."""
        # Attention to a part has a use for all tokens, storage alone for all but those of the last scale.
        largest = geometry.schedule.total if self.protocol == "pre" else geometry.schedule.cacheable
        contextual, structural = (
            sum(len(members.get(label, ())) for members in layers) for label in (CONTEXTUAL, STRUCTURAL)
        )
        return dict(zip((CONTEXTUAL, STRUCTURAL), self.budgets(budget, contextual, structural, largest)))

    def _structural_tiers(self, view: StepView) -> torch.Tensor:
        """
        First scales before current tokens before what lies between.

        When all current tokens fit this keeps them all, and fills up from between; when they do not, the best of them
        stay and nothing in between does. The first scales are never lost, so they are the first positions.
        """
        tiers = torch.ones(view.num_present, dtype=torch.long)
        tiers[view.num_stored :] = 2
        if view.step >= self.init_scales:
            tiers[: min(sum(view.schedule.lengths[: self.init_scales]), view.num_stored)] = 3
        return tiers


class Shares(NamedTuple):
    """
    How dropped tokens enter the average that takes the place of a kept one.

    `X_r <- (X_r + sum_e c_e (a_e X_e + b X_r)) / (1 + sum_e c_e)` over the tokens `e` that are merged into `r`.

    Args:
        counts (`torch.Tensor`):
            `c`, `[rows, heads, present]` in float32; zero for tokens that stay.
        own (`torch.Tensor`, *optional*):
            `a`, likewise; 1 by default.
        kept (`float`, *optional*, defaults to 0.0):
            `b`.
    """

    counts: torch.Tensor
    own: torch.Tensor | None = None
    kept: float = 0.0


def by_cosine(cosines: torch.Tensor, dropped: torch.Tensor, num_dropped: int) -> Shares:
    """Every dropped token as much as it is like the kept one."""
    return Shares(cosines.clamp_min(0) * dropped)


def merge_by_cosine(
    view: StepView,
    kept: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Callable[[torch.Tensor, torch.Tensor, int], Shares] = by_cosine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Merge every dropped token into the kept one with the most similar key, by default weighted by their cosine.

    `X_r <- (X_r + sum_e w_e X_e) / (1 + sum_e w_e)` with `w_e = max(0, cos(K_e, K_r))` for `X = K` and `X = V`, in
    float32, after LOOK-M (arXiv 2406.18139). History and current tokens are taken one after the other, never joined, and
    a chunk at a time, which changes neither a cosine nor the order of a sum.

    Args:
        view (`StepView`):
            The step, whose present tokens are merged.
        kept (`torch.Tensor`):
            Positions that stay, `[rows, heads, kept]`.
        key, value (`torch.Tensor`):
            Keys and values at these positions.
        shares (`Callable`, *optional*):
            Another average: the [`Shares`] of the present tokens, from the cosine of each with the kept token that is most
            similar and from whether it is dropped, both `[rows, heads, present]`, and from how many of a head are.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: keys and values `[rows, heads, kept, head_dim]` in their own dtype.
    """
    dropped = torch.ones(*kept.shape[:2], view.num_present, dtype=torch.bool, device=kept.device)
    dropped.scatter_(2, kept, False)
    merged = [key.float(), value.float(), torch.ones((*kept.shape, 1), device=kept.device)]
    # Of one row's shape, so that a batch is cut where each of its images would be.
    chunk = max(1, MERGE_CHUNK // (kept.shape[1] * kept.shape[2]))
    tokens = (view.stored_key, view.stored_value), (view.key, view.value)
    parts = [[part.split(chunk, dim=2) for part in pair] for pair in tokens]
    cosines, target = nearest_kept([own for keys, _ in parts for own in keys], key)
    counts, factor, kept_share = shares(cosines, dropped, view.num_present - kept.shape[2])
    first = 0
    for part in parts:
        sums = [own.new_zeros(own.shape) for own in merged]
        for own_key, own_value in zip(*part):
            place = slice(first, first + own_key.shape[2])
            first = place.stop
            if factor is not None:
                own_key, own_value = (own.float() * factor[..., place, None] for own in (own_key, own_value))
            values = own_key, own_value, torch.ones_like(own_key[..., :1])
            add_by_target(sums, target[..., place], counts[..., place], values)
        merged = [own + more for own, more in zip(merged, sums)]
        # The sums of the next part are made without these.
        del sums
    *merged_parts, totals = merged
    if kept_share:
        merged_parts = [
            own + kept_share * (totals - 1) * before.float() for own, before in zip(merged_parts, (key, value))
        ]
    merged_key, merged_value = merged_parts
    return (merged_key / totals).to(key.dtype), (merged_value / totals).to(value.dtype)


def nearest_kept(keys: Sequence[torch.Tensor], kept_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The kept key with the largest cosine.

    Args:
        keys (`Sequence[torch.Tensor]`):
            All keys in chunks, `[rows, heads, tokens, head_dim]`.
        kept_key (`torch.Tensor`):
            Keys that stay, `[rows, heads, kept, head_dim]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: for every key that cosine, in float32, and which one it is; both
        `[rows, heads, tokens]`.
    """
    unit_kept = F.normalize(kept_key.float(), dim=-1).transpose(-1, -2)
    nearest = [(F.normalize(own.float(), dim=-1) @ unit_kept).max(-1) for own in keys]
    cosines, target = (torch.cat(pieces, dim=-1) for pieces in zip(*nearest))
    return cosines, target


def add_by_target(
    sums: Sequence[torch.Tensor], target: torch.Tensor, weights: torch.Tensor, values: Sequence[torch.Tensor]
):
    """
    Add weighted values to sums in place, each value to that of its target, in a fixed order.

    Args:
        sums (`Sequence[torch.Tensor]`):
            Contiguous, `[rows, heads, targets, channels]` in float32.
        target, weights (`torch.Tensor`):
            Where each value goes, and how much of it, `[rows, heads, tokens]`.
        values (`Sequence[torch.Tensor]`):
            One for each of the sums, `[rows, heads, tokens, channels]`.
    """
    rows, heads, count, _ = sums[0].shape
    if target.device.type != "cpu":
        # Adding in place would sum in any order there, while a product is as good as free.
        assignment = weights.new_zeros(rows, heads, count, target.shape[2])
        assignment.scatter_(2, target.unsqueeze(2), weights.unsqueeze(2))
        for total, value in zip(sums, values):
            total += assignment @ value.float()
        return
    starts = torch.arange(0, rows * heads * count, count).view(rows, heads, 1)
    index = (target + starts).flatten()
    for total, value in zip(sums, values):
        channels = value.shape[-1]
        # A name for what is weighted would keep it alive while the next value is.
        total.view(-1, channels).index_add_(0, index, (value.float() * weights.unsqueeze(-1)).reshape(-1, channels))
