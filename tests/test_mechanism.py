"""What all methods share: counts from weights, strict plans, profiles of other schedules, quantised storage, ids, rows."""

import math
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hack_pipelines.cache import HeadGroupCache, RowwiseCache, make_cache
from hack_pipelines.cache.storage import Int8Storage, PlainStorage, get_storage
from hack_pipelines.methods import HACK, METHODS, Geometry, LayerPlan, Plan, Random, uniform_plan
from hack_pipelines.methods.allocation import allocate
from hack_pipelines.schedule import Schedule

from .components import half_contextual, planted_profile, seeds, tiny_pipeline, tiny_text_pipeline
from .test_cache import WIDE, step_parts
from .test_methods import VAR_256, VAR_512, schedules


INT8 = Int8Storage()


# -- counts from weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "wanted"), [(40, [40, 22, 15, 7]), (1000, [54, 17, 12, 6])])
def test_allocate_vectors(cap, wanted):
    assert allocate([3, 5, 4, 4], [0.9, 0.3, 0.2, 0.1], [cap] * 4, [1] * 4, 320) == wanted


groups = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.integers(1, 5).map(float)),
        st.integers(0, 40),
        st.integers(0, 10),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=400, deadline=None)
@given(groups, st.integers(0, 800))
def test_allocate_keeps_the_average(members, more):
    counts, weights, spread, floors = (list(column) for column in zip(*members))
    caps = [floor + own for floor, own in zip(floors, spread)]
    total = sum(count * floor for count, floor in zip(counts, floors)) + more
    tokens = allocate(counts, weights, caps, floors, total)
    used = sum(count * own for count, own in zip(counts, tokens))
    assert used <= total
    assert all(floor <= own <= cap for floor, own, cap in zip(floors, tokens, caps))
    assert tokens == caps or total - used < max(counts)
    for first in range(len(members)):
        for second in range(len(members)):
            if all(column[first] >= column[second] for column in (weights, floors, caps)):
                assert tokens[first] >= tokens[second] - 1


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 200))
def test_equal_weights_get_equal_parts(members, heads, total):
    tokens = allocate([heads] * members, [0.3] * members, [100] * members, [0] * members, total)
    wanted = min(100 * members, total // heads)
    assert sum(tokens) == wanted and max(tokens) - min(tokens) <= 1


def test_allocate_gives_what_is_left_to_those_of_weight_zero():
    assert allocate([1, 1, 1], [1.0, 0.0, 0.0], [5, 50, 50], [0, 0, 0], 25) == [5, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([2, 3], [1, 1], [9, 9], [4, 4], 19), "floors alone take 20 head-tokens of 19"),
        (([1], [-0.5], [9], [0], 9), "Group 0 needs a weight of at least 0"),
        (([1, 1], [1, math.nan], [9, 9], [0, 0], 9), "Group 1 needs a weight of at least 0"),
        (([1], [1], [3], [4], 9), "floor 4 and cap 3"),
    ],
)
def test_allocate_refuses_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


# -- strict plans ------------------------------------------------------------------------------------------------------


def checkpoints(plan):
    """Head-tokens that are held after each layer of each step, with loops."""
    held = [[[0] * len(layer.groups) for layer in plan.layers]]
    held += [[layer.store[step] for layer in plan.layers] for step in range(len(plan.schedule))]
    result = []
    for step in range(1, len(held)):
        for committed in range(len(plan.layers)):
            now = held[step][: committed + 1] + held[step - 1][committed + 1 :]
            result.append(
                sum(
                    len(group) * count
                    for layer, counts in zip(plan.layers, now)
                    for group, count in zip(layer.groups, counts)
                )
            )
    return result


@st.composite
def plans(draw):
    """Plans whose layers grow and shrink over the steps, with the smallest budget that they keep between steps."""
    schedule = draw(schedules)
    heads = draw(st.integers(1, 5))
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        cut = draw(st.integers(0, heads - 1))
        groups = tuple(group for group in (tuple(range(cut)), tuple(range(cut, heads))) if group)
        limits = [[draw(st.integers(1, 60)) for _ in groups] for _ in schedule.lengths]
        labels = tuple(map(str, range(len(groups))))
        layers.append(LayerPlan.from_limits(schedule, groups, labels, limits, draw(st.sampled_from(["pre", "post"]))))
    held = [
        sum(len(group) * count for layer in layers for group, count in zip(layer.groups, layer.store[step]))
        for step in range(len(schedule))
    ]
    budget = -(-max(held) // (len(layers) * heads)) + draw(st.integers(0, 2))
    return Plan(schedule, budget, tuple(layers)), heads


@settings(max_examples=200, deadline=None)
@given(plans())
def test_strict_plans_keep_their_budget_at_every_checkpoint(drawn):
    plan, heads = drawn
    allowed = plan.budget * len(plan.layers) * heads
    strict = plan.strict()
    assert max(checkpoints(strict)) <= allowed
    for own, other in zip(strict.layers, plan.layers):
        assert own.groups == other.groups and own.labels == other.labels
        for counts, others in ((own.store, other.store), (own.attend, other.attend)):
            assert all(now <= before for pair in zip(counts, others) for now, before in zip(*pair))
    if max(checkpoints(plan)) <= allowed:
        assert strict == plan


def test_a_strict_plan_takes_from_layers_that_shrink_anyway():
    schedule = Schedule(((1, 10), (1, 10), (1, 10)))
    growing, shrinking = (
        LayerPlan.from_limits(schedule, ((0,),), ("all",), [(limit,) for limit in limits], "post")
        for limits in ([2, 10, 0], [10, 2, 0])
    )
    plan = Plan(schedule, 6, (growing, shrinking))
    assert max(checkpoints(plan)) == 20
    strict = plan.strict()
    assert max(checkpoints(strict)) == 12
    assert strict.layers[0] == growing
    assert [store[0] for store in strict.layers[1].store] == [2, 2, 0]
    # The other way round nothing is too much.
    assert (other := Plan(schedule, 6, (shrinking, growing))).strict() == other


# -- profiles of other schedules ---------------------------------------------------------------------------------------


def test_a_schedule_with_as_many_scales_reads_the_profile_as_it_is():
    profile = planted_profile(VAR_256, 2, 3, 8, 0)
    assert profile.for_schedule(VAR_256) is profile and profile.for_schedule(VAR_512) is profile


def nearest_scale(recorded, length):
    """The recorded scale nearest to a number of tokens on a logarithmic scale, the larger of two."""
    distances = [abs(math.log(length) - math.log(own)) for own in recorded.lengths]
    return max(scale for scale, distance in enumerate(distances) if distance <= min(distances) + 1e-12)


@settings(max_examples=60, deadline=None)
@given(schedules, schedules, st.integers(0, 9))
def test_profile_of_another_number_of_scales(recorded, wanted, seed):
    assume(len(recorded) != len(wanted))
    assume(len(set(recorded.lengths)) == len(recorded))
    profile = planted_profile(recorded, 2, 3, 8, seed)
    before = {name: array.clone() for name, array in profile.mean.items()}
    resampled = profile.for_schedule(wanted)
    assert resampled.schedule == wanted and profile.schedule == recorded
    assert all(torch.equal(profile.mean[name], array) for name, array in before.items())
    scales = [nearest_scale(recorded, length) for length in wanted.lengths]
    assert scales == sorted(scales)
    for name in ("colvar", "topk_hist", "local", "entropy", "vnorm"):
        for k, scale in enumerate(scales):
            assert torch.equal(resampled.mean[name][:, :, k], profile.mean[name][:, :, scale])
    mass = resampled.mean["mass"]
    assert mass.shape == (2, 3, len(wanted), len(wanted)) and torch.equal(mass, mass.tril())
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3, len(wanted)))
    for k, scale in enumerate(scales):
        parts = [
            profile.mean["mass"][1, 2, scale, scales[s]].item() / recorded.lengths[scales[s]] * wanted.lengths[s]
            for s in range(k + 1)
        ]
        np.testing.assert_allclose(mass[1, 2, k, : k + 1], np.array(parts) / sum(parts), rtol=1e-4)


def test_the_larger_of_two_equally_near_scales_is_taken():
    profile = planted_profile(Schedule(((1, 1), (1, 2), (1, 8))), 1, 1, 8, 0)
    resampled = profile.for_schedule(Schedule(((1, 1), (1, 4))))
    assert torch.equal(resampled.mean["colvar"][0, 0], profile.mean["colvar"][0, 0, [0, 2]])


def test_hack_draws_with_a_profile_of_another_number_of_scales():
    pipe = tiny_text_pipeline()
    other = Schedule(((1, 1), (2, 2), (3, 3), (3, 3), (4, 4)))
    pipe.head_profile = planted_profile(other, 3, 4, 16, 0)
    arguments = {"prompt": ["a red cat"], "output_type": "latent", "kv_budget": 12}
    out = pipe(generator=seeds(0), **arguments)
    pipe.head_profile = pipe.head_profile.for_schedule(pipe.schedule)
    wanted = pipe(generator=seeds(0), **arguments)
    assert out.cache_report.peak_tokens <= 12
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.tokens, wanted.tokens, strict=True))


# -- quantised storage -------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 999), st.floats(-6, 6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_round_trip_is_within_half_a_step(seed, exponent, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(2, 3, 7, 16, generator=generator) * 10 ** (exponent / (2 if dtype == torch.float16 else 1))
    tensor = tensor.to(dtype)
    data, scale = INT8.encode(tensor)
    assert data.dtype == torch.int8 and data.shape == tensor.shape
    assert scale.dtype == torch.float16 and scale.shape == (2, 3, 7, 1)
    values = tensor.float()
    back = INT8.decode((data, scale), torch.float32)
    assert ((back - values).abs() <= scale.float() * (0.5 + 1e-4)).all()
    # The factor is the largest magnitude over 127, as near as float16 has it.
    wanted = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float16).smallest_normal)
    assert ((scale.float() - wanted).abs() <= wanted * 2**-11).all()
    decoded = INT8.decode((data, scale), dtype)
    assert decoded.dtype == dtype and torch.equal(decoded, back.to(dtype))


def test_zeros_and_huge_values_are_safe():
    tensor = torch.zeros(1, 1, 5, 4)
    tensor[0, 0, 1] = 3e38
    tensor[0, 0, 2] = torch.tensor([1e-12, -1e-12, 0, 0])
    tensor[0, 0, 3] = torch.tensor([-3e38, 1.0, 0, 0])
    tensor[0, 0, 4] = torch.tensor([65504.0 * 127, -1, 0, 0])
    planes = INT8.encode(tensor)
    back = INT8.decode(planes, torch.float32)
    assert torch.isfinite(planes[1]).all() and (planes[1] > 0).all() and torch.isfinite(back).all()
    largest = 65504.0 * 127
    assert (back[0, 0, 0] == 0).all() and (back[0, 0, 2].abs() < 1e-4).all()
    assert (back[0, 0, 1] == largest).all() and back[0, 0, 3].tolist() == [-largest, 0, 0, 0]
    assert back[0, 0, 4, 0] == largest
    assert [part.shape[2] for part in INT8.encode(tensor[:, :, :0])] == [0, 0]


@pytest.mark.parametrize(("dim", "deviation"), [(128, 5.7e-4), (64, 7.4e-4)])
@pytest.mark.parametrize("tau", [1, 10, 50, 100])
def test_logits_are_as_far_off_as_the_formula_says(dim, deviation, tau):
    generator = torch.Generator().manual_seed(dim)
    keys = F.normalize(torch.randn(1, 1, 500, dim, generator=generator), dim=-1)
    queries = tau * F.normalize(torch.randn(1, 1, 40, dim, generator=generator), dim=-1)
    data, scale = INT8.encode(keys)
    errors = queries.double() @ (INT8.decode((data, scale), torch.float32).double() - keys.double()).transpose(-1, -2)
    expected = tau * scale.double().transpose(-1, -2) / 12**0.5
    assert errors.std().item() == pytest.approx(tau * deviation, rel=0.05)
    assert (errors / expected).std().item() == pytest.approx(1, rel=0.05)
    # Of 20 000 errors about one lies farther out.
    assert ((errors / expected).abs() > 4).sum() <= 5


@dataclass
class Tracked(Random):
    """Random eviction that notes which tokens it is shown."""

    needs_ids = True

    def __post_init__(self):
        super().__post_init__()
        self.seen = []

    def rank(self, view):
        self.seen.append((view.step, view.heads, view.ids, view.stored_key))
        return super().rank(view)


def everything(schedule, **arguments):
    """Keys and values of all steps, `[rows, heads, tokens, head_dim]`."""
    parts = [step_parts(schedule, step, **arguments) for step in range(len(schedule))]
    return [torch.cat([part[place] for part in parts], dim=2) for place in (1, 2)]


def at_ids(tensor, ids):
    return tensor.gather(2, ids.long().unsqueeze(-1).expand(*ids.shape, tensor.shape[-1]))


@settings(max_examples=40, deadline=None)
@given(schedules, st.integers(0, 30), st.sampled_from(["pre", "post"]), st.integers(0, 99))
def test_a_kept_token_decodes_to_the_same_bits_for_ever(schedule, more, protocol, seed):
    method = Tracked(seed=seed, protocol=protocol)
    geometry = Geometry(schedule, 1, 4, 8)
    budget = method.min_budget(geometry, None) + more
    cache = HeadGroupCache(method.plan(geometry, budget, None), method, storage=INT8)
    full = [INT8.encode(part) for part in everything(schedule, seed=seed)]
    for step in range(len(schedule) - 1):
        cache.attend(0, *step_parts(schedule, step, seed=seed))
        (group,) = cache.groups[0]
        count = group.held.key[0].shape[2]
        ids = group.held.ids[0].squeeze(-1) if group.held.ids else torch.arange(count).expand(2, 4, -1)
        for held, encoded in zip((group.held.key, group.held.value), full):
            assert all(torch.equal(own, at_ids(plane, ids)) for own, plane in zip(held, encoded))
            decoded = INT8.decode(held, torch.float32)
            assert torch.equal(decoded, at_ids(INT8.decode(encoded, torch.float32), ids))


@pytest.mark.parametrize("protocol", ["pre", "post"])
def test_attention_reads_stored_tokens_decoded_and_current_ones_exact(protocol):
    method = Random(protocol=protocol)
    geometry = Geometry(WIDE, 1, 4, 8)
    plan = uniform_plan(geometry, WIDE.total, protocol)
    cache, history = HeadGroupCache(plan, method, storage=INT8), None
    for step in range(len(WIDE)):
        query, key, value = step_parts(WIDE, step)
        parts = [key, value] if history is None else [torch.cat(pair, dim=2) for pair in zip(history, (key, value))]
        assert torch.equal(cache.attend(0, query, key, value), F.scaled_dot_product_attention(query, *parts, scale=1))
        decoded = [INT8.decode(INT8.encode(part), part.dtype) for part in (key, value)]
        history = decoded if history is None else [torch.cat(pair, dim=2) for pair in zip(history, decoded)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_keys_are_quantised_anew(dtype):
    method, geometry = HACK(merge_at="every"), Geometry(WIDE, 1, 4, 8)
    plan = method.plan(geometry, 20, half_contextual(1, 4))
    caches = [HeadGroupCache(plan, method, storage=storage) for storage in (INT8, PlainStorage())]
    for step in range(len(WIDE)):
        parts = step_parts(WIDE, step, dtype=dtype)
        ours, theirs = (cache.attend(0, *parts) for cache in caches)
        assert ours.dtype == dtype and torch.isfinite(ours).all()
        for group, other in zip(*(cache.groups[0] for cache in caches)):
            assert [plane.shape[:3] for plane in group.held.key] == [other.held.key[0].shape[:3]] * 2
        if step == 0:
            assert torch.equal(ours, theirs)
    # The eighth bit moves what is merged, but what comes out stays near.
    assert F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean() > 0.9


def test_bytes_of_quantised_tokens():
    assert INT8.metadata_bytes == 4 and INT8.itemsize(torch.bfloat16) == 1 and INT8.itemsize(torch.float32) == 1
    plan = uniform_plan(Geometry(VAR_256, 2, 4, 8), 200, "post")
    cache = HeadGroupCache(plan, Random(), guided=True, storage=INT8)
    for step in range(len(VAR_256)):
        for layer in range(2):
            cache.attend(layer, *step_parts(VAR_256, step, dtype=torch.bfloat16))
    report = cache.report()
    rows_layers_heads = 2 * 2 * 4
    assert report.peak_tokens == 200
    assert report.bytes_logical_peak == report.bytes_allocated_peak == rows_layers_heads * 200 * (2 * 8 + 4)
    assert report.metadata_bytes == rows_layers_heads * 200 * 4
    # What it is compared with is not quantised.
    assert report.bytes_full == 680 * rows_layers_heads * 8 * (4 + 2)
    assert report.bytes_full_cacheable == 424 * rows_layers_heads * 8 * 2 * 2


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    return pipe


def draw(pipe, **arguments):
    return pipe(class_labels=list(range(4)), generator=seeds(*range(4)), output_type="latent", **arguments)


def agreement(first, second):
    equal = [(ours == theirs).flatten() for ours, theirs in zip(first.tokens, second.tokens, strict=True)]
    return torch.cat(equal).double().mean().item()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_composes_with_int8(pipe, name):
    method = METHODS[name]()
    budget = max(12, method.min_budget(pipe.geometry(), pipe.head_profile))
    plain = draw(pipe, kv_budget=budget, method=METHODS[name]())
    ours = draw(pipe, kv_budget=budget, method=method, kv_dtype="int8")
    again = draw(pipe, kv_budget=budget, method=method, kv_dtype="int8")
    assert agreement(ours, again) == 1
    # Quantised tokens move few samples of a random model, and whole scales only after the first that is read back.
    assert agreement(ours, plain) > 0.6 and torch.equal(ours.tokens[0], plain.tokens[0])
    report, others = ours.cache_report, plain.cache_report
    assert report.peak_tokens <= budget
    # Two rows an image, three layers of four heads, 16 channels.
    tokens = report.peak_tokens * 2 * 3 * 4
    beside = report.bytes_logical_peak - tokens * 2 * 16
    assert tokens * 4 <= beside <= tokens * (4 + method.metadata_bytes) + 1e-6
    assert report.metadata_bytes >= tokens * 4 - 1e-6
    assert report.bytes_allocated_peak < 0.45 * others.bytes_allocated_peak
    assert report.bytes_full == others.bytes_full


def test_the_full_cache_in_int8(pipe):
    full, ours = draw(pipe), draw(pipe, kv_dtype="int8")
    assert agreement(full, ours) > 0.6 and torch.equal(full.tokens[0], ours.tokens[0])
    report, schedule = ours.cache_report, pipe.schedule
    assert report.tokens_by_step == list(schedule.prefixes[1:])
    assert report.bytes_allocated_peak == schedule.cacheable * 2 * 3 * 4 * (2 * 16 + 4)
    assert report.metadata_bytes == schedule.cacheable * 2 * 3 * 4 * 4
    for method in (HACK(), Random()):
        lossless = draw(pipe, kv_budget=1.0, method=method, kv_dtype="int8")
        assert agreement(lossless, ours) == 1


def test_a_budget_in_bytes_pays_for_the_factors(pipe):
    of_a_token = 2 * 3 * 4 * (2 * 16 + 4)
    for budget, tokens in ((of_a_token * 12, 12), (of_a_token * 12 - 1, 11)):
        report = draw(pipe, kv_budget=f"{budget}B", method="random", kv_dtype="int8").cache_report
        assert report.peak_tokens == tokens and report.bytes_allocated_peak <= budget
    plain = draw(pipe, kv_budget=f"{of_a_token * 12}B", method="random", guidance_scale=1.0).cache_report
    assert plain.bytes_allocated_peak <= of_a_token * 12


def test_unknown_storage_is_refused_by_name_before_anything_runs(pipe, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("ran")

    monkeypatch.setattr(type(pipe.transformer), "forward", never)
    for arguments in ({}, {"kv_budget": 0.5}):
        with pytest.raises(ValueError, match="`kv_dtype` must be one of None, 'int8' but is 'int4'"):
            draw(pipe, kv_dtype="int4", **arguments)
    assert get_storage("int8").name == "int8" and get_storage(None).exact


# -- ids ---------------------------------------------------------------------------------------------------------------


@dataclass
class TrackedHACK(HACK):
    """HACK that notes which tokens it is shown and how it ranks them."""

    needs_ids = True

    def __post_init__(self):
        super().__post_init__()
        self.seen = []

    def rank(self, view):
        ranking = super().rank(view)
        self.seen.append((view, ranking))
        return ranking


@pytest.mark.parametrize("protocol", ["pre", "post"])
@pytest.mark.parametrize("schedule", [WIDE, Schedule.from_sides((1, 2, 3, 4, 5, 6))], ids=["wide", "square"])
def test_ids_stay_right_through_evictions_and_splits(schedule, protocol):
    method, types = TrackedHACK(protocol=protocol), half_contextual(1, 4)
    geometry = Geometry(schedule, 1, 4, 8)
    plan = method.plan(geometry, 25, types)
    cache = HeadGroupCache(plan, method)
    keys, _ = everything(schedule)
    held = {(row, head): [] for row in range(2) for head in range(4)}
    num_ranked, num_ids = 0, []
    for step in range(len(schedule)):
        method.seen.clear()
        cache.attend(0, *step_parts(schedule, step))
        first = schedule.prefixes[step]
        present = {where: ids + list(range(first, first + schedule.lengths[step])) for where, ids in held.items()}
        ranked = {head: (view, ranking) for view, ranking in method.seen for head in view.heads}
        num_ranked += len(ranked)
        for (row, head), ids in present.items():
            if head not in ranked:
                held[row, head] = ids
                continue
            view, ranking = ranked[head]
            place = view.heads.index(head)
            assert view.ids[row, place].tolist() == ids
            assert torch.equal(view.stored_key[row, place], keys[row, head, ids[: view.num_stored]])
            scores = ranking.scores[row, place].tolist()
            tiers = [0] * len(ids) if ranking.tiers is None else ranking.tiers.tolist()
            best = sorted(range(len(ids)), key=lambda j: (-tiers[j], -scores[j], j))
            held[row, head] = [ids[j] for j in sorted(best[: view.store])]
        metadata = list(cache._metadata(0))
        assert all(tensor.dtype == torch.int16 for tensor in metadata)
        if step == len(schedule) - 1:
            assert not metadata
            break
        num_ids.append(sum(len(ids) for (row, _), ids in held.items() if row == 0 and ids != list(range(len(ids)))))
        for group in cache.groups[0]:
            for place, head in enumerate(group.heads):
                for row in range(2):
                    if group.held.ids:
                        assert group.held.ids[0][row, place, :, 0].tolist() == held[row, head]
                    assert torch.equal(group.held.key[0][row, place], keys[row, head, held[row, head]])
    assert num_ranked >= 4 and len(plan.layers[0].groups) == 2
    # Heads that lost nothing yet need no ids: theirs count up from 0.
    assert cache.report().metadata_bytes == 2 * max(num_ids)


def test_a_budget_in_bytes_pays_for_ids(pipe):
    of_a_token = 2 * 3 * 4 * (2 * 16 * 4 + 2)
    report = draw(pipe, kv_budget=f"{of_a_token * 12}B", method=Tracked()).cache_report
    assert report.peak_tokens == 12 and report.bytes_allocated_peak == of_a_token * 12
    assert draw(pipe, kv_budget=f"{of_a_token * 12 - 1}B", method=Tracked()).cache_report.peak_tokens == 11


# -- rows with plans of their own --------------------------------------------------------------------------------------


@dataclass
class ByRow(Random):
    """Gives each head a limit that depends on its queries, from the second step on."""

    @property
    def plans_by_row(self):
        return True

    def replan(self, view, layer):
        if view.step != 1:
            return None
        assert len(view.query) == 1 and view.heads == tuple(range(view.query.shape[1]))
        weights = view.query[0].float().square().sum((1, 2)).softmax(0).tolist()
        heads, total = len(weights), len(weights) * view.budget
        limits = allocate([1] * heads, weights, [view.schedule.total] * heads, [1] * heads, total)
        first = LayerPlan.from_limits(
            view.schedule,
            tuple((head,) for head in range(heads)),
            tuple(map(str, range(heads))),
            [[view.budget] * heads, *[limits] * (len(view.schedule) - 1)],
            self.protocol,
        )
        return first


@pytest.mark.parametrize("storage", [PlainStorage(), INT8], ids=["plain", "int8"])
@pytest.mark.parametrize("protocol", ["pre", "post"])
def test_rows_with_plans_of_their_own(protocol, storage):
    method, budget, layers, rows = ByRow(protocol=protocol), 20, 2, 3
    plan = uniform_plan(Geometry(WIDE, layers, 4, 8), budget, protocol)
    together = make_cache(plan, method, storage=storage)
    alone = [HeadGroupCache(plan, method, storage=storage) for _ in range(rows)]
    assert isinstance(together, RowwiseCache)
    different = set()
    for step in range(len(WIDE)):
        parts = step_parts(WIDE, step, rows=rows)
        for layer in range(layers):
            ours = together.attend(layer, *parts)
            for row, cache in enumerate(alone):
                own = slice(row, row + 1)
                assert torch.equal(ours[own], cache.attend(layer, *(part[own] for part in parts)))
                held = sum(len(group.heads) * group.held.key[0].shape[2] for group in together.rows[row].groups[layer])
                assert held <= 4 * budget
        different |= {
            (step, tuple(group.held.key[0].shape[2] for group in cache.groups[0])) for cache in together.rows
        }
    # At some step the rows differ in how long their heads are.
    assert len(different) > len(WIDE)
    report, own = together.report(), [cache.report() for cache in alone]
    for name in ("tokens_by_step", "attended_by_step"):
        wanted = np.mean([getattr(each, name) for each in own], axis=0)
        assert getattr(report, name) == pytest.approx(wanted.tolist())
    assert report.peak_tokens <= budget
    assert report.bytes_allocated_peak == sum(each.bytes_allocated_peak for each in own) // rows
    assert report.attention_flops == pytest.approx(sum(each.attention_flops for each in own) / rows, rel=1e-3)
    assert report.metadata_bytes == sum(each.metadata_bytes for each in own) // rows
    together.reset()
    assert not together.rows and torch.isfinite(together.attend(0, *step_parts(WIDE, 0, rows=1))).all()


def test_rows_see_their_own_projections_and_leave_none():
    class Projected(ByRow):
        needs_projection = True

        def rank(self, view):
            assert torch.equal(view.projection, view.query + 1)
            return super().rank(view)

    cache = make_cache(uniform_plan(Geometry(WIDE, 1, 4, 8), 20, "post"), Projected())
    assert cache.wants_projection
    for step in range(len(WIDE)):
        query, key, value = step_parts(WIDE, step)
        projection = query + 1
        alive = weakref.ref(projection)
        cache.attend(0, query, key, value, projection=projection)
        del projection
        assert alive() is None


def test_a_method_that_plans_by_row_draws_images(pipe):
    method = ByRow()
    both = draw(pipe, kv_budget=12, method=method)
    assert both.cache_report.peak_tokens <= 12
    for label in range(2):
        single = pipe(class_labels=[label], generator=seeds(label), output_type="latent", kv_budget=12, method=method)
        for ours, theirs in zip(both.tokens, single.tokens, strict=True):
            assert torch.equal(ours[label], theirs[0])
