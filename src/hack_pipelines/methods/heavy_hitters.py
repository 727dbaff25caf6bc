"""Tokens that got much attention in all steps so far, as H2O, LOOK-M and MEDA keep them, and merges of the others."""

from collections.abc import Callable

import torch

from .base import Ranking, StepView
from .baseline import recent_tiers
from .hack import Shares


# Tokens at the beginning that LOOK-M and MEDA never lose, and the smallest budget whose half of heavy hitters holds them.
SINKS, HALF_WITH_SINKS = 4, 7


def heavy_hitters(view: StepView, sinks: int = 0, normalise: str = "sum") -> Ranking:
    """
    Half of what is kept are the most recent tokens, half those with the most attention; every token carries its sum.

    Args:
        view ([`StepView`]):
            The step.
        sinks (`int`, *optional*, defaults to 0):
            First tokens that go before all others.
        normalise (`"sum"` or `"mean"`, *optional*, defaults to `"sum"`):
            Whether a step adds the sum over its queries, or their mean.
    """
    tokens = view.query.shape[2]
    carried = view.attention_columns(torch.arange(tokens, device=view.query.device))
    if normalise == "mean":
        carried /= tokens
    if view.stored_carried is not None:
        carried[:, :, : view.num_stored] += view.stored_carried
    return Ranking(carried, recent_tiers(view, view.num_kept // 2, sinks), carried)


def average(cosines: torch.Tensor, dropped: torch.Tensor, num_dropped: int) -> Shares:
    """Dropped tokens as they are."""
    return Shares(dropped.float())


def pivot(cosines: torch.Tensor, dropped: torch.Tensor, num_dropped: int) -> Shares:
    """The middle between every dropped token and the one that it is merged into."""
    return Shares(dropped.float(), torch.full_like(cosines, 0.5), kept=0.5)


def weighted(cosines: torch.Tensor, dropped: torch.Tensor, num_dropped: int) -> Shares:
    """
    Dropped tokens times their cosine, of those alone whose cosine is at least the row's mean.

    A cosine is here the mean over heads of those tokens that are the `i`-th dropped ones of each head, as in the original.
    """
    order = dropped.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :num_dropped]
    by_place = cosines.gather(-1, order).mean(1)
    # One row after the other: a reduction of several may sum in another order.
    similar = torch.stack([own >= own.mean() for own in by_place])
    merged = similar.float().unsqueeze(1).expand(order.shape)
    return Shares(torch.zeros_like(cosines).scatter(-1, order, merged), cosines)


MERGES: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Shares]] = {
    "pivot": pivot,
    "average": average,
    "weighted": weighted,
}
