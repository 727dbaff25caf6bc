"""`hack-pipelines memory --table`: which models fit on which cards, and how many pictures at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..memory import Request


GB = 10**9
CARDS = tuple(size * GB for size in (8, 12, 16, 24))
# What models draw besides their largest size.
MORE_SIZES = {"2b": (512, 512)}
BATCH_BUDGETS = (None, 0.3, 0.1)


def table_lines(request: "Request", cards: Sequence[int]) -> list[str]:
    """
    Two tables in Markdown, of all models: what fits, and how many pictures fit together.

    Args:
        request ([`Request`]):
            Of any model: method, dtype, guidance and length of the prompts count for all.
        cards (`Sequence[int]`):
            Bytes of the cards.
    """
    from ..memory import MODELS

    requests = []
    for model in MODELS:
        requests.append(replace(request, model=model, size=None, kv_budget=None))
        if model in MORE_SIZES:
            requests.append(replace(requests[-1], size=MORE_SIZES[model]))
    names = [f"{entry.model}, {entry.wanted_size[0]}x{entry.wanted_size[1]}" for entry in requests]
    heads = ["model", *(f"{card / GB:g} GB" for card in cards)]
    fitting = [[name, *(fit_cell(entry, card) for card in cards)] for name, entry in zip(names, requests)]
    together = [[name, *(batch_cell(entry, card) for card in cards)] for name, entry in zip(names, requests)]
    return [
        "largest kv_budget with which one picture fits",
        "",
        *markdown(heads, fitting),
        "",
        f"pictures at a time, all weights on the card: kv_budget {', '.join(map(str, BATCH_BUDGETS)).lower()}",
        "",
        *markdown(heads, together),
    ]


def fit_cell(request: "Request", card: int) -> str:
    """How one picture fits on a card, without a budget if it can be."""
    from ..memory import fit

    fitting = fit(request, card)
    if fitting.spare >= 0:
        return f"no budget needed, {fitting.spare / GB:.2f} GB left"
    offload = "any" if fitting.spare_offload >= 0 else fitting.budget_offload
    ways = [] if fitting.budget is None else [str(fitting.budget)]
    ways += [] if offload is None else [f"{offload} with offload"]
    return ", ".join(ways) or "does not fit"


def batch_cell(request: "Request", card: int) -> str:
    """The most pictures that a card takes at a time, at each of the budgets."""
    counts = [largest_batch(replace(request, kv_budget=budget), card) for budget in BATCH_BUDGETS]
    return ", ".join(map(str, counts)) if any(counts) else "none"


def largest_batch(request: "Request", card: int) -> int:
    """The most pictures that fit together with all weights on a card."""
    from ..memory import estimate

    def fits(images: int) -> bool:
        return estimate(replace(request, images=images)).total <= card

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its columns aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
