"""ScaleKV: drafters and refiners, budgets, budgets files, and the ranking around the window."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines.cache import FullCache, HeadGroupCache
from hack_pipelines.cache.budget import TokenBytes, make_plan
from hack_pipelines.methods import Geometry, ScaleKV
from hack_pipelines.methods.scalekv import (
    centre_positions,
    pooled,
    read_budgets,
    released_positions,
    saturated_limits,
    selectivity,
    water_level,
)
from hack_pipelines.methods.selection import top
from hack_pipelines.schedule import Schedule

from .components import planted_profile, seeds, tiny_pipeline
from .test_cache import step_parts
from .test_methods import GRIDS, INFINITY_1M, VAR_256, WIDE, oracle_columns, schedules, view_of


RELEASED = Path(__file__).resolve().parents[2] / "shared" / "reference" / "data" / "scalekv"
# By model: layers, drafters at scales 9 to 13, tokens of a drafter and of a refiner.
TABLE = {
    "2b": (
        32,
        [{0, 23}] * 4 + [{0}],
        [(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)],
    ),
    # The file has 6200 and 200 at scale 13, where the rule of the others gives these.
    "8b": (40, [{0, 1, 2}] * 5, [(909, 629), (1464, 584), (2463, 503), (4054, 374), (6348, 188)]),
}


def released(model):
    path = RELEASED / f"{model}_10%_budget.json"
    if not path.is_file():
        pytest.skip(f"the budgets that ScaleKV's authors released are not there: {path}")
    return path


def geometry_of(schedule, layers=4, heads=4):
    return Geometry(schedule, layers, heads, 8)


def held_by_step(plan):
    """Tokens of a head, by step and layer."""
    return [[layer.store[step][0] for layer in plan.layers] for step in range(len(plan.schedule))]


# -- drafters ----------------------------------------------------------------------------------------------------------


def test_selectivity_equals_the_oracle():
    profile = planted_profile(WIDE, 3, 4, 8, 1)
    mass, top_history = profile.mean["mass"].double().numpy(), profile.mean["topk_hist"].double().numpy()
    ours = selectivity(profile.mean["mass"], profile.mean["topk_hist"][..., 2])
    for layer in range(3):
        for k in range(len(WIDE)):
            current = np.mean([mass[layer, head, k, k] for head in range(4)])
            history = np.mean([top_history[layer, head, k, 2] for head in range(4)])
            assert ours[layer, k].item() == pytest.approx(current * history, rel=1e-6)


def with_drafters(schedule, layers, looking_back):
    """A profile whose layers `looking_back` spread over the history, while the others stay on the current map."""
    profile = planted_profile(schedule, layers, 4, 8, 0)
    lengths = torch.tensor(schedule.lengths, dtype=torch.float)
    for layer in range(layers):
        for k in range(len(schedule)):
            own = 0.1 if layer in looking_back and k else 0.9 if k else 1.0
            history = lengths[:k] / lengths[:k].sum()
            profile.mean["mass"][layer, :, k] = 0
            profile.mean["mass"][layer, :, k, :k] = (1 - own) * history
            profile.mean["mass"][layer, :, k, k] = own
            # A refiner's attention to history lies on one token, a drafter's is even over all.
            prefix = schedule.prefixes[k]
            for place, count in enumerate((1, 4, 16, 64)):
                share = min(1, count / prefix) if prefix and layer in looking_back else float(k > 0)
                profile.mean["topk_hist"][layer, :, k, place] = (1 - own) * share
    return profile


@pytest.mark.parametrize("top_count", [1, 4, 16, 64])
def test_layers_that_spread_over_history_are_drafters(top_count):
    profile = with_drafters(VAR_256, 8, {2, 5})
    method = ScaleKV(drafters=0.25, top_count=top_count)
    index = selectivity(profile.mean["mass"], profile.mean["topk_hist"][..., (1, 4, 16, 64).index(top_count)])
    assert (index[[2, 5], 6:].amax(0) < index[[0, 1, 3, 4, 6, 7], 6:].amin(0)).all()
    chosen = method._drafters(geometry_of(VAR_256, 8), profile)
    assert chosen[0] == set() and len(chosen) == len(VAR_256)
    # Where all of the history is among the counted tokens, every layer is the same.
    assert all(layers == {2, 5} for layers, prefix in zip(chosen, VAR_256.prefixes) if prefix > 64)


def test_drafters_are_the_lowest_pairs_of_all_scales():
    profile = planted_profile(WIDE, 5, 4, 8, 3)
    index = selectivity(profile.mean["mass"], profile.mean["topk_hist"][..., 2]).numpy()
    pairs = []
    for k in range(1, len(WIDE)):
        mean, deviation = index[:, k].mean(), math.sqrt(np.mean((index[:, k] - index[:, k].mean()) ** 2))
        pairs += [((index[layer, k] - mean) / (deviation + 1e-8), layer, k) for layer in range(5)]
    for share, count in ((0, 0), (0.3, 6), (1, 20)):
        chosen = ScaleKV(drafters=share)._drafters(geometry_of(WIDE, 5), profile)
        wanted = {(layer, k) for _, layer, k in sorted(pairs)[:count]}
        assert {(layer, k) for k, layers in enumerate(chosen) for layer in layers} == wanted


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TABLE)
def test_saturation_gives_the_released_table(model):
    layers, drafters, table = TABLE[model]
    limits = saturated_limits(geometry_of(INFINITY_1M, layers), 650, [set()] * 8 + drafters, 17)
    for layer in range(layers):
        assert limits[layer][:7] == list(INFINITY_1M.prefixes[1:8])
        assert limits[layer][7:12] == [pair[layer not in own] for own, pair in zip(drafters, table)]
    assert all(sum(own[step] for own in limits) == 650 * layers for step in range(7, 12))


def oracle_saturated(present, own, total, floor):
    """Smallest `Min`, by trying all, and the `Max` with which the sum is the total exactly; `None` where there is none."""
    for lowest in range(floor, max(present) + 1):
        for largest in range(max(lowest, *(present[layer] for layer in own)) + 1):
            held = [min(largest if layer in own else lowest, count) for layer, count in enumerate(present)]
            if largest >= lowest and sum(held) == total:
                return held
    return None


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(1, 60), st.lists(st.booleans(), min_size=2, max_size=6).filter(any))
def test_saturation_equals_the_oracle_for_constant_drafters(schedule, budget, kinds):
    own = {layer for layer, drafter in enumerate(kinds) if drafter}
    limits = saturated_limits(geometry_of(schedule, len(kinds)), budget, [own] * len(schedule), 1)
    held = [0] * len(kinds)
    for step in range(len(schedule) - 1):
        present = [count + schedule.lengths[step] for count in held]
        held = [own_limits[step] for own_limits in limits]
        if schedule.prefixes[step + 1] <= budget:
            assert held == present
        elif len(own) < len(kinds):
            assert held == oracle_saturated(present, own, budget * len(kinds), 1)
        else:
            assert held == [min(budget, count) for count in present]


any_method = st.builds(
    ScaleKV,
    allocation=st.sampled_from(["saturate", "linear_decay"]),
    scoring=st.sampled_from(["paper", "released"]),
    window=st.sampled_from([1, 4, 16]),
    drafters=st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(any_method, schedules, st.integers(0, 60), st.integers(1, 5), st.integers(0, 99))
def test_plans_keep_their_budget_and_saturated_ones_use_it(method, schedule, more, layers, seed):
    geometry = geometry_of(schedule, layers)
    budget = method.min_budget(geometry, None) + more
    plan = method.plan(geometry, budget, planted_profile(schedule, layers, 4, 8, seed))
    by_step = held_by_step(plan)
    for step, held in enumerate(by_step[:-1]):
        assert sum(held) <= budget * layers
        if schedule.prefixes[step + 1] <= budget:
            assert held == [schedule.prefixes[step + 1]] * layers
        else:
            assert min(held) >= min(len(method._window(schedule.sizes[step])) + 1, budget)
            if method.allocation == "saturate":
                assert sum(held) == budget * layers
    assert by_step[-1] == [0] * layers


def test_a_layer_that_turns_drafter_holds_what_it_has():
    drafters = [set()] * 8 + [{0}, {1}, {0}, {1}, {0, 1}]
    limits = saturated_limits(geometry_of(INFINITY_1M, 3), 650, drafters, 17)
    for step in range(8, 12):
        held, before = [[own[s] for own in limits] for s in (step, step - 1)]
        assert sum(held) == 3 * 650
        assert all(now <= earlier + INFINITY_1M.lengths[step] for now, earlier in zip(held, before))
        assert max(held) == max(held[layer] for layer in drafters[step + 1])


def test_linear_decay():
    profile = with_drafters(INFINITY_1M, 8, {0})
    geometry = geometry_of(INFINITY_1M, 8)
    plan = ScaleKV(allocation="linear_decay", drafters=1 / 8).plan(geometry, 650, profile)
    assert [held[3] for held in held_by_step(plan)[7:12]] == [600, 530, 460, 390, 320]
    drafter = [held[0] for held in held_by_step(plan)[7:12]]
    assert drafter == [min(8 * 650 - 7 * 600, 921), 1490, 1980, 2470, 2960]
    gentle = ScaleKV(allocation="linear_decay", drafters=1 / 8, decay=10.0).plan(geometry, 650, profile)
    assert [held[3] for held in held_by_step(gentle)[7:12]] == [600, 590, 580, 570, 560]
    # At a small budget the decay is less, so that the last refiner keeps its window and a token.
    small = ScaleKV(allocation="linear_decay", drafters=1 / 8).plan(geometry, 22, profile)
    refiners = [held[3] for held in held_by_step(small)[3:12]]
    assert refiners[0] == 20 and refiners[-1] == 17 and refiners == sorted(refiners, reverse=True)
    with pytest.raises(ValueError, match="`decay` 150 leaves a refiner 0 tokens at the last of 5.*set `decay` to 145"):
        ScaleKV(allocation="linear_decay", decay=150).plan(geometry, 650, profile)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 200))
def test_water_level(capacities, total):
    fits = [level for level in range(max(capacities) + 1) if sum(min(level, count) for count in capacities) <= total]
    assert water_level(capacities, total) == max(fits)


# -- budgets files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TABLE)
def test_released_files(model):
    path = released(model)
    layers, drafters, table = TABLE[model]
    geometry = geometry_of(INFINITY_1M, layers)
    if model == "8b":
        table = [*table[:-1], (6200, 200)]
    average, limits = read_budgets(str(path), geometry)
    assert average == 650
    content = json.loads(path.read_text())
    limit = 921
    for scale, own, (largest, lowest) in zip(range(9, 14), drafters, table):
        assert content[f"Scale {scale}"]["Limit"] == limit
        limit = largest + INFINITY_1M.lengths[scale - 1]
        assert [limits[layer][scale - 2] for layer in range(layers)] == [
            largest if layer in own else lowest for layer in range(layers)
        ]
    method = ScaleKV(budgets_file=str(path))
    assert not method.needs_profile and ScaleKV().needs_profile
    plan = make_plan(method, geometry, None, TokenBytes(2, 2), 650)
    assert [sum(held) / layers for held in held_by_step(plan)[:-1]] == [1, 5, 21, 57, 121, 265, 521] + [650] * 5
    assert held_by_step(plan)[11][0] == table[-1][0]
    with pytest.raises(ValueError, match="needs at least 650: set `kv_budget` to 650 "):
        make_plan(method, geometry, None, TokenBytes(2, 2), 649)
    with pytest.raises(ValueError, match="hold 650 tokens a head but the budget is 649"):
        method.plan(geometry, 649, None)
    with pytest.raises(ValueError, match=f"{layers} layers at scale 9, but the model has 16"):
        method.min_budget(geometry_of(INFINITY_1M, 16), None)
    with pytest.raises(ValueError, match="go on without a gap to scale 10"):
        method.min_budget(geometry_of(VAR_256, layers), None)


def small_file(tmp_path, **changes):
    """Budgets for the last two scales of `WIDE` and two layers; `changes` are made to the entry of the first."""
    first = {"Block 0": 1, "Block 1": 0, "High": 1, "Max": 14, "Min": 12, "Limit": 14, **changes}
    last = {"Block 0": 1, "Block 1": 0, "High": 1, "Max": 16, "Min": 10, "Limit": 38}
    content = {"Scale 4": {key: value for key, value in first.items() if value is not None}, "Scale 5": last}
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_says_what_is_stored_whatever_the_budget(tmp_path):
    method = ScaleKV(budgets_file=str(small_file(tmp_path)))
    geometry = geometry_of(WIDE, 2)
    # Before the first scale that is compressed all 14 tokens of the three before it are held.
    assert method.min_budget(geometry, None) == 13
    for budget in (13, 40):
        plan = method.plan(geometry, budget, None)
        assert held_by_step(plan) == [[1, 1], [4, 4], [14, 12], [16, 10], [0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Block 1": None}, "1 layers at scale 4, but the model has 2"),
        ({"Block 1": 1}, "damaged at scale 4"),
        ({"Block 1": 2}, "damaged at scale 4"),
        ({"High": None}, "'Scale 4' is not one"),
        ({"Max": 15}, "damaged at scale 4"),
        ({"Max": 13}, "12.5 at scale 4, 13 at scale 5"),
        ({"Min": 12.5}, "'Scale 4' must hold whole numbers"),
        ({"Min": 0}, "'Scale 4' must hold whole numbers"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    method = ScaleKV(budgets_file=str(small_file(tmp_path, **changes)))
    with pytest.raises(ValueError, match=message):
        method.min_budget(geometry_of(WIDE, 2), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", 'no `"Scale s"` key'),
        ('{"Scale x": {}}', "'Scale x' is not one"),
        (None, "there is none"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "budgets.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ScaleKV(budgets_file=str(path)).min_budget(geometry_of(WIDE, 2), None)


# -- window and scores -------------------------------------------------------------------------------------------------


def test_window_positions():
    for size in sorted(GRIDS):
        height, width = size
        wanted = {
            max(0, math.floor((i + 0.5) * height / 4 - 0.5)) * width + max(0, math.floor((j + 0.5) * width / 4 - 0.5))
            for i in range(4)
            for j in range(4)
        }
        assert centre_positions(size, 4) == tuple(sorted(wanted))
        assert len(wanted) == min(4, height) * min(4, width)
        if height == width and height % 4 == 0:
            assert released_positions(size, 4) == centre_positions(size, 4)
    assert centre_positions((64, 64), 4)[:2] == (7 * 64 + 7, 7 * 64 + 23)
    assert released_positions((13, 13), 4) == tuple(13 * (3 * i + 1) + 3 * j + 1 for i in range(4) for j in range(4))
    assert released_positions((5, 14), 4) == tuple(range(54, 70))
    assert released_positions((3, 3), 4) == tuple(range(9))


def oracle_pooled(scores, kernel, pooling):
    result, half = np.zeros_like(scores), kernel // 2
    for place in np.ndindex(*scores.shape):
        *where, token = place
        near = scores[(*where, slice(max(0, token - half), token + half + 1))]
        result[place] = near.sum() / kernel if pooling == "average" else near.max()
    return result


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_pooling_equals_the_oracle(kernel, pooling):
    scores = torch.rand(2, 3, 17, generator=torch.Generator().manual_seed(0)) + 1
    np.testing.assert_allclose(
        pooled(scores, kernel, pooling).numpy(), oracle_pooled(scores.numpy(), kernel, pooling), rtol=1e-6
    )


def oracle_scores(method, view):
    positions = list(method._window(view.schedule.sizes[view.step]))
    if method.scoring == "paper":
        return oracle_pooled(oracle_columns(view, positions), method.kernel, method.pooling)
    keys = torch.cat((view.stored_key, view.key), dim=2).double().numpy()
    queries = view.projection.double().numpy()
    scores = np.zeros(keys.shape[:3])
    for row, head, token in np.ndindex(*scores.shape):
        products = [queries[row, head, i] @ keys[row, head, token] / math.sqrt(keys.shape[-1]) for i in positions]
        scores[row, head, token] = sum(products)
    scores[:, :, [view.num_stored + i for i in positions]] = -np.inf
    return oracle_pooled(scores, method.kernel, "max")


def kept_by_oracle(scores, window, count):
    others = sorted(set(range(len(scores))) - window, key=lambda j: (-scores[j], j))
    return sorted(window | set(others[: count - len(window)]))


ranked = pytest.mark.parametrize(
    "method",
    [ScaleKV(), ScaleKV(pooling="max", kernel=3), ScaleKV(window=4), ScaleKV(scoring="released")],
    ids=["paper", "max", "window-4", "released"],
)


@ranked
@pytest.mark.parametrize(("step", "stored", "count"), [(2, 4, 13), (3, 0, 20), (3, 21, 17), (4, 30, 70)])
def test_kept_tokens_equal_the_oracle(method, step, stored, count):
    projection = torch.randn(2, 2, WIDE.lengths[step], 8, generator=torch.Generator().manual_seed(5))
    view = view_of(WIDE, step, stored, scale=0.7, projection=projection)
    scores, tiers = method.rank(view)[:2]
    assert torch.isfinite(scores).all()
    kept = top(scores, count, tiers)
    wanted = oracle_scores(method, view)
    window = {stored + i for i in method._window(WIDE.sizes[step])}
    for row in range(2):
        for head in range(2):
            assert kept[row, head].tolist() == kept_by_oracle(wanted[row, head], window, count)
    assert torch.equal(kept, top(method.rank(view).scores, count, tiers))


def test_the_two_ways_to_score_differ():
    # An 8 x 8 map, where both have the same window.
    projection = torch.randn(2, 2, 64, 8, generator=torch.Generator().manual_seed(5))
    view = view_of(VAR_256, 6, 30, projection=projection)
    rankings = [method.rank(view) for method in (ScaleKV(), ScaleKV(scoring="released"))]
    kept = [top(ranking.scores, 40, ranking.tiers) for ranking in rankings]
    assert not torch.equal(*kept)
    with pytest.raises(ValueError, match="bare projections"):
        ScaleKV(scoring="released").rank(view_of(WIDE, 4, 30))


def test_constant_scores_keep_window_and_smallest_positions():
    # 256 tokens, so that no sum of equal scores is rounded.
    schedule = Schedule(((1, 1), (1, 3), (14, 18)))
    view = view_of(schedule, 2, 4, query=torch.zeros(2, 2, 252, 8))
    scores, tiers = ScaleKV(kernel=1).rank(view)[:2]
    assert scores.unique().numel() == 1
    window = {4 + i for i in centre_positions((14, 18), 4)}
    wanted = sorted(window | set(sorted(set(range(256)) - window)[:24]))
    assert top(scores, 40, tiers).tolist() == [[wanted] * 2] * 2


# -- through the cache -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(any_method, schedules, st.integers(0, 40), st.integers(0, 99))
def test_what_is_stored_is_what_was_planned_and_holds_the_window(method, schedule, more, seed):
    geometry = geometry_of(schedule, 2)
    budget = method.min_budget(geometry, None) + more
    plan = method.plan(geometry, budget, planted_profile(schedule, 2, 4, 8, seed))
    cache, full = HeadGroupCache(plan, method), FullCache(schedule, 2)
    exact = True
    for step in range(len(schedule)):
        query, key, value = step_parts(schedule, step, seed=seed)
        key = torch.nn.functional.normalize(key, dim=-1)
        for layer in range(2):
            ours = cache.attend(layer, query, key, value, projection=query)
            theirs = full.attend(layer, query, key, value)
            if exact:
                assert torch.equal(ours, theirs)
        if step == len(schedule) - 1:
            break
        for layer in range(2):
            (held,) = cache.groups[layer][0].held.key
            assert held.shape[2] == plan.layers[layer].store[step][0]
            for i in method._window(schedule.sizes[step]):
                assert (held == key[:, :, i : i + 1]).all(-1).any(-1).all()
        exact &= schedule.prefixes[step + 1] <= budget
    report = cache.report()
    assert report.peak_tokens <= budget
    if method.allocation == "saturate":
        wanted = [min(prefix, budget) for prefix in schedule.prefixes[1:]]
        assert report.tokens_by_step == wanted


@pytest.mark.parametrize("method", [ScaleKV(), ScaleKV(allocation="linear_decay"), ScaleKV(scoring="released")])
def test_pipeline(method):
    pipe = tiny_pipeline()
    schedule = pipe.schedule
    pipe.head_profile = planted_profile(schedule, 3, 4, 16, 0)
    arguments = {"class_labels": [1, 2], "output_type": "latent"}
    full = pipe(generator=seeds(0, 1), **arguments)
    lossless = pipe(generator=seeds(0, 1), kv_budget=schedule.cacheable, method=method, **arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(lossless.tokens, full.tokens))
    runs = [pipe(generator=seeds(0, 1), kv_budget=10, method=method, **arguments) for _ in range(2)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0].tokens, runs[1].tokens))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0].tokens[:3], full.tokens[:3]))
    assert runs[0].cache_report.tokens_by_step == [1, 5, 10]
    for index in range(2):
        alone = pipe([1, 2][index], generator=seeds(index), kv_budget=10, method=method, output_type="latent")
        assert all(torch.equal(ours[index], theirs[0]) for ours, theirs in zip(runs[0].tokens, alone.tokens))
    with pytest.raises(ValueError, match="needs at least 10"):
        pipe(kv_budget=9, method=method, **arguments)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allocation": "even"}, "allocation"),
        ({"scoring": "both"}, "scoring"),
        ({"window": 15}, "`window` must be a square number"),
        ({"window": 0}, "`window` must be a square number"),
        ({"kernel": 4}, "`kernel` must be an odd number"),
        ({"pooling": "none"}, "pooling"),
        ({"top_count": 8}, "`top_count` must be one of 1, 4, 16, 64"),
        ({"drafters": 1.5}, "drafters"),
        ({"decay": -1}, "decay"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        ScaleKV(**options)


def test_what_planning_needs():
    geometry = geometry_of(WIDE)
    with pytest.raises(ValueError, match="needs a head profile"):
        ScaleKV().plan(geometry, 30, None)
    profile = planted_profile(WIDE, 4, 4, 8, 0)
    del profile.mean["topk_hist"]
    with pytest.raises(ValueError, match="lacks topk_hist"):
        ScaleKV().plan(geometry, 30, profile)
    assert ScaleKV(scoring="released").needs_projection and not ScaleKV().needs_projection
    # 12 tokens lie in the window of a 3 x 8 map; the last map is never ranked.
    assert ScaleKV().min_budget(geometry, None) == 13
    assert ScaleKV(scoring="released").min_budget(geometry, None) == 17
    assert ScaleKV().min_budget(geometry_of(INFINITY_1M), None) == 17
    assert ScaleKV().min_budget(geometry_of(Schedule(((1, 1), (2, 2)))), None) == 1
