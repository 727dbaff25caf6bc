"""Plans, selection and the ranking of every method, against oracles written with loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hack_pipelines.cache import make_cache
from hack_pipelines.cache.budget import TokenBytes, make_plan
from hack_pipelines.cache.head_group import kept_of
from hack_pipelines.memory import even_profile
from hack_pipelines.methods import (
    HACK,
    METHODS,
    Geometry,
    LayerPlan,
    Plan,
    Random,
    ScaleWindow,
    StepView,
    base,
    get_method,
)
from hack_pipelines.methods import hack as hack_method
from hack_pipelines.methods.hack import CONTEXTUAL, STRUCTURAL, add_by_target, merge_by_cosine
from hack_pipelines.methods.scale_window import even_subsample, kept_ids
from hack_pipelines.methods.selection import lattice_positions, linspace_positions, observed_positions, top
from hack_pipelines.schedule import Schedule

from .components import FixedTypes, half_contextual


VAR_256 = Schedule.from_sides((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
VAR_512 = Schedule.from_sides((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
INFINITY_1M = Schedule.from_sides((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
WIDE = Schedule(((1, 1), (1, 3), (2, 5), (3, 8), (5, 14)))

schedules = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=6).map(
    lambda sizes: Schedule(tuple(sorted(sizes, key=lambda size: size[0] * size[1])))
)


def view_of(schedule, step, num_stored, label=STRUCTURAL, rows=2, heads=2, dim=8, seed=0, **overrides):
    generator = torch.Generator().manual_seed(seed)
    tokens = schedule.lengths[step]
    parts = {
        name: torch.randn(rows, heads, count, dim, generator=generator)
        for name, count in (("query", tokens), ("key", tokens), ("value", tokens))
    }
    stored = {
        name: torch.randn(rows, heads, num_stored, dim, generator=generator) for name in ("stored_key", "stored_value")
    }
    fields = {
        "schedule": schedule,
        "step": step,
        "layer": 0,
        "heads": tuple(range(heads)),
        "label": label,
        "budget": schedule.total,
        "attend": num_stored + tokens,
        "store": 0,
        "scale": 1.0,
        "guided": False,
    }
    return StepView(**{**fields, **parts, **stored, **overrides})


# -- selection ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_top_is_score_then_smaller_position(data):
    tokens = data.draw(st.integers(1, 40))
    values = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e-30, -1e-30, 3e38, float(np.float32(0.1))])
    scores = data.draw(st.lists(values, min_size=tokens, max_size=tokens))
    tiers = data.draw(st.lists(st.integers(0, 7), min_size=tokens, max_size=tokens))
    count = data.draw(st.integers(1, tokens))
    wanted = sorted(sorted(range(tokens), key=lambda j: (-tiers[j], -scores[j], j))[:count])
    assert top(torch.tensor(scores), count, torch.tensor(tiers)).tolist() == wanted


def test_constant_scores_keep_the_smallest_positions():
    assert top(torch.ones(2, 3, 50), 7).tolist() == [[list(range(7))] * 3] * 2


INFINITY_TEMPLATES = """
1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56
1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54
1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52
1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48
1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45
1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40
1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37
"""
TEMPLATES = [
    [tuple(map(int, size.split("x"))) for size in line.split()] for line in INFINITY_TEMPLATES.strip().splitlines()
]
GRIDS = {size for schedule in (VAR_256, VAR_512, INFINITY_1M) for size in schedule.sizes}
GRIDS |= {size for template in TEMPLATES for height, width in template for size in ((height, width), (width, height))}


def test_lattice_covers_every_large_grid():
    assert len(GRIDS) > 134
    for size in sorted(GRIDS):
        if size[0] * size[1] > 64:
            positions = lattice_positions(size, 32)
            assert len(set(positions)) == 32
            assert len({position % size[1] for position in positions}) >= 0.75 * min(32, size[1])


def test_lattice_formula():
    height, width = 16, 16
    wanted = [
        math.floor((i + 0.5) * height / 32) * width + math.floor(width * math.modf((i + 0.5) * 0.6180339887498949)[0])
        for i in range(32)
    ]
    assert list(lattice_positions((height, width), 32)) == wanted


def test_equidistant_positions_are_degenerate():
    assert len({position % 64 for position in linspace_positions((64, 64), 32)}) == 1
    assert len({position % 16 for position in linspace_positions((16, 16), 32)}) == 2


def test_all_queries_observe_small_scales():
    device = torch.device("cpu")
    assert observed_positions((8, 8), 32, "lattice", device).tolist() == list(range(64))
    assert len(observed_positions((8, 9), 32, "lattice", device)) == 32


# -- plans -------------------------------------------------------------------------------------------------------------


def lengths(schedule, budget, alpha_types, **options):
    geometry = Geometry(schedule, *alpha_types.contextual.shape, 64)
    plan = HACK(**options).plan(geometry, budget, alpha_types)
    layer = plan.layers[0]
    return {label: ([a[i] for a in layer.attend], [s[i] for s in layer.store]) for i, label in enumerate(layer.labels)}


@pytest.mark.parametrize(
    ("schedule", "budget", "contextual", "structural"),
    [
        (VAR_256, 204, [1, 5, 14, 30, 55, 68, 68, 68, 68, 68], [1, 5, 14, 30, 55, 91, 155, 255, 340, 340]),
        (VAR_256, 340, [1, 5, 14, 30, 55, 91, 113, 113, 113, 113], [1, 5, 14, 30, 55, 91, 155, 255, 424, 567]),
        (
            INFINITY_1M,
            3156,
            [1, 5, 21, 57, 121, 265, 521, 921, 1052, 1052, 1052, 1052, 1052],
            [1, 5, 21, 57, 121, 265, 521, 921, 1497, 2521, 4121, 5260, 5260],
        ),
        (
            INFINITY_1M,
            1052,
            [1, 5, 21, 57, 121, 265, 350, 350, 350, 350, 350, 350, 350],
            [1, 5, 21, 57, 121, 265, 521, 921, 1497, 1754, 1754, 1754, 1754],
        ),
    ],
)
def test_hack_lengths_of_the_published_settings(schedule, budget, contextual, structural):
    held = lengths(schedule, budget, half_contextual(2, 4))
    assert held[CONTEXTUAL] == (contextual, contextual[:-1] + [0])
    assert held[STRUCTURAL] == (structural, structural[:-1] + [0])


@settings(max_examples=100, deadline=None)
@given(schedules, st.floats(0.02, 1.0), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 999))
def test_hack_plan_keeps_its_budget(schedule, fraction, layers, heads, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    types = FixedTypes(torch.rand(layers, heads, generator=generator) < 0.5)
    geometry = Geometry(schedule, layers, heads, 8)
    method = HACK(contextual_ratio=max(ratio, 0.01))
    budget = max(int(fraction * schedule.total), method.min_budget(geometry, types))
    plan = method.plan(geometry, budget, types)
    for step in range(len(schedule)):
        held = sum(
            len(group) * count for layer in plan.layers for group, count in zip(layer.groups, layer.store[step])
        )
        assert held <= budget * layers * heads
    assert all(count == 0 for layer in plan.layers for count in layer.store[-1])


def test_smallest_budgets():
    geometry = Geometry(VAR_256, 2, 4, 64)
    types = half_contextual(2, 4)
    method = HACK()
    smallest = method.min_budget(geometry, types)
    contextual, structural = method.budgets(smallest, 4, 4, 680)
    assert contextual >= 1 and structural > 5
    contextual, structural = method.budgets(smallest - 1, 4, 4, 680)
    assert contextual < 1 or structural <= 5
    assert Random().min_budget(geometry, None) == ScaleWindow().min_budget(geometry, None) == 6


def test_symmetric_budgets():
    assert HACK(contextual_ratio=1.0).budgets(204, 10, 10, 680) == (204, 204)
    assert HACK().budgets(680, 10, 10, 680) == (680, 680)
    assert HACK().budgets(204, 0, 20, 680) == (204, 204)


def test_plan_refuses_what_it_cannot_hold():
    layer = LayerPlan.from_limits(VAR_256, ((0, 1),), ("all",), [(300,)] * 10, "post")
    with pytest.raises(ValueError, match="budget of 200"):
        Plan(VAR_256, 200, (layer,))
    with pytest.raises(ValueError, match="every head once"):
        Plan(VAR_256, 680, (LayerPlan(((0, 2),), ("all",), layer.attend, layer.store),))
    with pytest.raises(ValueError, match="attends to"):
        Plan(VAR_256, 680, (LayerPlan(((0, 1),), ("all",), ((2,),) * 10, layer.store),))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"contextual_ratio": 0}, "contextual_ratio"),
        ({"n_obs": 0}, "n_obs"),
        ({"query_sampling": "grid"}, "query_sampling"),
        ({"merge_at": "always"}, "merge_at"),
        ({"cfg_sets": "both"}, "cfg_sets"),
        ({"rules": "none"}, "rules"),
        ({"protocol": "static"}, "protocol"),
    ],
)
def test_hack_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        HACK(**options)


def test_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match="'hack', 'hack\\+\\+'.*'value_norm'.*'nothing'"):
        get_method("nothing")
    assert [get_method(name).name for name in METHODS] == list(METHODS)
    instance = HACK(alpha=0.25)
    assert get_method(instance) is instance


# -- rankings ----------------------------------------------------------------------------------------------------------


def oracle_columns(view: StepView, positions) -> np.ndarray:
    """Attention per present token, summed over observed queries, with loops."""
    keys = torch.cat((view.stored_key, view.key), dim=2).double().numpy()
    queries = view.query.double().numpy() * view.scale
    result = np.zeros(keys.shape[:3])
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for position in positions:
                logits = np.array([queries[row, head, position] @ key for key in keys[row, head]])
                weights = np.exp(logits - logits.max())
                result[row, head] += weights / weights.sum()
    return result


@pytest.mark.parametrize(("step", "stored"), [(0, 0), (3, 20), (4, 13)])
def test_attention_columns_equal_the_oracle(step, stored):
    view = view_of(WIDE, step, stored, scale=0.7)
    positions = observed_positions(WIDE.sizes[step], 32, "lattice", torch.device("cpu"))
    scores = HACK().rank(view).scores
    np.testing.assert_allclose(scores.numpy(), oracle_columns(view, positions.tolist()), rtol=1e-4)


def test_all_queries_give_the_true_column_sums():
    view = view_of(VAR_256, 7, 60)
    scores = HACK(n_obs=100).rank(view).scores
    keys = torch.cat((view.stored_key, view.key), dim=2)
    torch.testing.assert_close(scores, (view.query @ keys.transpose(-1, -2)).softmax(-1).sum(2))


def structural_oracle(scores, num_stored, step, schedule, count):
    """Kept positions of the structural rule for one head, by explicit sets."""
    first = set(range(min(schedule.lengths[0] + schedule.lengths[1], num_stored)))
    current = set(range(num_stored, len(scores)))
    between = set(range(num_stored)) - first
    best = lambda pool, n: set(sorted(pool, key=lambda j: (-scores[j], j))[:n])  # noqa: E731
    room = count - len(first) - len(current)
    if room >= 0:
        return sorted(first | current | best(between, room))
    return sorted(first | best(current, count - len(first)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(0, 60), st.integers(6, 110), st.integers(0, 99))
def test_structural_rule(step, more, count, seed):
    num_stored = 4 + more
    view = view_of(WIDE, step, num_stored, seed=seed)
    count = min(count, view.num_present - 1)
    scores, tiers = HACK().rank(view)[:2]
    kept = top(scores, count, tiers)
    for row in range(2):
        for head in range(2):
            wanted = structural_oracle(scores[row, head].tolist(), num_stored, step, WIDE, count)
            assert kept[row, head].tolist() == wanted


def test_contextual_rule_protects_nothing():
    scores, tiers = HACK().rank(view_of(WIDE, 3, 20, label=CONTEXTUAL))[:2]
    assert tiers is None
    assert HACK(rules="swapped").rank(view_of(WIDE, 3, 20, label=CONTEXTUAL))[1] is not None
    assert HACK(rules="swapped").rank(view_of(WIDE, 3, 20, label=STRUCTURAL))[1] is None
    assert HACK(rules="contextual").rank(view_of(WIDE, 3, 20, label=STRUCTURAL))[1] is None
    assert HACK(rules="contextual").rank(view_of(WIDE, 3, 20, label=CONTEXTUAL))[1] is None


def test_unconditional_rows_can_follow():
    view = view_of(WIDE, 3, 20, rows=4, guided=True)
    separate = HACK().rank(view).scores
    followed = HACK(cfg_sets="from_cond").rank(view).scores
    assert torch.equal(followed[:2], separate[:2]) and torch.equal(followed[2:], separate[:2])
    assert not torch.equal(separate[2:], separate[:2])


def merge_oracle(view, kept, row, head):
    keys = torch.cat((view.stored_key, view.key), dim=2)[row, head].double().numpy()
    values = torch.cat((view.stored_value, view.value), dim=2)[row, head].double().numpy()
    kept = kept[row, head].tolist()
    key, value, total = keys[kept].copy(), values[kept].copy(), np.ones(len(kept))
    for evicted in set(range(len(keys))) - set(kept):
        cosines = [keys[evicted] @ keys[r] / np.linalg.norm(keys[evicted]) / np.linalg.norm(keys[r]) for r in kept]
        target = int(np.argmax(cosines))
        weight = max(0.0, cosines[target])
        key[target] += weight * keys[evicted]
        value[target] += weight * values[evicted]
        total[target] += weight
    return key / total[:, None], value / total[:, None]


@pytest.mark.parametrize("stored", [0, 17])
def test_merge_equals_the_oracle(stored):
    view = view_of(WIDE, 4, stored, label=CONTEXTUAL)
    keys = torch.cat((view.stored_key, view.key), dim=2)
    values = torch.cat((view.stored_value, view.value), dim=2)
    kept = top(torch.rand(2, 2, view.num_present), 9)
    index = kept.unsqueeze(-1).expand(-1, -1, -1, 8)
    merged = HACK().merge(view, kept, keys.gather(2, index), values.gather(2, index))
    for row in range(2):
        for head in range(2):
            for part, wanted in zip(merged, merge_oracle(view, kept, row, head)):
                np.testing.assert_allclose(part[row, head].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_sums_by_target_are_those_of_a_product():
    target, weights = torch.randint(0, 5, (2, 3, 40)), torch.rand(2, 3, 40)
    values = torch.randn(2, 3, 40, 8)
    assignment = torch.nn.functional.one_hot(target, 5).transpose(-1, -2) * weights.unsqueeze(2)
    sums = torch.ones(2, 3, 5, 8)
    add_by_target([sums], target, weights, [values])
    torch.testing.assert_close(sums, 1 + assignment @ values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [0, 170])
def test_chunks_change_no_bit(monkeypatch, dtype, stored):
    schedule = Schedule.from_sides((1, 2, 20))
    whole = view_of(schedule, 2, stored, label=CONTEXTUAL, dim=16)
    parts = {name: getattr(whole, name).to(dtype) for name in ("query", "key", "value", "stored_key", "stored_value")}
    view = view_of(schedule, 2, stored, label=CONTEXTUAL, **parts)
    kept = top(torch.rand(2, 2, view.num_present), 60)
    own = kept_of(view, kept, None)
    scores, merged = HACK().rank(view)[0], merge_by_cosine(view, kept, *own)
    for tokens in (150, 64, 37):
        monkeypatch.setattr(hack_method, "MERGE_CHUNK", 2 * 60 * tokens)
        monkeypatch.setattr(base, "SCORED_KEYS", tokens)
        assert torch.equal(HACK().rank(view)[0], scores)
        assert all(torch.equal(*pair) for pair in zip(merge_by_cosine(view, kept, *own), merged))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_a_merge_never_holds_all_cosines(monkeypatch):
    monkeypatch.setattr(hack_method, "MERGE_CHUNK", 2**14)
    view = view_of(Schedule.from_sides((1, 2, 40)), 2, 1000, label=CONTEXTUAL)
    kept = top(torch.rand(2, 2, view.num_present), 200)
    own = kept_of(view, kept, None)
    with LargestTensor() as watch:
        merge_by_cosine(view, kept, *own)
    # A chunk of cosines in each of two rows, or what is there anyway: all present keys.
    assert watch.largest <= max(2 * 2**14, view.key.numel())


def test_merge_of_one_equal_and_of_orthogonal_tokens():
    schedule = Schedule(((1, 1), (1, 2)))
    unit = torch.eye(4)
    key = torch.stack((unit[0], unit[0])).view(1, 1, 2, 4)
    value = torch.tensor([[2.0, 0, 0, 0], [4.0, 0, 0, 0]]).view(1, 1, 2, 4)
    view = view_of(schedule, 1, 0, rows=1, heads=1, dim=4, key=key, value=value)
    merged_key, merged_value = merge_by_cosine(view, torch.tensor([[[0]]]), key[:, :, :1], value[:, :, :1])
    assert torch.equal(merged_key[0, 0, 0], unit[0]) and merged_value[0, 0, 0, 0] == 3
    key = torch.stack((unit[0], unit[1])).view(1, 1, 2, 4)
    view = view_of(schedule, 1, 0, rows=1, heads=1, dim=4, key=key, value=value)
    merged_key, merged_value = merge_by_cosine(view, torch.tensor([[[0]]]), key[:, :, :1], value[:, :, :1])
    assert torch.equal(merged_key, key[:, :, :1]) and torch.equal(merged_value, value[:, :, :1])


def test_merging_happens_where_it_should():
    kept = torch.zeros(2, 2, 1, dtype=torch.long)
    last, earlier = view_of(WIDE, 4, 20, label=CONTEXTUAL), view_of(WIDE, 3, 20, label=CONTEXTUAL)
    structural = view_of(WIDE, 4, 20, label=STRUCTURAL)

    def merges(method, view):
        key, value = view.key[:, :, :1], view.value[:, :, :1]
        return method.merge(view, kept, key, value)[0] is not key

    assert merges(HACK(), last) and not merges(HACK(), earlier) and not merges(HACK(), structural)
    assert merges(HACK(merge_at="every"), earlier) and not merges(HACK(merge_at="every"), structural)
    assert not merges(HACK(merge_at="never"), last)


def test_random_is_the_same_for_every_row_and_another_for_every_layer():
    method = Random(seed=3)
    scores = method.rank(view_of(WIDE, 4, 20, seed=1)).scores
    again = method.rank(view_of(WIDE, 4, 20, seed=2)).scores
    assert torch.equal(scores, again) and torch.equal(scores[0], scores[1])
    assert not torch.equal(scores, method.rank(view_of(WIDE, 4, 20, layer=1))[0])
    assert not torch.equal(scores, Random(seed=4).rank(view_of(WIDE, 4, 20))[0])


def test_scale_window_keeps_coarsest_and_newest():
    schedule = Schedule.from_sides((1, 2, 3, 4, 5))
    ids = kept_ids(schedule, 45, 4)
    assert set(range(5)) <= ids and set(range(30, 55)) <= ids
    assert len(ids & set(range(14, 30))) == 15 and not ids & set(range(5, 14))


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(0, 60))
def test_scale_window_sets_are_nested(schedule, more):
    budget = sum(schedule.lengths[:2]) + 1 + more
    before: frozenset[int] = frozenset()
    for step in range(len(schedule)):
        first = schedule.prefixes[step]
        present = before | set(range(first, first + schedule.lengths[step]))
        kept = kept_ids(schedule, budget, step)
        assert kept <= present and len(kept) == min(budget, len(present))
        before = kept


def test_even_subsample_spreads_over_both_axes():
    positions = even_subsample((16, 16), 32)
    assert len(set(positions)) == 32
    blocks = [(position // 64, position % 16 // 4) for position in positions]
    assert {blocks.count((row, column)) for row in range(4) for column in range(4)} <= {1, 2, 3}
    assert set(even_subsample((16, 16), 10)) <= set(positions)


# -- what methods say of themselves before anything is drawn ----------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        *METHODS,
        "cake:window=7",
        "hack:n_obs=300",
        "hack:merge_at=every,rules=swapped",
        "hack:merge_at=never",
        "hack:protocol=post,merge_at=every",
        "hack++:merge_at=final,attention_budget=0.2,n_obs=300",
        "headkv:n_obs=300",
        "scalekv:scoring=released",
        "scalekv:window=225",
        "snapkv:window_positions=uniform",
        "snapkv:window_positions=uniform,window=60",
    ],
)
def test_methods_say_what_they_score_and_merge(spec, monkeypatch):
    """The hooks that memory estimates ask, against what a run does."""
    schedule = Schedule.from_sides((1, 2, 3, 8, 17, 18))
    geometry = Geometry(schedule, 2, 4, 8)
    method = get_method(spec)
    plan = make_plan(method, geometry, even_profile(geometry), TokenBytes(2, 4), 260)
    scored, merged, ranked = {}, {}, set()
    attention_rows, rank, merge = StepView.attention_rows, method.rank, method.merge

    def spied_rows(view, positions):
        place = view.label, view.query.shape[2]
        scored[place] = max(len(positions), scored.get(place, 0))
        return attention_rows(view, positions)

    def spied_rank(view):
        ranked.add((view.label, view.query.shape[2]))
        return rank(view)

    def spied_merge(view, kept, key, value):
        result = merge(view, kept, key, value)
        merged[view.label, view.is_last] = result[0] is not key
        return result

    monkeypatch.setattr(StepView, "attention_rows", spied_rows)
    monkeypatch.setattr(method, "rank", spied_rank)
    monkeypatch.setattr(method, "merge", spied_merge)
    cache = make_cache(plan, method, guided=True)
    for length in schedule.lengths:
        for layer in range(2):
            query, key, value = torch.randn(3, 2, 4, length, 8)
            cache.attend(layer, query, key, value, projection=query)
    assert {place: method.scored_queries(*place) for place in scored} == scored
    assert {place: method.merges(*place) for place in merged} == merged
    # The released scores of ScaleKV are products with the sum of some projections.
    without = 1 if spec == "scalekv:scoring=released" else 0
    assert {place: method.scored_queries(*place) for place in ranked - set(scored)} == dict.fromkeys(
        ranked - set(scored), without
    )
    # A static plan drops tokens without asking the method.
    assert merged or method.protocol == "static"
