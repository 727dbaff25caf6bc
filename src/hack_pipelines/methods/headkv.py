"""HeadKV's rule (arXiv 2605.20600) for next-scale models: budgets by how far a head looks, eviction scale by scale."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..locality import NearTokens
from ..profiles.statistics import LOCAL_MIN_TOKENS, LOCAL_RADII
from ..schedule import Schedule
from .allocation import allocate
from .base import SCORED_QUERIES, Geometry, LayerPlan, Method, Plan, Ranking, StepView, check_choice
from .selection import observed_count, observed_positions
from .uniform import uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


PROTECTED_SCALES = 2


@dataclass
class HeadKV(Method):
    """
    Heads that look at their neighbourhood get small budgets, heads that look far get large ones; every scale keeps a share.

    Published for models that draw line by line; what a line is there, a scale is here. How local a head is, is the attention
    it pays to near tokens over what it pays to all, on scales that are large enough for some tokens to be far.

    Args:
        types (`"profile"` or `"online"`, *optional*, defaults to `"profile"`):
            Whether the head profile tells how local a head is, or each image by itself at an early step, which needs no
            profile but gives every row of the batch lengths of its own.
        radius (1 or 2, *optional*, defaults to 1):
            Cells of the source scale's grid that count as near.
        exponent (`float`, *optional*, defaults to 1.0):
            Power of a head's reach in its share of the budget; 0 gives all heads the same.
        weight_floor (`float`, *optional*, defaults to 0.05):
            Added to the reach, so that no head gets nothing.
        guarantee (`float`, *optional*, defaults to 0.5):
            Part of what is not protected that is shared out evenly over the scales; the rest goes to the best of all.
        n_obs (`int`, *optional*, defaults to 32):
            Queries that score the keys; all of them while a scale has at most twice as many.
        query_sampling (`"lattice"` or `"linspace"`, *optional*, defaults to `"lattice"`):
            Where these queries lie.
        identify_tokens (`int`, *optional*, defaults to 64):
            Heads are told apart at the first scale with so many tokens, or at the last but one if only the last has.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "headkv"
    profile_arrays: ClassVar[tuple[str, ...]] = ("local", "mass")
    needs_ids: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2605.20600, carried over to scales"

    types: str = "profile"
    radius: int = 1
    exponent: float = 1.0
    weight_floor: float = 0.05
    guarantee: float = 0.5
    n_obs: int = 32
    query_sampling: str = "lattice"
    identify_tokens: int = 64
    protocol: str = "post"

    def __post_init__(self):
        check_choice("types", self.types, ("profile", "online"))
        check_choice("query_sampling", self.query_sampling, ("lattice", "linspace"))
        check_choice("protocol", self.protocol, ("post", "pre"))
        if self.radius not in LOCAL_RADII:
            raise ValueError(f"`radius` must be one of {LOCAL_RADII} but is {self.radius}.")
        if self.exponent < 0 or not self.weight_floor > 0:
            raise ValueError(
                f"`exponent` must be at least 0 and `weight_floor` above 0 but they are {self.exponent}, "
                f"{self.weight_floor}."
            )
        if not 0 <= self.guarantee <= 1:
            raise ValueError(f"`guarantee` must lie in [0, 1] but is {self.guarantee}.")
        if self.n_obs < 1 or self.identify_tokens < 1:
            raise ValueError(
                f"`n_obs` and `identify_tokens` must be at least 1 but are {self.n_obs}, {self.identify_tokens}."
            )

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        """Only where heads are not told apart online."""
        return self.types == "profile"

    @property
    def plans_by_row(self) -> bool:
        return self.types == "online"

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return sum(geometry.schedule.lengths[:PROTECTED_SCALES]) + 1

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        if self.types == "online":
            return uniform_plan(geometry, budget, self.protocol)
        if profile is None:
            raise ValueError("HeadKV needs a head profile to tell how local a head is, or `types='online'`.")
        localities = self._localities(profile, geometry.schedule)
        layers = tuple(self._layer(geometry.schedule, budget, locality, start=0) for locality in localities.tolist())
        return Plan(geometry.schedule, budget, layers)

    def replan(self, view: StepView, layer: LayerPlan) -> LayerPlan | None:
        # A budget for everything is one for every head.
        if view.step != self.identify_step(view.schedule) or view.budget >= view.schedule.cacheable:
            return None
        return self._layer(view.schedule, view.budget, locality_of(view, self.radius)[0].tolist(), view.step)

    def rank(self, view: StepView) -> Ranking:
        positions = observed_positions(
            view.schedule.sizes[view.step], self.n_obs, self.query_sampling, view.query.device
        )
        scores = view.attention_columns(positions) / len(positions)
        return Ranking(scores, self._tiers(view, scores))

    def scored_queries(self, label: str, length: int) -> int:
        return min(observed_count(length, self.n_obs), SCORED_QUERIES)

    def identify_step(self, schedule: Schedule) -> int:
        """Index of the step at which heads are told apart."""
        large = [step for step, length in enumerate(schedule.lengths) if length >= self.identify_tokens]
        return max(0, min([*large, len(schedule) - 2]))

    def _localities(self, profile: "HeadProfile", schedule: Schedule) -> torch.Tensor:
        """How local every head is, `[layers, heads]`, from the profile at the step at which an image would tell."""
        step = self.identify_step(schedule)
        near = profile.mean["local"][:, :, step, LOCAL_RADII.index(self.radius)].double()
        counted = torch.tensor([length >= LOCAL_MIN_TOKENS for length in schedule.lengths])
        all_counted = profile.mean["mass"][:, :, step].double()[..., counted].sum(-1)
        # No scale is large enough: all heads are alike.
        return torch.where(all_counted > 0, near / all_counted.clamp_min(1e-12), 0.0).clamp(0, 1)

    def _layer(self, schedule: Schedule, budget: int, localities: list[float], start: int) -> LayerPlan:
        """The plan of a layer whose heads have these localities, with equal budgets for all before step `start`."""
        largest = schedule.total if self.protocol == "pre" else schedule.cacheable
        floor = sum(schedule.lengths[:PROTECTED_SCALES])
        own = allocate(
            counts=[1] * len(localities),
            weights=[(1 - locality) ** self.exponent + self.weight_floor for locality in localities],
            caps=[largest] * len(localities),
            floors=[min(floor, largest)] * len(localities),
            total=budget * len(localities),
        )
        groups = {limit: tuple(head for head, other in enumerate(own) if other == limit) for limit in sorted(set(own))}
        limits = [tuple(groups) if step >= start else (budget,) * len(groups) for step in range(len(schedule))]
        return LayerPlan.from_limits(schedule, tuple(groups.values()), ("",) * len(groups), limits, self.protocol)

    def _tiers(self, view: StepView, scores: torch.Tensor) -> torch.Tensor:
        """First scales, then what every scale is guaranteed, then the rest, `[rows, heads, present]`."""
        ends = torch.tensor(view.schedule.prefixes[1:], device=scores.device)
        scales = torch.bucketize(view.ids, ends, right=True)
        protected = min(sum(view.schedule.lengths[:PROTECTED_SCALES]), view.num_present)
        # Best first; ties go to the smaller id, as in the selection itself.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        members = scales.gather(-1, order).unsqueeze(-1) == torch.arange(
            PROTECTED_SCALES, view.step + 1, device=scores.device
        )
        place_in_scale = (members.cumsum(2) * members).sum(-1)
        present_scales = members.any(2).sum(-1, keepdim=True).clamp_min(1)
        share = int(self.guarantee * max(0, view.num_kept - protected)) // present_scales
        guaranteed = (place_in_scale > 0) & (place_in_scale <= share)
        tiers = torch.zeros_like(scales).scatter_(-1, order, guaranteed.long())
        tiers[..., :protected] = 2
        return tiers


def locality_of(view: StepView, radius: int) -> torch.Tensor:
    """
    Attention on tokens within `radius` cells of the query over attention on all tokens, on scales of at least 25 tokens.

    Args:
        view ([`StepView`]):
            The step; all its queries are looked at, a chunk at a time.
        radius (`int`):
            Cells of the source scale's grid.

    Returns:
        `torch.Tensor`: `[rows, heads]` in float32; 0 where no scale is large enough.
    """
    near_tokens = NearTokens(view.schedule, view.step, view.query.device)
    ids = view.ids
    counted = near_tokens.counted[ids]
    near = everything = torch.zeros(view.query.shape[:2], device=view.query.device)
    for positions in torch.arange(view.query.shape[2], device=view.query.device).split(SCORED_QUERIES):
        attention = view.attention_rows(positions)
        mask = near_tokens.masks(int(positions[0]), len(positions))[LOCAL_RADII.index(radius)]
        # The mask is `[queries, all tokens so far]`; the present ones differ by row and head.
        near = near + (attention * mask[:, ids].permute(1, 2, 0, 3)).sum((2, 3))
        everything = everything + (attention * counted.unsqueeze(2)).sum((2, 3))
    return torch.where(everything > 0, near / everything.clamp_min(1e-12), 0.0)
