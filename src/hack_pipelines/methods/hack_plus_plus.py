"""HACK++: budgets of their own for attention and storage, and scores that need few or no products (arXiv 2606.08302)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from ..schedule import Schedule
from .allocation import allocate
from .base import SCORED_QUERIES, Geometry, LayerPlan, Method, Plan, Ranking, StepView, check_choice
from .hack import merge_by_cosine
from .head_types import CONTEXTUAL, needed, typed_heads
from .selection import observed_count, observed_positions


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


POOLINGS = {"3x3": 3, "5x5": 5, "sequence": 5, "none": 1}


@dataclass
class HACKPlusPlus(Method):
    """
    Two head types; what a step sees and what is remembered are chosen apart, both out of all that is there.

    Contextual heads rank tokens by the attention of a few queries. Structural heads need no product of queries and keys: a
    token counts as much as its scale usually gets, times the norm of its value. The storage budget goes to the layers, types
    and steps on which later steps rely most.

    Args:
        attention_budget (`float`, `int` or `str`, *optional*):
            What a head may attend to in a step, where the call does not say; `None` is everything. The paper's is 0.3.
        alpha (`float`, *optional*, defaults to 0.5):
            Share of heads that are contextual.
        tau (`float`, *optional*, defaults to 1.0):
            Power of the reliance on history in the shares of the budget; 0 gives every head the same, 1 shares in
            proportion. The paper does not print it.
        min_tokens (`int`, *optional*, defaults to 1):
            Fewest tokens that a head stores, as far as there are as many; at most those of the first two scales.
        n_obs (`int`, *optional*, defaults to 32):
            Queries that score the keys of contextual heads; all of them while a scale has at most twice as many.
        query_sampling (`"lattice"` or `"linspace"`, *optional*, defaults to `"lattice"`):
            Where these queries lie: spread over the grid, or at equal distances in raster order.
        pooling (`"none"`, `"3x3"`, `"5x5"` or `"sequence"`, *optional*, defaults to `"none"`):
            Neighbours whose largest score a token of a contextual head takes: on the grid of its scale, or 5 along the
            sequence. The paper pools, without saying over what; on small token maps it costs quality.
        prior (`"token"`, `"mass"` or `"none"`, *optional*, defaults to `"token"`):
            What a token of a structural head gets for its scale: the attention that one of its tokens usually gets, or that
            all of them get, or nothing.
        prior_step (`"next"` or `"current"`, *optional*, defaults to `"next"`):
            Whether storage asks what the next or what the current step attends to. The paper takes the same scores for
            storage and attention, which is `"current"`.
        init_scales (`int`, *optional*, defaults to 0):
            First scales that are never lost.
        merge_at (`"never"` or `"final"`, *optional*, defaults to `"never"`):
            Whether contextual heads merge what they drop at the last step into what they keep, as HACK does.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the storage budget also holds between two layers of a step, see [`~Plan.strict`].
    """

    name: ClassVar[str] = "hack++"
    protocol = "decoupled"
    needs_profile: ClassVar[bool] = True
    profile_arrays: ClassVar[tuple[str, ...]] = ("colvar", "mass")
    needs_ids: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2606.08302"

    attention_budget: float | int | str | None = None
    alpha: float = 0.5
    tau: float = 1.0
    min_tokens: int = 1
    n_obs: int = 32
    query_sampling: str = "lattice"
    pooling: str = "none"
    prior: str = "token"
    prior_step: str = "next"
    init_scales: int = 0
    merge_at: str = "never"
    strict: bool = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1] but is {self.alpha}.")
        if not 0 <= self.tau <= 2:
            raise ValueError(f"`tau` must lie in [0, 2] but is {self.tau}.")
        if self.min_tokens < 1:
            raise ValueError(f"`min_tokens` must be at least 1 but is {self.min_tokens}.")
        if self.n_obs < 1 or self.init_scales < 0:
            raise ValueError(
                f"`n_obs` must be at least 1 and `init_scales` at least 0 but they are {self.n_obs}, {self.init_scales}."
            )
        check_choice("query_sampling", self.query_sampling, ("lattice", "linspace"))
        check_choice("pooling", self.pooling, tuple(POOLINGS))
        check_choice("prior", self.prior, ("token", "mass", "none"))
        check_choice("prior_step", self.prior_step, ("current", "next"))
        check_choice("merge_at", self.merge_at, ("never", "final"))

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        lengths = geometry.schedule.lengths
        return max(sum(lengths[:2]), sum(lengths[: self.init_scales]) + (self.init_scales > 0))

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        types = typed_heads(profile, self.alpha)
        mass = needed(profile).mean["mass"].double()
        attended = geometry.schedule.total if attention_budget is None else attention_budget
        stored = self._stored(geometry, budget, types, reliance(mass, geometry.schedule))
        layers, first = [], 0
        for members in types:
            own = slice(first, first + len(members))
            first += len(members)
            store = [tuple(counts[own]) for counts in stored]
            attend = [
                tuple(min(attended, before + length) for before in (store[step - 1] if step else (0,) * len(members)))
                for step, length in enumerate(geometry.schedule.lengths)
            ]
            layers.append(LayerPlan(tuple(members.values()), tuple(members), tuple(attend), tuple(store)))
        plan = Plan(geometry.schedule, budget, tuple(layers), {"prior": self._prior(mass, geometry.schedule)})
        return plan.strict() if self.strict else plan

    def rank(self, view: StepView) -> Ranking:
        if view.label == CONTEXTUAL:
            return Ranking(self._pooled_attention(view), self._tiers(view))
        norms = torch.cat(
            [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in (view.stored_value, view.value)],
            -1,
        )
        now = norms * self._prior_of_tokens(view, view.step)
        later = None
        if self.prior_step == "next" and not view.is_last:
            later = norms * self._prior_of_tokens(view, view.step + 1)
        return Ranking(now, self._tiers(view), store_scores=later)

    def merge(
        self, view: StepView, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.merges(view.label, view.is_last):
            return key, value
        return merge_by_cosine(view, kept, key, value)

    def merges(self, label: str, last: bool) -> bool:
        return self.merge_at == "final" and last and label == CONTEXTUAL

    def scored_queries(self, label: str, length: int) -> int:
        return min(observed_count(length, self.n_obs), SCORED_QUERIES) if label == CONTEXTUAL else 0

    def _floor(self, schedule: Schedule) -> int:
        """What every head stores at least: it must be possible at the smallest budget, and hold what is never lost."""
        protected = sum(schedule.lengths[: self.init_scales])
        return max(protected, min(self.min_tokens, sum(schedule.lengths[:2])))

    def _stored(
        self, geometry: Geometry, budget: int, types: list[dict[str, tuple[int, ...]]], gamma: torch.Tensor
    ) -> list[list[int]]:
        """Tokens that a head stores, by step and by group, layer after layer; section 3.3 of the specification."""
        groups = [(layer, list(heads)) for layer, members in enumerate(types) for heads in members.values()]
        counts = [len(heads) for _, heads in groups]
        # Averages of a group: what is shared out must not depend on which head of the group is which.
        reliances = torch.stack([gamma[layer, heads].mean(0) for layer, heads in groups], dim=1)
        stored, everything = [0] * len(groups), budget * geometry.num_layers * geometry.num_heads
        by_step = []
        for step, length in enumerate(geometry.schedule.lengths[:-1]):
            caps = [count + length for count in stored]
            floors = [min(cap, self._floor(geometry.schedule)) for cap in caps]
            stored = allocate(counts, (reliances[step] ** self.tau).tolist(), caps, floors, everything)
            by_step.append(stored)
        return [*by_step, [0] * len(groups)]

    def _prior(self, mass: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """What a token of each scale is worth at each step, `[layers, heads, steps, scales]` in float32."""
        if self.prior == "none":
            return torch.ones_like(mass, dtype=torch.float32)
        if self.prior == "token":
            mass = mass / torch.tensor(schedule.lengths)
        return mass.float()

    def _prior_of_tokens(self, view: StepView, step: int) -> torch.Tensor:
        """The prior of the present tokens at a step, `[rows, heads, present]`."""
        ends = torch.tensor(view.schedule.prefixes[1:], device=view.key.device)
        scales = torch.bucketize(view.ids, ends, right=True)
        prior = view.tables["prior"][:, step].expand(len(view.key), -1, -1)
        return prior.gather(-1, scales)

    def _pooled_attention(self, view: StepView) -> torch.Tensor:
        positions = observed_positions(
            view.schedule.sizes[view.step], self.n_obs, self.query_sampling, view.query.device
        )
        scores = view.attention_columns(positions) / len(positions)
        size = POOLINGS[self.pooling]
        if size == 1:
            return scores
        if self.pooling == "sequence":
            return F.max_pool1d(scores, size, stride=1, padding=size // 2)
        return pooled_by_scale(scores, view.ids, view.schedule.sizes[: view.step + 1], size)

    def _tiers(self, view: StepView) -> torch.Tensor | None:
        """First scales before all others, if they are never lost."""
        protected = min(sum(view.schedule.lengths[: self.init_scales]), view.num_present)
        if not protected:
            return None
        tiers = torch.zeros(view.num_present, dtype=torch.long)
        tiers[:protected] = 1
        return tiers


def reliance(mass: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """
    How much later steps will attend to a token of the history, `gamma` of section 3.2 of the specification.

    `gamma[l, h, k] = sum_{k' > k} (1 / P_k') sum_{s < k'} mass[l, h, k', s]`; falls with `k` and is 0 at the last step.

    Args:
        mass (`torch.Tensor`):
            Attention of each step on each scale, `[layers, heads, steps, scales]`.
        schedule (`Schedule`):
            The scales.

    Returns:
        `torch.Tensor`: `[layers, heads, steps]`.
    """
    history = mass.tril(-1).sum(-1)[..., 1:] / torch.tensor(schedule.prefixes[1:], dtype=mass.dtype)
    later = history.flip(-1).cumsum(-1).flip(-1)
    return F.pad(later, (0, 1))


def pooled_by_scale(
    scores: torch.Tensor, ids: torch.Tensor, sizes: Sequence[tuple[int, int]], kernel: int
) -> torch.Tensor:
    """
    The largest score in a square window around each token, among the present tokens of its own scale.

    Args:
        scores (`torch.Tensor`):
            `[rows, heads, present]`.
        ids (`torch.Tensor`):
            Of the present tokens, `[rows, heads, present]`.
        sizes (`Sequence[tuple[int, int]]`):
            Height and width of every scale so far.
        kernel (`int`):
            Side of the window, odd.
    """
    lengths = [height * width for height, width in sizes]
    grid = scores.new_full((*scores.shape[:2], sum(lengths)), -torch.inf).scatter_(2, ids, scores)
    pooled = [
        F.max_pool2d(part.unflatten(-1, size), kernel, stride=1, padding=kernel // 2).flatten(2)
        for part, size in zip(grid.split(lengths, dim=-1), sizes)
    ]
    return torch.cat(pooled, dim=-1).gather(2, ids)
