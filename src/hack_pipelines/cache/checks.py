"""What a cache demands of a method that may be anybody's, in terms of the method."""

from collections.abc import Iterable, Sequence

from ..methods.base import LayerPlan, Method, Ranking, StepView


def check_ranking(method: Method, view: StepView, ranking: Ranking):
    """
    Refuse a ranking that is not one of the present tokens. Reads shapes only, so that no GPU is waited for.

    Args:
        method ([`Method`]):
            Whose ranking it is.
        view ([`StepView`]):
            What the method was shown.
        ranking ([`Ranking`]):
            What it answered.

    Raises:
        `ValueError`: if there are scores of other tokens, or what tokens carry is missing or not announced.
    """
    shape = (*view.key.shape[:2], view.num_present)
    for field in ("scores", "store_scores", "carried", "tiers"):
        tensor = getattr(ranking, field)
        if tensor is None or tensor.shape == shape or (field == "tiers" and tensor.shape == shape[-1:]):
            continue
        if tensor.ndim and tensor.shape[-1] != view.num_present:
            raise ValueError(
                f"Method {method.name!r} ranked {tensor.shape[-1]} tokens (`{field}`), but {view.num_present} are present "
                f"({view.num_stored} of the history, then {view.key.shape[2]} of the current scale)."
            )
        raise ValueError(
            f"`{field}` of method {method.name!r} must be [rows, heads, present] = {list(shape)} but is {list(tensor.shape)}."
        )
    if ranking.carried is None and method.carries_scores and view.store:
        raise ValueError(
            f"Method {method.name!r} says `carries_scores = True`, but its ranking gives the tokens nothing to carry: return "
            "`Ranking(..., carried=...)`."
        )
    if ranking.carried is not None and not method.carries_scores:
        raise ValueError(
            f"Method {method.name!r} returns `Ranking(..., carried=...)`, but the budget has no room for it: set "
            "`carries_scores = True` in its class, or leave `carried` out."
        )


def check_held(method: Method, budget: int, layers: Sequence[LayerPlan], steps: Iterable[int]):
    """
    Refuse lengths that exceed a budget between two steps, averaged over layers and heads.

    Args:
        method ([`Method`]):
            Whose plan it is.
        budget (`int`):
            Tokens per head that were asked for.
        layers (`Sequence[LayerPlan]`):
            The plan of every layer.
        steps (`Iterable[int]`):
            Steps after which to look.

    Raises:
        `ValueError`: if more is held after one of them.
    """
    heads = sum(len(group) for layer in layers for group in layer.groups)
    for step in steps:
        held = sum(len(group) * count for layer in layers for group, count in zip(layer.groups, layer.store[step]))
        if held > budget * heads:
            raise ValueError(
                f"The plan of method {method.name!r} holds {held / heads:.6g} tokens a head after step {step}, but {budget} "
                "were asked for: a plan has to keep its budget on the average of all layers and heads."
            )
