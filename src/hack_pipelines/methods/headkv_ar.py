"""HeadKV for models that draw token by token: long memories for heads that look far, told apart online (arXiv 2605.20600)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .allocation import allocate
from .base import Geometry, LayerPlan, Method, Plan, Ranking, StepView, check_choice
from .lines import LineView, TellsHeads, even_columns
from .uniform import uniform_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# Lines that a head's neighbourhood must be able to leave before it can be told from a broad one; the last of them.
FIRST_LINE, LAST_LINE = 3, 5
# Lines of the youngest stratum; each older one has twice as many, the oldest all the rest.
YOUNGEST_LINES = 2
# Most lines that are protected.
RECENT_LINES = 2


@dataclass
class HeadKVAR(TellsHeads, Method):
    """
    Heads of a layer are ordered by how much they look beyond their neighbourhood, each image for itself, over a few early
    lines. The broader half gets the longer memory. What a head loses is spread over all ages, so that it keeps a long range.

    The lengths are fixed by rank before the first token; only which head gets which is found while drawing. So a batch
    stays dense, and no image depends on another. Published is the idea; that lengths go by rank, and all numbers, are ours.

    Args:
        allocation (`"rank"` or `"uniform"`, *optional*, defaults to `"rank"`):
            Whether broad heads get more than local ones, or all the same.
        groups (`int`, *optional*, defaults to 4):
            Lengths that there are in a layer.
        spread (`float`, *optional*, defaults to 0.5):
            The longest minus the shortest of them over the budget: 1 goes from half of it to one and a half times.
        radius (`int`, *optional*, defaults to 2):
            Rows and columns that count as near.
        strata (`int`, *optional*, defaults to 4):
            Ages that share what is not protected: the last 2 lines, the next 4, 8, and all the rest. 1 keeps the best of
            all ages.
        anchors (`int`, *optional*, defaults to 1):
            First lines that always stay, as in LineAR.
        decay (`float`, *optional*, defaults to 0.5):
            Weight of earlier lines in the average of the attention that a token gets.
        observe (`int`, *optional*, defaults to 8):
            Queries of a line that score the tokens, evenly spaced; while heads are told apart, all do.
    """

    name: ClassVar[str] = "headkv_ar"
    needs_ids: ClassVar[bool] = True
    carries_scores: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2605.20600"
    protocol = "post"

    allocation: str = "rank"
    groups: int = 4
    spread: float = 0.5
    radius: int = 2
    strata: int = 4
    anchors: int = 1
    decay: float = 0.5
    observe: int = 8

    def __post_init__(self):
        check_choice("allocation", self.allocation, ("rank", "uniform"))
        for name, least in (("groups", 2), ("radius", 0), ("strata", 1), ("anchors", 0), ("observe", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least} but is {getattr(self, name)}.")
        if not 0 <= self.spread <= 2:
            raise ValueError(f"`spread` must lie in [0, 2] but is {self.spread}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1) but is {self.decay}.")

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return (1 + max(1, self.anchors)) * geometry.schedule.lengths[0]

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        schedule, heads = geometry.schedule, geometry.num_heads
        groups = min(self.groups, heads)
        if self.allocation == "uniform" or groups == 1:
            return uniform_plan(geometry, budget, self.protocol)
        # Places in the order of breadth, the broadest first, in groups that are as equal as can be.
        ends = [-(-heads * (index + 1) // groups) for index in range(groups)]
        places = tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends))
        counts = [len(group) for group in places]
        weights = [1 + self.spread * (0.5 - index / (groups - 1)) for index in range(groups)]
        # What rounding leaves goes to the broadest, so that the mean is the budget.
        weights[0] = (heads - sum(c * weight for c, weight in zip(counts[1:], weights[1:]))) / counts[0]
        floor = self.min_budget(geometry, profile)
        limits, present = [], 0
        for length in schedule.lengths:
            present += length
            # While the broad heads have not seen as much as they may hold, the local ones use what is left.
            limits.append(
                (present,) * groups
                if present <= budget
                else allocate(counts, weights, [present] * groups, [min(floor, present)] * groups, budget * heads)
            )
        labels = tuple(f"rank {index}" for index in range(groups))
        layer = LayerPlan.from_limits(schedule, places, labels, limits, self.protocol)
        return Plan(schedule, budget, (layer,) * geometry.num_layers)

    def identifying_steps(self, plan: Plan) -> range:
        """Lines 3 to 5, or to the first after which something has to go."""
        if len(plan.layers[0].groups) == 1:
            return range(0)
        width = plan.schedule.lengths[0]
        return range(FIRST_LINE - 1, min(LAST_LINE, plan.budget // width + 1, len(plan.schedule) - 1))

    def observed_queries(self, plan: Plan, step: int) -> Sequence[int]:
        width = plan.schedule.lengths[step]
        return even_columns(width, width if step in self.identifying_steps(plan) else self.observe)

    def head_evidence(self, view: LineView) -> torch.Tensor:
        """Attention on near image tokens, and on all, `[rows, heads, 2]`, summed over the observed queries (section 7.2)."""
        attention = view.attention_rows(torch.arange(view.query.shape[2], device=view.query.device))
        lines, columns = view.ids // view.width, view.ids % view.width
        image = torch.ones_like(columns, dtype=torch.bool)
        if view.line_end:
            image = columns < view.width - 1
        near = image & (view.step - lines <= self.radius)
        beside = (columns.unsqueeze(2) - view.columns.unsqueeze(-1)).abs() <= self.radius
        return torch.stack(
            [(attention * (near.unsqueeze(2) & beside)).sum((2, 3)), (attention * image.unsqueeze(2)).sum((2, 3))],
            dim=-1,
        )

    def head_order(self, evidence: torch.Tensor) -> torch.Tensor:
        """Heads by the share of near attention, the broadest first; equal ones as they are numbered."""
        near, everything = evidence.unbind(-1)
        return (near / everything.clamp_min(torch.finfo(near.dtype).tiny)).argsort(dim=-1, stable=True)

    def rank(self, view: StepView) -> Ranking:
        queries = torch.arange(view.query.shape[2], device=view.query.device)
        scores = view.attention_columns(queries) / len(queries)
        if view.stored_carried is not None:
            old = scores[..., : view.num_stored]
            old.mul_(1 - self.decay).add_(view.stored_carried, alpha=self.decay)
        return Ranking(scores, self._tiers(view, scores), scores)

    def scored_queries(self, label: str, length: int) -> int:
        return length

    def _tiers(self, view: StepView, scores: torch.Tensor) -> torch.Tensor:
        """2 for the last lines, 1 for the best of every stratum as far as its quota goes, 0 for the rest."""
        width = view.key.shape[2]
        anchors = self.anchors * width
        # No length is smaller than what is protected.
        recent = max(1, min(RECENT_LINES, (view.store - anchors) // (2 * width)))
        lines = view.ids // width
        ages = (view.step - lines - recent).masked_fill(lines < self.anchors, -1)
        # The first age of every stratum but the youngest: 2, 6, 14, ...
        starts = torch.tensor(
            [YOUNGEST_LINES * (2**index - 1) for index in range(1, self.strata)], device=scores.device
        )
        stratum = torch.bucketize(ages, starts, right=True)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        old = (ages >= 0).gather(-1, order).unsqueeze(-1)
        members = (stratum.gather(-1, order).unsqueeze(-1) == torch.arange(self.strata, device=scores.device)) & old
        place = (members.cumsum(2) * members).sum(-1)
        quotas = shared_quotas(members.sum(2), (view.store - anchors - recent * width) // self.strata)
        within = (place > 0) & (place <= (members * quotas.unsqueeze(2)).sum(-1))
        tiers = torch.zeros_like(ages).scatter_(-1, order, within.long())
        return tiers.masked_fill_(ages < 0, 2)


def shared_quotas(present: torch.Tensor, share: int) -> torch.Tensor:
    """
    What every stratum may keep: an equal share, and what the younger ones left of theirs.

    Args:
        present (`torch.Tensor`):
            Tokens of each stratum, `[..., strata]`, the youngest first.
        share (`int`):
            Tokens that each may keep by itself.
    """
    quotas, spare = [], torch.zeros_like(present[..., 0])
    for tokens in present.unbind(-1):
        quota = torch.minimum(tokens, spare + share)
        quotas.append(quota)
        spare = spare + share - quota
    return torch.stack(quotas, dim=-1)
