"""The baselines: what they keep, by oracles with loops over explicit ids; how layers share; merges; what is carried."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines.cache import HeadGroupCache
from hack_pipelines.cache.head_group import kept_of
from hack_pipelines.methods import (
    CAKE,
    H2O,
    MEDA,
    Geometry,
    LookM,
    PyramidKV,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
    ValueNorm,
    base,
)
from hack_pipelines.methods import hack as hack_method
from hack_pipelines.methods.cake import cascaded
from hack_pipelines.methods.meda import least_tokens
from hack_pipelines.methods.scale_window import even_subsample
from hack_pipelines.methods.selection import lattice_positions, top
from hack_pipelines.methods.window import pooled
from hack_pipelines.schedule import Schedule

from .components import planted_profile
from .test_methods import WIDE, LargestTensor, schedules, view_of


SQUARE = Schedule.from_sides((1, 2, 3, 4, 6))
VAR_256 = Schedule.from_sides((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
BASELINES = (SlidingWindow, StreamingLLM, H2O, SnapKV, PyramidKV, CAKE, LookM, MEDA, ValueNorm)
BY_LAYER = (PyramidKV, CAKE, MEDA)
CARRYING = (H2O, LookM, MEDA)
every_baseline = pytest.mark.parametrize("baseline", BASELINES)
both_protocols = pytest.mark.parametrize("protocol", ["post", "pre"])
# Exact in float32, and too small to decide a norm.
ID_UNIT = 1 / 1024


# -- a run whose tokens can be told apart ------------------------------------------------------------------------------


def step_parts(schedule, step, layer, rows, heads, dim=8, seed=0):
    """Queries, keys and values of a step; the first channel of a value tells the token's id."""
    generator = torch.Generator().manual_seed((seed * 100 + layer) * 100 + step)
    query, key, value = (torch.randn(rows, heads, schedule.lengths[step], dim, generator=generator) for _ in range(3))
    first = schedule.prefixes[step]
    value[..., 0] = torch.arange(first, first + schedule.lengths[step]) * ID_UNIT
    return query, key, value


def cache_of(method, schedule, budget, layers=1, heads=2, profile_seed=0):
    profile = planted_profile(schedule, layers, heads, 8, profile_seed)
    plan = method.plan(Geometry(schedule, layers, heads, 8), budget, profile)
    return HeadGroupCache(plan, method)


def kept_ids(cache, layer):
    """Ids that a layer holds, `[rows, heads, tokens]`."""
    return (cache.groups[layer][0].held.value[0][..., 0] / ID_UNIT).round().long()


def without_merge(method):
    """The same method, which drops what others merge, so that ids and keys stay as they were."""

    class Unmerged(type(method)):
        def merge(self, view, kept, key, value):
            return key, value

    return Unmerged(**vars(method))


class Head:
    """One head of one row, with all that it ever saw and the ids that it holds, in float64."""

    def __init__(self, schedule, budget):
        self.schedule, self.budget = schedule, budget
        self.keys, self.values = np.zeros((0, 8)), np.zeros((0, 8))
        self.held, self.attention_sums = [], np.zeros(schedule.total)

    def see(self, step, query, key, value):
        """Take in a step; attention is that of its queries to what is present."""
        self.step = step
        self.keys, self.values = np.concatenate((self.keys, key)), np.concatenate((self.values, value))
        self.current = list(range(self.schedule.prefixes[step], len(self.keys)))
        self.present = self.held + self.current
        logits = query @ self.keys[self.present].T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        self.attention = weights / weights.sum(1, keepdims=True)
        self.attention_sums[self.present] += self.attention.sum(0)

    def window(self):
        return min(32, len(self.current), self.budget // 4)


def best(scores, ids, count):
    return set(sorted(ids, key=lambda token: (-scores[token], token))[:count])


def average_of_five(ids, scores):
    padded = [0.0, 0.0, *scores, 0.0, 0.0]
    return {token: sum(padded[place : place + 5]) / 5 for place, token in enumerate(ids)}


def oracle_sliding(head, count):
    return set(head.present[-count:])


def oracle_streaming(head, count):
    sinks = set(head.present[: sum(head.schedule.lengths[:2])])
    return sinks | set(head.present[len(head.present) - count + len(sinks) :])


def oracle_streaming_uniform(head, count):
    sinks = set(head.present[: sum(head.schedule.lengths[:2])])
    room = count - len(sinks)
    if room >= len(head.current):
        return oracle_streaming(head, count)
    return sinks | {head.current[place] for place in even_subsample(head.schedule.sizes[head.step], room)}


def oracle_h2o(head, count):
    recent = set(head.present[len(head.present) - count // 2 :])
    return recent | best(head.attention_sums, set(head.present) - recent, count - len(recent))


def oracle_lookm(head, count):
    scores = head.attention_sums.copy()
    scores[:4] = np.inf
    recent = set(head.present[len(head.present) - count // 2 :])
    return recent | best(scores, set(head.present) - recent, count - len(recent))


def oracle_window(head, count, places, score):
    scores = average_of_five(head.present, score(head.attention[places]))
    window = {head.current[place] for place in places}
    return window | best(scores, set(head.present) - window, count - len(window))


def oracle_snapkv(head, count):
    places = list(range(len(head.current) - head.window(), len(head.current)))
    return oracle_window(head, count, places, lambda attention: attention.mean(0))


def oracle_snapkv_uniform(head, count):
    size, window = head.schedule.sizes[head.step], head.window()
    everything = len(head.current) <= 2 * window
    places = list(range(len(head.current))) if everything else list(lattice_positions(size, window))
    return oracle_window(head, count, places, lambda attention: attention.mean(0))


def oracle_cake(head, count):
    places = list(range(len(head.current) - head.window(), len(head.current)))

    def score(attention):
        mean = attention.mean(0)
        return mean + 200 * ((attention - mean) ** 2).mean(0)

    return oracle_window(head, count, places, score)


def oracle_value_norm(head, count):
    return best(np.sqrt((head.values**2).sum(1)), head.present, count)


ORACLES = [
    (SlidingWindow(), oracle_sliding),
    (StreamingLLM(), oracle_streaming),
    (StreamingLLM(recent="uniform"), oracle_streaming_uniform),
    (H2O(), oracle_h2o),
    (SnapKV(), oracle_snapkv),
    (SnapKV(window_positions="uniform"), oracle_snapkv_uniform),
    (PyramidKV(), oracle_snapkv),
    (CAKE(), oracle_cake),
    (LookM(), oracle_lookm),
    (MEDA(), oracle_lookm),
    (ValueNorm(), oracle_value_norm),
]


@pytest.mark.parametrize(("method", "oracle"), ORACLES, ids=[f"{method!r}" for method, _ in ORACLES])
@both_protocols
@pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("budget", [9, 16, 27])
def test_kept_ids_equal_the_oracle(method, oracle, protocol, schedule, budget):
    layers, rows, heads = 2, 2, 2
    method = without_merge(replace(method, protocol=protocol))
    cache = cache_of(method, schedule, budget, layers, heads)
    places = [(layer, row, head) for layer in range(layers) for row in range(rows) for head in range(heads)]
    oracles = {place: Head(schedule, budget) for place in places}
    evicted = 0
    for step in range(len(schedule) - 1):
        for layer in range(layers):
            parts = step_parts(schedule, step, layer, rows, heads)
            cache.attend(layer, *parts)
            ids = kept_ids(cache, layer)
            count = cache.plan.layers[layer].store[step][0]
            for row in range(rows):
                for number in range(heads):
                    head = oracles[layer, row, number]
                    head.see(step, *(part[row, number].double().numpy() for part in parts))
                    wanted = oracle(head, count) if count < len(head.present) else head.present
                    head.held = sorted(wanted)
                    evicted += len(head.present) - len(head.held)
                    assert len(head.held) == count and ids[row, number].tolist() == head.held
    assert evicted


def test_published_windows_by_hand():
    schedule = Schedule.from_sides((1, 2, 3, 4))

    def ids_before_the_last_scale(method):
        cache = cache_of(method, schedule, 10, heads=1)
        for step in range(3):
            cache.attend(0, *step_parts(schedule, step, 0, 1, 1))
        return kept_ids(cache, 0)[0, 0].tolist()

    assert ids_before_the_last_scale(SlidingWindow()) == list(range(4, 14))
    assert ids_before_the_last_scale(StreamingLLM()) == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    uniform = ids_before_the_last_scale(StreamingLLM(recent="uniform"))
    assert uniform[:5] == [0, 1, 2, 3, 4] and {(token - 5) // 3 for token in uniform[5:]} == {0, 1, 2}


def test_equal_scores_keep_the_smallest_ids():
    for method in (H2O(), SnapKV(), CAKE(), ValueNorm()):
        flat = {name: torch.ones(1, 1, 70, 8) for name in ("query", "key", "value")}
        view = view_of(WIDE, 4, 20, rows=1, heads=1, **flat, budget=30, store=30)
        view = replace(view, stored_key=torch.ones(1, 1, 20, 8), stored_value=torch.ones(1, 1, 20, 8))
        scores, tiers = method.rank(view)[:2]
        # Only the pooled scores near the ends differ, by the zeros beyond them.
        assert scores[0, 0, 2:-2].unique().numel() == 1
        chosen = set(top(torch.ones(1, 1, 90), 30, tiers)[0, 0].tolist())
        protected = set() if tiers is None else set((tiers > 0).nonzero()[:, 0].tolist())
        assert chosen == protected | set(range(30 - len(protected)))


@pytest.mark.parametrize("method", [H2O(), SnapKV(), PyramidKV(), CAKE(), LookM(), MEDA()], ids=repr)
def test_tokens_that_all_look_at_are_kept(method):
    """Vertical stripes: two keys of the middle that every query is drawn to."""
    schedule = Schedule.from_sides((1, 2, 4, 5, 6))
    cache, stripes = cache_of(without_merge(method), schedule, 24, heads=1), {9, 13}
    for step in range(4):
        query, key, value = step_parts(schedule, step, 0, 1, 1)
        query[..., 0], key[..., 0] = 4, 0
        for token in stripes:
            if schedule.prefixes[step] <= token < schedule.prefixes[step] + schedule.lengths[step]:
                key[:, :, token - schedule.prefixes[step], 0] = 2
        cache.attend(0, query, key, value)
    assert stripes <= set(kept_ids(cache, 0).flatten().tolist())


def test_pooling_is_a_mean_of_five_with_zeros_beyond_the_ends():
    scores = torch.tensor([[[5.0, 0, 0, 10, 0, 0, 0]]])
    torch.testing.assert_close(pooled(scores), torch.tensor([[[1.0, 3, 3, 2, 2, 2, 0]]]))


# -- what is carried ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", CARRYING)
def test_after_one_step_the_column_sums_are_carried(baseline):
    view = view_of(WIDE, 3, 0)
    attention = (view.query @ view.key.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(baseline().rank(view).carried, attention.sum(2))
    torch.testing.assert_close(H2O(normalise="mean").rank(view).carried, attention.mean(2))


@pytest.mark.parametrize("baseline", CARRYING)
@both_protocols
def test_carried_scores_follow_their_tokens(baseline, protocol):
    """Every token's own sum, whatever left before it; and no attention is lost, kept and evicted tokens together."""
    rows, heads, budget = 2, 2, 13
    method = without_merge(baseline(protocol=protocol))
    cache = cache_of(method, WIDE, budget, heads=heads)
    oracles = {(row, head): Head(WIDE, budget) for row in range(rows) for head in range(heads)}
    queries = 0
    for step in range(len(WIDE) - 1):
        parts = step_parts(WIDE, step, 0, rows, heads)
        cache.attend(0, *parts)
        queries += WIDE.lengths[step]
        ids, carried = kept_ids(cache, 0), cache.groups[0][0].held.carried[0].squeeze(-1)
        assert carried.dtype == torch.float32
        for (row, number), head in oracles.items():
            head.see(step, *(part[row, number].double().numpy() for part in parts))
            head.held = ids[row, number].tolist()
            np.testing.assert_allclose(carried[row, number], head.attention_sums[head.held], rtol=1e-4)
            gone = sorted(set(range(len(head.keys))) - set(head.held))
            total = float(carried[row, number].sum()) + head.attention_sums[gone].sum()
            assert total == pytest.approx(queries, rel=1e-5)
    assert gone


@every_baseline
@both_protocols
def test_carried_scores_are_counted(baseline, protocol):
    cache = cache_of(baseline(protocol=protocol), WIDE, 20, layers=2)
    for step in range(len(WIDE)):
        for layer in range(2):
            cache.attend(layer, *step_parts(WIDE, step, layer, 2, 2))
    report = cache.report()
    # Rows are images here; a layer has two heads.
    assert report.metadata_bytes == (4 * 20 * 2 * 2 if baseline in CARRYING else 0)
    assert report.bytes_logical_peak == 20 * 2 * 2 * (2 * 8 * 4) + report.metadata_bytes


# -- budgets -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(BASELINES),
    st.sampled_from(["post", "pre"]),
    schedules,
    st.integers(0, 60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_layers_hold_the_budget_on_average(baseline, protocol, schedule, more, layers, heads, seed):
    geometry, profile = Geometry(schedule, layers, heads, 8), planted_profile(schedule, layers, heads, 8, seed)
    method = baseline(protocol=protocol)
    budget = method.min_budget(geometry, profile) + more
    assert budget >= sum(schedule.lengths[:2]) + 1
    plan = method.plan(geometry, budget, profile)
    held = [0] * layers
    for step, length in enumerate(schedule.lengths[:-1]):
        present = [count + length for count in held]
        held = [layer.store[step][0] for layer in plan.layers]
        assert sum(held) == min(budget * layers, sum(present))
        attended = [layer.attend[step][0] for layer in plan.layers]
        assert attended == (held if protocol == "pre" else present)
        if baseline is MEDA:
            assert all(count >= min(there, max(7, -(-there // 100))) for count, there in zip(held, present))
        if baseline in (SnapKV, PyramidKV, CAKE):
            assert all(count >= min(32, length, budget // 4) > 0 for count in held)
    if protocol == "pre":
        attended = [layer.attend[-1][0] for layer in plan.layers]
        assert sum(attended) == min(budget * layers, sum(held) + layers * schedule.lengths[-1])


@pytest.mark.parametrize("baseline", BY_LAYER)
def test_layers_keep_all_when_all_fits(baseline):
    geometry, profile = Geometry(VAR_256, 5, 2, 8), planted_profile(VAR_256, 5, 2, 8, 3)
    plan = baseline().plan(geometry, VAR_256.cacheable, profile)
    assert all([count for (count,) in layer.store[:-1]] == list(VAR_256.prefixes[1:]) for layer in plan.layers)
    less = baseline().plan(geometry, VAR_256.cacheable - 1, profile)
    assert sum(layer.store[-2][0] for layer in less.layers) == 5 * (VAR_256.cacheable - 1)


def budgets_without_limits(method, profile, layers, budget, step=9):
    """What layers get of a budget when none of them lacks tokens."""
    return method.layer_budgets(Geometry(VAR_256, layers, 2, 8), budget, profile, step, [100_000] * layers)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(6, 700))
def test_a_pyramid_falls_in_equal_steps_around_its_mean(layers, budget):
    held = budgets_without_limits(PyramidKV(), None, layers, budget)
    window = min(32, budget // 4)
    smallest = (budget - window) / 20
    largest = 2 * (budget - window) - smallest
    assert sum(held) == budget * layers and held == sorted(held, reverse=True)
    for layer, count in enumerate(held):
        wanted = budget if layers == 1 else window + largest - layer * (largest - smallest) / (layers - 1)
        assert abs(count - wanted) < 1 + 1e-6


def test_a_pyramid_of_one_layer_is_snapkv():
    pyramid = PyramidKV().plan(Geometry(VAR_256, 1, 2, 8), 100, None)
    assert pyramid == SnapKV().plan(Geometry(VAR_256, 1, 2, 8), 100, None)


def test_a_pyramid_stays_monotone_where_layers_lack_tokens():
    plan = PyramidKV().plan(Geometry(VAR_256, 8, 2, 8), 150, None)
    for step in range(len(VAR_256) - 1):
        held = [layer.store[step][0] for layer in plan.layers]
        assert held == sorted(held, reverse=True)


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (0.5, 2.0)])
def test_cake_divides_by_entropy_and_variance(tau1, tau2):
    layers, budget = 6, 200
    profile = planted_profile(VAR_256, layers, 2, 8, 5)
    for step in (5, 9):
        held = budgets_without_limits(CAKE(tau1=tau1, tau2=tau2), profile, layers, budget, step)
        preferences = []
        for layer in range(layers):
            entropy = sum(float(profile.mean["entropy"][layer, head, step]) for head in range(2))
            variance = sum(float(profile.mean["colvar"][layer, head, step]) for head in range(2))
            preferences.append(entropy ** (1 / tau1) * variance ** (1 / tau2))
        assert sum(held) == budget * layers and len(set(held)) > 1
        for count, preference in zip(held, preferences):
            assert abs(count - 32 - preference / sum(preferences) * (budget - 32) * layers) < 1


def test_cake_without_any_variance_divides_by_entropy_alone():
    profile = planted_profile(VAR_256, 3, 2, 8, 5)
    profile.mean["colvar"].zero_()
    weights = profile.mean["entropy"][:, :, 9].double().sum(1)
    assert CAKE().preferences(profile, 9) == pytest.approx((weights / weights.max()).tolist())


def test_meda_divides_by_the_exponential_of_entropy():
    layers, budget = 6, 200
    profile = planted_profile(VAR_256, layers, 2, 8, 5)
    method = MEDA()
    held = method.layer_budgets(Geometry(VAR_256, layers, 2, 8), budget, profile, 9, [1000] * layers)
    weights = [np.exp(float(profile.mean["entropy"][layer, :, 9].double().mean())) for layer in range(layers)]
    assert sum(held) == budget * layers and len(set(held)) > 1
    for count, weight in zip(held, weights):
        assert abs(count - weight / sum(weights) * budget * layers) < 1
    profile.mean["entropy"][0] -= 50
    starved = method.layer_budgets(Geometry(VAR_256, layers, 2, 8), budget, profile, 9, [1000] * layers)
    assert starved[0] == least_tokens(1000) == 10 and sum(starved) == budget * layers


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_cascade_ends_where_one_division_does(data):
    """Layer after layer, the known ones divide the whole anew and only ever shrink; whole numbers may end one below."""
    layers = data.draw(st.integers(1, 8))
    preferences = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=layers, max_size=layers))
    beside = data.draw(st.lists(st.integers(0, 200), min_size=layers, max_size=layers))
    total = data.draw(st.integers(0, 800))
    held: list[int] = []
    for known in range(1, layers + 1):
        divided = cascaded(preferences[:known], beside[:known], total)
        assert sum(divided) == min(total, sum(beside[:known]))
        assert all(new <= old + 1 for old, new in zip(held, divided))
        held = [min(old, new) for old, new in zip([*held, divided[-1]], divided)]
    at_once = cascaded(preferences, beside, total)
    assert all(once - 1 <= count <= once for count, once in zip(held, at_once))


def test_a_cascade_of_whole_shares_is_exact():
    assert [cascaded([1.0] * known, [100] * known, 60) for known in (1, 2, 3)] == [[60], [30, 30], [20, 20, 20]]
    assert cascaded([3.0, 2.0, 1.0], [100] * 3, 60) == [30, 20, 10]


@pytest.mark.parametrize("baseline", [CAKE, MEDA])
def test_a_profile_is_needed(baseline):
    with pytest.raises(ValueError, match="head profile but got none: attach one"):
        baseline().plan(Geometry(VAR_256, 2, 2, 8), 100, None)
    assert baseline.needs_profile and not PyramidKV.needs_profile


def test_smallest_budgets():
    geometry, flat = Geometry(VAR_256, 2, 4, 64), Geometry(Schedule(((1, 1), (1, 1), (2, 2))), 2, 4, 64)
    smallest = {
        baseline.name: (baseline().min_budget(geometry, None), baseline().min_budget(flat, None))
        for baseline in BASELINES
    }
    assert smallest == {
        "sliding_window": (6, 3),
        "streaming_llm": (6, 3),
        "h2o": (6, 3),
        "snapkv": (6, 4),
        "pyramidkv": (6, 4),
        "cake": (6, 4),
        "lookm": (7, 7),
        "meda": (7, 7),
        "value_norm": (6, 3),
    }


# -- merges ------------------------------------------------------------------------------------------------------------


def merge_oracle(view, kept, row, merging):
    """Merged keys and values of all heads of a row, token by token."""
    keys = torch.cat((view.stored_key, view.key), dim=2)[row].double().numpy()
    values = torch.cat((view.stored_value, view.value), dim=2)[row].double().numpy()
    heads, present = keys.shape[:2]
    evicted = [sorted(set(range(present)) - set(kept[row, head].tolist())) for head in range(heads)]
    nearest, cosines = {}, np.zeros((heads, len(evicted[0])))
    for head in range(heads):
        for place, token in enumerate(evicted[head]):
            similar = [
                keys[head, token] @ keys[head, r] / np.linalg.norm(keys[head, token]) / np.linalg.norm(keys[head, r])
                for r in kept[row, head].tolist()
            ]
            nearest[head, place], cosines[head, place] = int(np.argmax(similar)), max(similar)
    result = []
    for states in (keys, values):
        merged = np.stack([states[head, kept[row, head].tolist()] for head in range(heads)])
        for head in range(heads):
            for target in range(merged.shape[1]):
                own = merged[head, target]
                terms = [own]
                for place, token in enumerate(evicted[head]):
                    if nearest[head, place] != target:
                        continue
                    if merging == "pivot":
                        terms.append((states[head, token] + own) / 2)
                    elif merging == "average":
                        terms.append(states[head, token])
                    elif cosines[:, place].mean() >= cosines.mean():
                        terms.append(cosines[head, place] * states[head, token])
                merged[head, target] = np.mean(terms, axis=0)
        result.append(merged)
    return result


MERGING = [LookM(), LookM(merging="average"), LookM(merging="weighted"), MEDA()]


@pytest.mark.parametrize("method", MERGING, ids=repr)
@pytest.mark.parametrize("stored", [0, 17])
def test_merges_equal_the_oracle(method, stored):
    view = view_of(WIDE, 4, stored)
    kept = top(torch.rand(2, 2, view.num_present, generator=torch.Generator().manual_seed(1)), 9)
    merged = method.merge(view, kept, *kept_of(view, kept, None))
    for row in range(2):
        for part, wanted in zip(merged, merge_oracle(view, kept, row, getattr(method, "merging", "average"))):
            np.testing.assert_allclose(part[row].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_weighted_merges_pick_out_some():
    """The threshold decides: with it some tokens are merged and some are lost."""
    view = view_of(WIDE, 4, 17)
    kept = top(torch.rand(2, 2, view.num_present, generator=torch.Generator().manual_seed(1)), 9)
    own = kept_of(view, kept, None)

    def counted(merging):
        shares = []
        original = hack_method.add_by_target

        def watched(sums, target, weights, values):
            shares.append(weights)
            original(sums, target, weights, values)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hack_method, "add_by_target", watched)
            LookM(merging=merging).merge(view, kept, *own)
        return torch.cat(shares, dim=-1).sum(-1)

    counts = counted("weighted")
    everything = counted("average")
    assert (everything == view.num_present - 9).all()
    assert (counts > 0).all() and (counts < everything).all() and (counts[:, :1] == counts).all()


@pytest.mark.parametrize("method", MERGING, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_a_batch_is_that_of_its_rows(monkeypatch, method, dtype):
    """Also where a batch is cut into chunks, and where rows differ in how similar their keys are."""
    monkeypatch.setattr(hack_method, "MERGE_CHUNK", 2 * 9 * 23)
    names = ("query", "key", "value", "stored_key", "stored_value")
    view = view_of(WIDE, 4, 17)
    parts = {name: getattr(view, name).to(dtype) for name in names}
    parts["key"][1] += 2
    view = replace(view, **parts)
    kept = top(torch.rand(2, 2, view.num_present), 9)
    both = method.merge(view, kept, *kept_of(view, kept, None))
    for row in range(2):
        alone = replace(view, **{name: parts[name][row : row + 1] for name in names})
        own = kept[row : row + 1]
        for part, single in zip(both, method.merge(alone, own, *kept_of(alone, own, None))):
            assert part.dtype == dtype and torch.equal(part[row], single[0])


def test_a_pivot_merge_by_hand():
    schedule = Schedule(((1, 1), (1, 3)))
    key = torch.tensor([[1.0, 0], [1, 0], [0, 1]]).view(1, 1, 3, 2)
    value = torch.tensor([[4.0, 0], [8, 0], [0, 6]]).view(1, 1, 3, 2)
    view = view_of(schedule, 1, 0, rows=1, heads=1, dim=2, key=key, value=value)
    kept = torch.tensor([[[0, 2]]])
    own = kept_of(view, kept, None)
    assert LookM().merge(view, kept, *own)[1].flatten().tolist() == [5, 0, 0, 6]
    assert LookM(merging="average").merge(view, kept, *own)[1].flatten().tolist() == [6, 0, 0, 6]


@pytest.mark.parametrize("baseline", [LookM, MEDA])
@both_protocols
def test_what_is_stored_is_merged(baseline, protocol):
    merging, dropping = baseline(protocol=protocol), without_merge(baseline(protocol=protocol))
    held = []
    for method in (merging, dropping):
        cache = cache_of(method, WIDE, 12)
        for step in range(3):
            cache.attend(0, *step_parts(WIDE, step, 0, 2, 2))
        held.append(cache.groups[0][0].held)
    assert held[0].key[0].shape == held[1].key[0].shape and not torch.equal(held[0].key[0], held[1].key[0])
    assert torch.equal(held[0].carried[0], held[1].carried[0])


# -- memory ------------------------------------------------------------------------------------------------------------


@every_baseline
@both_protocols
def test_the_last_step_never_holds_its_attention(monkeypatch, baseline, protocol):
    monkeypatch.setattr(base, "SCORED_QUERIES", 32)
    schedule = Schedule.from_sides((1, 2, 3, 20))
    cache = cache_of(baseline(protocol=protocol), schedule, 13, heads=1)
    for step in range(3):
        cache.attend(0, *step_parts(schedule, step, 0, 1, 1))
    parts = step_parts(schedule, step + 1, 0, 1, 1)
    with LargestTensor() as watch:
        cache.attend(0, *parts)
    present = 13 + 400
    # After attention to all that is there nothing is scored: there is nothing to store.
    assert watch.largest <= present * (8 if protocol == "post" else 32)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "options", "match"),
    [
        *((baseline, {"protocol": "static"}, "`protocol` must be one of 'post', 'pre'") for baseline in BASELINES),
        (StreamingLLM, {"recent": "grid"}, "`recent` must be one of 'sequence', 'uniform'"),
        (H2O, {"normalise": "max"}, "`normalise` must be one of 'sum', 'mean'"),
        (SnapKV, {"window": 0}, "`window` must be at least 1 but is 0"),
        (SnapKV, {"window_positions": "grid"}, "`window_positions` must be one of 'recent', 'uniform'"),
        (PyramidKV, {"window": 0}, "`window` must be at least 1 but is 0"),
        (PyramidKV, {"beta": 0.5}, "`beta` must be at least 1 but is 0.5"),
        (CAKE, {"window": 0}, "`window` must be at least 1 but is 0"),
        (CAKE, {"gamma": -1.0}, "`gamma` must be at least 0 but is -1.0"),
        (CAKE, {"tau2": 0.0}, "`tau1` and `tau2` must be above 0 but are 1.0 and 0.0"),
        (LookM, {"merging": "sum"}, "`merging` must be one of 'pivot', 'average', 'weighted'"),
    ],
)
def test_options_are_checked(baseline, options, match):
    with pytest.raises(ValueError, match=match):
        baseline(**options)
