"""What a user may write as a budget, and how many tokens that is."""

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from ..methods.base import Geometry, Method, Plan
from .checks import check_held


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
BYTES_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)
EXPECTED = (
    "a fraction of the full cache (a float in (0, 1]), a number of tokens per head (an int), or bytes per image such as "
    '"64MB" or "1.5GiB"'
)


@dataclass(frozen=True)
class TokenBytes:
    """
    What a token costs.

    Args:
        rows_per_image (`int`):
            1, or 2 with guidance.
        itemsize (`int`):
            Bytes of a stored element.
        metadata (`int`, *optional*, defaults to 0):
            Bytes that a token of a head needs beside its key and value.
    """

    rows_per_image: int
    itemsize: int
    metadata: int = 0

    def per_token(self, geometry: Geometry) -> int:
        """Bytes of one token in all layers and heads of an image."""
        of_a_head = geometry.head_dim * 2 * self.itemsize + self.metadata
        return self.rows_per_image * geometry.num_layers * geometry.num_heads * of_a_head


def budget_tokens(
    budget: float | int | str, geometry: Geometry, token_bytes: TokenBytes, name: str = "kv_budget"
) -> int:
    """
    A budget in tokens per layer and head, `B`.

    Args:
        budget (`float`, `int` or `str`):
            A fraction of the full cache in (0, 1], a number of tokens, or bytes per image; "MB" is 10^6 bytes and "MiB"
            is 2^20.
        geometry (`Geometry`):
            Of the model.
        token_bytes (`TokenBytes`):
            What a token costs, for budgets in bytes.
        name (`str`, *optional*, defaults to `"kv_budget"`):
            What the error message calls it.

    Returns:
        `int`: tokens, at least 0.

    Raises:
        `TypeError`: if it is neither a number nor a string.
        `ValueError`: if the number or the string is not a budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, (Real, str)):
        raise TypeError(f"`{name}` must be {EXPECTED}, but is {budget!r} of type {type(budget).__name__}.")
    if isinstance(budget, str):
        match = BYTES_PATTERN.fullmatch(budget)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"`{name}` must be {EXPECTED}, but is {budget!r}.")
        available = int(float(match[1]) * UNITS[match[2].lower()])
        return available // token_bytes.per_token(geometry)
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(f"`{name}` must be at least 1 token when it is an int, but is {budget!r}.")
        return int(budget)
    value = float(budget)
    if not 0 < value <= 1:
        hint = f" For {math.floor(value)} tokens write an int." if value > 1 and math.isfinite(value) else ""
        raise ValueError(f"`{name}` must be {EXPECTED}, but is {budget!r}.{hint}")
    # The epsilon keeps 0.7 * 680 = 475.99999999999994 at 476 tokens.
    return math.floor(value * geometry.schedule.total + 1e-6)


def make_plan(
    method: Method,
    geometry: Geometry,
    profile: "HeadProfile | None",
    token_bytes: TokenBytes,
    kv_budget: float | int | str | None,
    attention_budget: float | int | str | None = None,
) -> Plan:
    """
    The plan of a method, after a look at the budgets.

    Args:
        method ([`Method`]):
            Plans.
        geometry (`Geometry`):
            Of the model.
        profile ([`HeadProfile`], *optional*):
            Of the model.
        token_bytes (`TokenBytes`):
            What a token costs, for budgets in bytes.
        kv_budget (`float`, `int` or `str`, *optional*):
            What may stay stored between steps; `None` is all that a later step reads.
        attention_budget (`float`, `int` or `str`, *optional*):
            What a step may attend to; `None` is what the method does by itself.

    Raises:
        `TypeError`: if a budget is neither a number nor a string.
        `ValueError`: if a budget cannot be met, with the smallest that can, or the method's plan exceeds it.
    """
    total = geometry.schedule.total
    budget = geometry.schedule.cacheable if kv_budget is None else budget_tokens(kv_budget, geometry, token_bytes)
    smallest = method.min_budget(geometry, profile)
    if budget < smallest:
        raise ValueError(
            f"`kv_budget={kv_budget!r}` leaves {budget} tokens a head, but method {method.name!r} needs at least "
            f"{smallest}: set `kv_budget` to {smallest} (tokens), {round(smallest / total + 5e-5, 4)} (of {total}) or "
            f'"{smallest * token_bytes.per_token(geometry)}B" or more.'
        )
    if method.protocol != "decoupled":
        if attention_budget is not None:
            raise ValueError(
                f"`attention_budget` is {attention_budget!r}, but method {method.name!r} ties what a step attends to to "
                "what it stores: leave `attention_budget` out and set `kv_budget`."
            )
        return within(budget, method, method.plan(geometry, budget, profile))
    wanted = method.attention_budget if attention_budget is None else attention_budget
    attended = total if wanted is None else budget_tokens(wanted, geometry, token_bytes, "attention_budget")
    if attended < smallest:
        raise ValueError(
            f"`attention_budget={wanted!r}` leaves {attended} tokens a head, but method {method.name!r} needs at least "
            f"{smallest}: set `attention_budget` to {smallest} (tokens) or {round(smallest / total + 5e-5, 4)} (of {total}) "
            "or more."
        )
    return within(budget, method, method.plan(geometry, budget, profile, attended))


def within(budget: int, method: Method, plan: Plan) -> Plan:
    """The plan, once it is known to keep the budget that was asked for, whichever it says it has."""
    check_held(method, budget, plan.layers, range(len(plan.schedule)))
    return plan
