"""What may be written as a budget."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hack_pipelines.cache.budget import TokenBytes, budget_tokens
from hack_pipelines.methods import Geometry
from hack_pipelines.schedule import Schedule


VAR_D30 = Geometry(Schedule.from_sides((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 30, 30, 64)
GUIDED_HALF = TokenBytes(rows_per_image=2, itemsize=2)


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (1.0, 680),
        (0.7, 476),
        (0.3, 204),
        (0.1, 68),
        (np.float32(0.5), 340),
        (340, 340),
        (np.int64(12), 12),
        (10_000, 10_000),
        ("460800B", 1),
        ("64MB", 64_000_000 // 460_800),
        ("64 MiB", 64 * 2**20 // 460_800),
        ("0.5gb", 500_000_000 // 460_800),
        ("1.5KiB", 0),
    ],
)
def test_units(budget, tokens):
    assert budget_tokens(budget, VAR_D30, GUIDED_HALF) == tokens


def test_bytes_of_a_token_are_those_of_the_specification():
    assert GUIDED_HALF.per_token(VAR_D30) == 2 * 230_400
    assert TokenBytes(1, 4).per_token(VAR_D30) == 2 * 230_400


@given(st.integers(1, 680))
def test_every_fraction_is_rounded_to_its_tokens(tokens):
    assert budget_tokens(tokens / 680, VAR_D30, GUIDED_HALF) == tokens


@given(st.integers(1, 10**12))
def test_bytes_never_buy_more_than_they_pay_for(size):
    tokens = budget_tokens(f"{size}B", VAR_D30, GUIDED_HALF)
    assert tokens * GUIDED_HALF.per_token(VAR_D30) <= size < (tokens + 1) * GUIDED_HALF.per_token(VAR_D30)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, math.nan, math.inf, -math.inf, 0, -3])
def test_numbers_out_of_range(budget):
    with pytest.raises(ValueError, match="kv_budget"):
        budget_tokens(budget, VAR_D30, GUIDED_HALF)


def test_a_large_float_is_told_about_tokens():
    with pytest.raises(ValueError, match="For 204 tokens write an int"):
        budget_tokens(204.0, VAR_D30, GUIDED_HALF)


@pytest.mark.parametrize("budget", ["", "64", "MB", "64XB", "-1MB", "1e3MB", "64MB please", "nanMB", "½GB"])
def test_malformed_strings(budget):
    with pytest.raises(ValueError, match="64MB"):
        budget_tokens(budget, VAR_D30, GUIDED_HALF)


@pytest.mark.parametrize("budget", [True, False, [0.5], {"b": 1}, b"64MB", 1j])
def test_wrong_types(budget):
    with pytest.raises(TypeError, match="kv_budget"):
        budget_tokens(budget, VAR_D30, GUIDED_HALF)
