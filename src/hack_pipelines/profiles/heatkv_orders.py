"""Order files of HeatKV (arXiv 2605.14877): which head loses a scale first, without the scores behind it."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..methods.heatkv import profile_scores, pruning_orders
from ..schedule import Schedule


if TYPE_CHECKING:
    from .head_profile import HeadProfile


ORIGIN = "HeatKV order file"
SCORES_SUFFIX = ".scores.json"


def read_orders(
    path: Path, schedule: Schedule, sinks: int, num_layers: int | None = None, num_heads: int | None = None
) -> np.ndarray:
    """
    The lists of an order file, each a permutation of all heads.

    Args:
        path (`Path`):
            JSON list of a list for each source scale from the first that is no sink to the last but one, of pairs
            `[head, layer]`, counted from 0, in the order in which heads lose that scale.
        schedule (`Schedule`):
            The scales that it was made for.
        sinks (`int`):
            First scales, which it has no lists for.
        num_layers, num_heads (`int`, *optional*):
            Of the model. What the pairs reach to by default; then lists whose pairs are all swapped are not noticed.

    Returns:
        `np.ndarray`: `[num_scales - 1 - sinks, num_layers * num_heads, 2]`.

    Raises:
        `ValueError`: naming the list and what is wrong with it.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    wanted = len(schedule) - 1 - sinks
    if not 0 <= sinks < len(schedule) - 1:
        raise ValueError(
            f"`sinks` must be at least 0 and leave a scale to order, at most {len(schedule) - 2} of {len(schedule)} "
            f"scales, but is {sinks}."
        )
    if not isinstance(lists, list) or len(lists) != wanted:
        count = len(lists) if isinstance(lists, list) else "no"
        raise ValueError(
            f"{path} has {count} lists, but {len(schedule)} scales, of which the first {sinks} are sinks and the last is "
            f"never stored, need {wanted}."
        )
    for index, order in enumerate(lists):
        check_pairs(f"List {index} of {path}", order)
    pairs = [pair for order in lists for pair in order]
    heads = num_heads or 1 + max((head for head, _ in pairs), default=0)
    layers = num_layers or 1 + max((layer for _, layer in pairs), default=0)
    for index, order in enumerate(lists):
        check_order(f"List {index} of {path}", [tuple(pair) for pair in order], layers, heads)
    return np.array(lists)


def check_pairs(what: str, order: Any):
    """Refuse what is no list of pairs of whole numbers."""
    if not isinstance(order, list):
        raise ValueError(f"{what} is no list but {order!r}.")
    for pair in order:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(number) is not int for number in pair):
            raise ValueError(f"{what} must hold pairs [head, layer] but holds {pair!r}.")


def check_order(what: str, order: list[tuple[int, ...]], num_layers: int, num_heads: int):
    """Refuse pairs that are no permutation of all heads."""
    wanted = {(head, layer) for layer in range(num_layers) for head in range(num_heads)}
    outside = [pair for pair in order if pair not in wanted]
    model = f"{num_layers} layers of {num_heads} heads"
    if outside:
        swapped = all(pair[::-1] in wanted for pair in order)
        hint = " All would be inside as [layer, head]: swap them." if swapped else ""
        raise ValueError(
            f"{what} holds {list(outside[0])}, which is outside a model with {model}: pairs are [head, layer]. "
            f"{len(outside)} of its pairs are.{hint}"
        )
    twice = [pair for pair, count in Counter(order).items() if count > 1]
    missing = sorted(wanted - set(order))
    if missing:
        head, layer = missing[0]
        again = f" and has {list(twice[0])} more than once" if twice else ""
        hint = ", which looks like that pair swapped" if twice and twice[0][::-1] in missing else ""
        raise ValueError(
            f"{what} lacks [{head}, {layer}], head {head} of layer {layer}{again}{hint}. It has {len(order)} pairs and must "
            f"hold each of the {len(wanted)} heads of a model with {model} once."
        )
    if twice:
        raise ValueError(
            f"{what} has {len(order)} pairs, but a model with {model} has {len(wanted)} heads: {list(twice[0])} is there "
            "more than once."
        )


def synthetic_mass(orders: np.ndarray, schedule: Schedule, sinks: int) -> torch.Tensor:
    """
    Attention that would give these orders: on each source scale the rank of the head, the same in all later steps, and
    what is left to 1 on the step's own scale.

    Args:
        orders (`np.ndarray`):
            As [`read_orders`] gives them.
        schedule (`Schedule`):
            The scales.
        sinks (`int`):
            First scales, which get nothing from later ones.

    Returns:
        `torch.Tensor`: `[num_layers, num_heads, num_scales, num_scales]` in float32.
    """
    heads, layers = orders.reshape(-1, 2).max(0) + 1
    scales, count = len(schedule), orders.shape[1]
    mass = torch.zeros(layers, heads, scales, scales, dtype=torch.float64)
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / (count * scales)
    for source, order in enumerate(torch.from_numpy(orders), sinks):
        mass[order[:, 1], order[:, 0], source + 1 :, source] = ranks[:, None]
    mass.diagonal(dim1=-2, dim2=-1).copy_(1 - mass.sum(-1))
    return mass.float()


def arguments_from_orders(
    path: str | Path, schedule: Schedule, sinks: int, num_layers: int | None, num_heads: int | None
) -> dict[str, Any]:
    """What a [`HeadProfile`] is made of, as far as an order file says it."""
    from .. import __version__

    path = Path(path)
    orders = read_orders(path, schedule, sinks, num_layers, num_heads)
    mass = synthetic_mass(orders, schedule, sinks)
    return {
        "mean": {"mass": mass},
        "variance": {"mass": torch.zeros_like(mass)},
        "num_layers": mass.shape[0],
        "num_heads": mass.shape[1],
        "schedule": [list(size) for size in schedule.sizes],
        "dtype": "unknown",
        "sampling": {"source": ORIGIN, "sinks": sinks},
        "inputs": [f"{ORIGIN} {path.name}"],
        "seeds": [0],
        "software": {"hack_pipelines": __version__},
    }


def write_orders(profile: "HeadProfile", facts: dict[str, Any], path: str | Path, sinks: int):
    """
    Write the orders of a profile, and beside them the scores that they come from.

    Args:
        profile ([`HeadProfile`]):
            With `mass`.
        facts (`dict`):
            How it was made, for the file of scores.
        path (`str` or `Path`):
            File of the orders; the scores go to the same name with `.scores.json` in the place of its suffix.
        sinks (`int`):
            First scales, which no head loses.
    """
    path = Path(path)
    scores = profile_scores(profile, sinks)
    orders = pruning_orders(scores)
    # With the indents of the released files.
    path.write_text(json.dumps(orders.tolist(), indent=4), encoding="utf-8")
    ranked = [source[order[:, 1], order[:, 0]].tolist() for source, order in zip(scores, orders)]
    text = json.dumps({**facts, "sinks": sinks, "scores": ranked}, ensure_ascii=False)
    path.with_suffix(SCORES_SUFFIX).write_text(text + "\n", encoding="utf-8")
