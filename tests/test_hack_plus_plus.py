"""HACK++: prior and reliance, budgets, rankings, and what a step may see and keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hack_pipelines.cache import FullCache, HeadGroupCache
from hack_pipelines.methods import Geometry, HACKPlusPlus
from hack_pipelines.methods.hack_plus_plus import pooled_by_scale, reliance
from hack_pipelines.methods.head_types import CONTEXTUAL, STRUCTURAL
from hack_pipelines.methods.selection import top

from .components import planted_profile, seeds, tiny_pipeline
from .test_cache import WIDE, step_parts
from .test_methods import INFINITY_1M, VAR_256, oracle_columns, schedules, view_of


PUBLISHED = {"tau": 0.5, "prior_step": "current", "pooling": "3x3"}


def make_plan(method, schedule, budget, attended, layers=2, heads=4, seed=0):
    profile = planted_profile(schedule, layers, heads, 8, seed)
    return method.plan(Geometry(schedule, layers, heads, 8), budget, profile, attended), profile


# -- statistics --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(schedules, st.integers(0, 99))
def test_reliance_equals_the_oracle(schedule, seed):
    mass = planted_profile(schedule, 2, 3, 8, seed).mean["mass"].double()
    gamma, prefixes, steps = reliance(mass, schedule), schedule.prefixes, len(schedule)
    for layer in range(2):
        for head in range(3):
            for k in range(steps):
                wanted = sum(
                    sum(mass[layer, head, later, s].item() for s in range(later)) / prefixes[later]
                    for later in range(k + 1, steps)
                )
                assert gamma[layer, head, k].item() == pytest.approx(wanted)
    assert (gamma[..., -1] == 0).all() and (gamma.diff(dim=-1) <= 0).all()


def test_prior_is_the_attention_of_one_token_of_a_scale():
    plan, profile = make_plan(HACKPlusPlus(), WIDE, 40, WIDE.total)
    lengths = torch.tensor(WIDE.lengths)
    torch.testing.assert_close(plan.tables["prior"] * lengths, profile.mean["mass"])
    of_scales, _ = make_plan(HACKPlusPlus(prior="mass"), WIDE, 40, WIDE.total)
    assert torch.equal(of_scales.tables["prior"], profile.mean["mass"])
    nothing, _ = make_plan(HACKPlusPlus(prior="none"), WIDE, 40, WIDE.total)
    assert (nothing.tables["prior"] == 1).all()


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "attended", "budget", "seen", "held"),
    [
        (
            INFINITY_1M,
            3156,
            1052,
            [1, 5, 21, 57, 121, 265, 521, 921, 1497, 2076, 2652, 3156, 3156],
            [1, 5, 21, 57, 121, 265, 521, 921, 1052, 1052, 1052, 1052, 0],
        ),
        (
            VAR_256,
            204,
            68,
            [1, 5, 14, 30, 55, 91, 132, 168, 204, 204],
            [1, 5, 14, 30, 55, 68, 68, 68, 68, 0],
        ),
    ],
)
def test_lengths_of_uniform_budgets(schedule, attended, budget, seen, held):
    plan, _ = make_plan(HACKPlusPlus(tau=0), schedule, budget, attended)
    for layer in plan.layers:
        assert [set(counts) for counts in layer.attend] == [{count} for count in seen]
        assert [set(counts) for counts in layer.store] == [{count} for count in held]


@settings(max_examples=60, deadline=None)
@given(schedules, st.floats(0.02, 1.0), st.integers(1, 4), st.integers(1, 6), st.floats(0, 2), st.integers(0, 99))
def test_budgets_are_used_up_and_never_exceeded(schedule, fraction, layers, heads, tau, seed):
    method = HACKPlusPlus(tau=tau)
    geometry = Geometry(schedule, layers, heads, 8)
    budget = max(int(fraction * schedule.total), method.min_budget(geometry, None))
    plan, _ = make_plan(method, schedule, budget, schedule.total, layers, heads, seed)
    for step in range(len(schedule) - 1):
        groups = [
            (len(group), count, present + schedule.lengths[step])
            for layer in plan.layers
            for group, count, present in zip(
                layer.groups, layer.store[step], layer.store[step - 1] if step else [0] * len(layer.groups)
            )
        ]
        held = sum(size * count for size, count, _ in groups)
        assert held <= budget * layers * heads
        assert all(count == cap for _, count, cap in groups) or budget * layers * heads - held < max(
            size for size, _, _ in groups
        )


def test_more_reliance_never_means_less_budget():
    profile = planted_profile(VAR_256, 2, 4, 8, 0)
    geometry, method = Geometry(VAR_256, 2, 4, 8), HACKPlusPlus()
    before = method.plan(geometry, 68, profile, 680)
    profile.mean["mass"] = profile.mean["mass"].clone()
    profile.mean["mass"][0] *= 2
    after = method.plan(geometry, 68, profile, 680)
    for step in range(5, 9):
        mine, theirs = (sum(plan.layers[0].store[step]) for plan in (after, before))
        assert mine >= theirs
    assert any(sum(a) > sum(b) for a, b in zip(after.layers[0].store, before.layers[0].store))


def test_strict_keeps_the_budget_between_layers():
    profile = planted_profile(VAR_256, 4, 4, 8, 1)
    # Layers that later steps rely on more and more come first, so that they grow before others shrink.
    profile.mean["mass"][0, :, :5] *= 0.01
    geometry = Geometry(VAR_256, 4, 4, 8)
    peaks = {}
    for strict in (False, True):
        method = HACKPlusPlus(tau=2, strict=strict)
        cache = HeadGroupCache(method.plan(geometry, 60, profile, 680), method)
        for step in range(len(VAR_256)):
            for layer in range(4):
                cache.attend(layer, *step_parts(VAR_256, step))
        report = cache.report()
        assert report.peak_tokens <= 60
        peaks[strict] = report.checkpoint_peak_tokens
    assert peaks[True] <= 60 < peaks[False]


# -- rankings ----------------------------------------------------------------------------------------------------------


def structural_view(step, num_stored, **overrides):
    plan, profile = make_plan(HACKPlusPlus(), WIDE, 40, WIDE.total, layers=1, heads=2)
    view = view_of(WIDE, step, num_stored, label=STRUCTURAL, tables={"prior": plan.tables["prior"][0]}, **overrides)
    return view, profile.mean["mass"][0]


@pytest.mark.parametrize("prior_step", ["current", "next"])
def test_structural_scores_are_prior_times_norm(prior_step):
    stored_ids = torch.tensor([[[0, 2, 5, 9, 13]] * 2] * 2)
    view, mass = structural_view(3, 5, stored_ids=stored_ids)
    ranking = HACKPlusPlus(prior_step=prior_step).rank(view)
    values = torch.cat((view.stored_value, view.value), dim=2).double().numpy()
    ids = [0, 2, 5, 9, 13, *range(WIDE.prefixes[3], WIDE.prefixes[3] + WIDE.lengths[3])]
    scale_of = [scale for scale, length in enumerate(WIDE.lengths) for _ in range(length)]
    for scores, step in ((ranking.scores, 3), (ranking.store_scores, 4)):
        if scores is None:
            assert prior_step == "current"
            continue
        for row in range(2):
            for head in range(2):
                wanted = [
                    mass[head, step, scale_of[token]].item()
                    / WIDE.lengths[scale_of[token]]
                    * np.linalg.norm(values[row, head, place])
                    for place, token in enumerate(ids)
                ]
                np.testing.assert_allclose(scores[row, head].numpy(), wanted, rtol=1e-5)


def test_unit_values_tie_inside_a_scale_and_the_first_tokens_stay():
    value = torch.nn.functional.normalize(torch.ones(2, 2, WIDE.lengths[3], 8), dim=-1)
    stored = torch.nn.functional.normalize(torch.ones(2, 2, WIDE.prefixes[3], 8), dim=-1)
    view, _ = structural_view(3, WIDE.prefixes[3], value=value, stored_value=stored)
    scores = HACKPlusPlus().rank(view).scores
    current = top(scores, WIDE.total - WIDE.lengths[-1] - 10, None)
    for row in current.flatten(0, 1).tolist():
        for scale in range(4):
            first, length = WIDE.prefixes[scale], WIDE.lengths[scale]
            inside = [token - first for token in row if first <= token < first + length]
            assert inside == list(range(len(inside)))


class ProductCounter(TorchDispatchMode):
    """Counts the products that ranking takes, apart from those of attention itself."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.baddbmm.default)
        return func(*args, **(kwargs or {}))


def test_structural_heads_need_no_query_key_product():
    view, _ = structural_view(3, 10)
    with ProductCounter() as products:
        HACKPlusPlus().rank(view)
    assert products.count == 0
    with ProductCounter() as products:
        HACKPlusPlus().rank(view_of(WIDE, 3, 10, label=CONTEXTUAL))
    assert products.count > 0


def pooled_oracle(scores, ids, sizes, kernel):
    """The largest score of the present neighbours in the same scale, by explicit coordinates."""
    place = {}
    first = 0
    for scale, (height, width) in enumerate(sizes):
        for position in range(height * width):
            place[first + position] = (scale, position // width, position % width)
        first += height * width
    reach = kernel // 2
    result = []
    for token in ids:
        scale, row, column = place[token]
        near = [
            score
            for other, score in zip(ids, scores)
            if place[other][0] == scale
            and abs(place[other][1] - row) <= reach
            and abs(place[other][2] - column) <= reach
        ]
        result.append(max(near))
    return result


@settings(max_examples=40, deadline=None)
@given(schedules, st.sampled_from([3, 5]), st.integers(0, 999))
def test_pooling_stays_inside_scale_and_row(schedule, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, schedule.total + 1, (), generator=generator))
    ids = torch.stack([torch.randperm(schedule.total, generator=generator)[:count].sort().values for _ in range(4)])
    scores = torch.rand(4, count, generator=generator)
    pooled = pooled_by_scale(scores.view(2, 2, -1), ids.view(2, 2, -1), schedule.sizes, kernel).view(4, -1)
    for own, token_ids, wanted in zip(scores.tolist(), ids.tolist(), pooled.tolist()):
        assert wanted == pooled_oracle(own, token_ids, schedule.sizes, kernel)


def test_contextual_scores_are_pooled_attention():
    view = view_of(WIDE, 4, 13, label=CONTEXTUAL, stored_ids=torch.arange(0, 26, 2).expand(2, 2, -1))
    positions = list(range(0, WIDE.lengths[4]))[: WIDE.lengths[4]]
    plain = HACKPlusPlus(pooling="none", n_obs=100).rank(view).scores
    np.testing.assert_allclose(plain.numpy(), oracle_columns(view, positions) / len(positions), rtol=1e-4)
    pooled = HACKPlusPlus(pooling="3x3", n_obs=100).rank(view).scores
    assert torch.equal(pooled, pooled_by_scale(plain, view.ids, WIDE.sizes, 3))
    sequence = HACKPlusPlus(pooling="sequence", n_obs=100).rank(view).scores
    for place in range(view.num_present):
        window = plain[..., max(0, place - 2) : place + 3]
        assert torch.equal(sequence[..., place], window.amax(-1))


def test_first_scales_can_be_protected():
    view, _ = structural_view(3, 10)
    assert HACKPlusPlus().rank(view).tiers is None
    tiers = HACKPlusPlus(init_scales=2).rank(view).tiers
    assert tiers.tolist() == [1] * 4 + [0] * (view.num_present - 4)


# -- in the cache ------------------------------------------------------------------------------------------------------


def run(cache, schedule, layers=2):
    return [
        cache.attend(layer, *step_parts(schedule, step)) for step in range(len(schedule)) for layer in range(layers)
    ]


@pytest.mark.parametrize(("attended", "inside"), [(30, True), (8, False)])
def test_both_choices_are_prefixes_of_one_ranking(attended, inside):
    method = HACKPlusPlus(prior_step="current")
    plan, _ = make_plan(method, WIDE, 20, attended)
    chosen: dict[tuple, list] = {}

    class Watched(HeadGroupCache):
        def _choose(self, view, ranking, count):
            choice = super()._choose(view, ranking, count)
            if choice.kept is not None:
                chosen.setdefault((view.step, view.layer, view.heads), []).append(choice.kept.flatten(0, 1).tolist())
            return choice

    run(Watched(plan, method), WIDE)
    pairs = [entry for entry in chosen.values() if len(entry) == 2]
    assert pairs
    for seen, stored in pairs:
        for one, other in zip(seen, stored):
            assert set(other) <= set(one) if inside else set(one) <= set(other)


def test_lossless_budgets_are_exact():
    method = HACKPlusPlus()
    for budget in (WIDE.cacheable, WIDE.total):
        plan, _ = make_plan(method, WIDE, budget, WIDE.total)
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(run(HeadGroupCache(plan, method), WIDE), run(FullCache(WIDE, 2), WIDE))
        )


def test_stored_bytes_are_the_budget_once_it_binds():
    method = HACKPlusPlus(tau=1.0)
    plan, _ = make_plan(method, VAR_256, 68, 204)
    cache = HeadGroupCache(plan, method)
    run(cache, VAR_256)
    report = cache.report()
    gap = max(len(group) for layer in plan.layers for group in layer.groups) / 8
    for tokens in report.tokens_by_step[5:]:
        assert 68 - gap < tokens <= 68
    assert report.attended_by_step[-2:] == [204, 204]
    assert report.metadata_bytes == pytest.approx(report.bytes_allocated_peak * 2 / (2 * 8 * 4 + 2), rel=0.05)


def test_the_pipeline_takes_both_budgets():
    pipe = tiny_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    arguments = {"class_labels": [1, 2], "output_type": "latent", "method": "hack++"}
    report = pipe(**arguments, kv_budget=8, attention_budget=12, generator=seeds(0, 1)).cache_report
    assert report.peak_tokens <= 8 and report.attended_by_step[-1] == 12
    by_default = pipe(**arguments, kv_budget=8, generator=seeds(0, 1)).cache_report
    assert by_default.attended_by_step[-1] == pytest.approx(8 + 16)
    limited = pipe(
        **{**arguments, "method": HACKPlusPlus(attention_budget=0.5)}, kv_budget=8, generator=seeds(0, 1)
    ).cache_report
    assert limited.attended_by_step[-1] == 15
    with pytest.raises(ValueError, match="attention_budget=2.*at least 5"):
        pipe(**arguments, kv_budget=8, attention_budget=2)
    with pytest.raises(ValueError, match="kv_budget=4.*at least 5"):
        pipe(**arguments, kv_budget=4)
    with pytest.raises(ValueError, match="'hack' ties"):
        pipe(**{**arguments, "method": "hack"}, kv_budget=8, attention_budget=12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": -1}, "alpha"),
        ({"tau": 3}, "tau"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"n_obs": 0}, "n_obs"),
        ({"pooling": "7x7"}, "pooling"),
        ({"prior": "scale"}, "prior"),
        ({"prior_step": "last"}, "prior_step"),
        ({"merge_at": "every"}, "merge_at"),
        ({"query_sampling": "grid"}, "query_sampling"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        HACKPlusPlus(**options)
