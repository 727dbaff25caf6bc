"""What a method is shown of models that draw token by token, at the end of a line of tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch

from .base import Plan, StepView


@dataclass(frozen=True)
class LineView(StepView):
    """
    One head group of one layer at the end of a line, which is the step of such a model: a line's tokens are its current
    ones, and ids count image tokens. Heads are those that have keys of their own; the queries of all heads that share keys
    are averaged.

    Besides what [`StepView`] says:

    Args:
        query (`torch.Tensor`):
            `[rows, heads, observed, sharing, head_dim]`: of the observed columns of the line, from each of the query heads
            that share a key head.
        columns (`torch.Tensor`):
            Which columns were observed, `[observed]`, ascending.
        condition_key (`torch.Tensor`):
            Keys of the prompt or class, which is always kept and never ranked, `[rows, heads, condition, head_dim]`.
        mask (`torch.Tensor`, *optional*):
            Which tokens may be attended to, boolean `[rows, heads or 1, condition + present]`; all by default.
        line_end (`bool`, *optional*, defaults to `False`):
            Whether the last token of a line only ends it.
    """

    columns: torch.Tensor = None  # type: ignore[assignment]
    condition_key: torch.Tensor = None  # type: ignore[assignment]
    mask: torch.Tensor | None = None
    line_end: bool = False

    @property
    def width(self) -> int:
        """Tokens of a line."""
        return self.key.shape[2]

    def attention_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Attention of some of the observed queries to all present image tokens, a mean over the heads that share keys.

        Args:
            positions (`torch.Tensor`):
                Which of the observed queries, `[queries]`.

        Returns:
            `torch.Tensor`: `[rows, heads, queries, present]` in float32. What the condition got is missing: rows sum to at
            most 1.
        """
        query = self.query[:, :, positions].float() * self.scale
        sharing = query.shape[3]
        key = torch.cat((self.condition_key, self.stored_key, self.key), dim=2).float()
        logits = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (-1, sharing))
        condition, before = self.condition_key.shape[2], key.shape[2] - self.width
        later = torch.arange(self.width, device=key.device) > self.columns[positions].unsqueeze(-1)
        logits[..., before:].masked_fill_(later.unsqueeze(1), -torch.inf)
        if self.mask is not None:
            logits.masked_fill_(~self.mask[:, :, None, None], -torch.inf)
        return logits.softmax(-1).mean(3)[..., condition:]


class TellsHeads(ABC):
    """
    What a method adds that tells heads apart while an image is drawn: after some lines, the heads of each row take places in
    the groups of the plan, whose lengths are known before.
    """

    @abstractmethod
    def identifying_steps(self, plan: Plan) -> range:
        """
        Lines at whose end evidence is gathered; none leaves the heads in the order of their numbers.

        Args:
            plan ([`Plan`]):
                Of the image.
        """

    @abstractmethod
    def head_evidence(self, view: LineView) -> torch.Tensor:
        """What one line tells of the heads, `[rows, heads, numbers]`; sums over the lines are looked at."""

    @abstractmethod
    def head_order(self, evidence: torch.Tensor) -> torch.Tensor:
        """Which head takes each place of the plan's groups, `[rows, places]`, from `[rows, heads, numbers]`."""


@lru_cache(maxsize=256)
def even_columns(width: int, count: int) -> tuple[int, ...]:
    """`count` columns of a line at equal distances, the last one among them; all where it has no more."""
    return (
        tuple(width - 1 - i * width // count for i in reversed(range(count))) if count < width else tuple(range(width))
    )
