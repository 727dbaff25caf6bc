"""What every method must show of the cache: exact when nothing leaves, within budget, freed, independent."""

import weakref
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hack_pipelines.cache
from hack_pipelines.cache import FullCache
from hack_pipelines.methods import (
    HACK,
    MEDA,
    Geometry,
    HACKPlusPlus,
    HeadKV,
    HeatKV,
    LookM,
    Random,
    Ranking,
    ScaleKV,
    ScaleWindow,
)
from hack_pipelines.methods import METHODS as ALL_METHODS
from hack_pipelines.methods.selection import top
from hack_pipelines.schedule import Schedule

from .components import OriginalCache, planted_profile, seeds, tiny_pipeline


VARIANTS = {
    "hack-swapped": HACK(rules="swapped"),
    "hack-every": HACK(merge_at="every", cfg_sets="from_cond"),
    "hack-post": HACK(protocol="post"),
    "hack++-published": HACKPlusPlus(tau=0.5, pooling="3x3", prior_step="current", strict=True),
    "headkv-online": HeadKV(types="online"),
    # The published window of 16 leaves nothing to evict on schedules as small as these.
    "scalekv": ScaleKV(window=4),
    "scalekv-linear": ScaleKV(window=4, allocation="linear_decay"),
    "scalekv-released": ScaleKV(window=4, scoring="released"),
    "lookm-average": LookM(merging="average"),
    "lookm-weighted": LookM(merging="weighted"),
    "heatkv": HeatKV(sinks=1),
}
# With both protocols, where a method has a choice.
DEFAULTS = {name: method() for name, method in ALL_METHODS.items() if name not in VARIANTS}
OTHERS = {
    f"{name}-pre": replace(method, protocol="pre")
    for name, method in DEFAULTS.items()
    if method.protocol == "post" and "protocol" in {option.name for option in fields(method)}
}
MATRIX = DEFAULTS | OTHERS | VARIANTS
METHODS, METHOD_IDS = list(MATRIX.values()), list(MATRIX)
# Plans of one row tell nothing of another's.
PLANNED = {name: method for name, method in MATRIX.items() if not method.plans_by_row}
# Nothing is ranked by a static plan, and merged keys are no more those that were handed over.
RANKED = {
    name: method
    for name, method in PLANNED.items()
    if method.protocol != "static" and not isinstance(method, (LookM, MEDA))
}
every_method = pytest.mark.parametrize("method", METHODS, ids=METHOD_IDS)
WIDE = Schedule(((1, 1), (1, 3), (2, 5), (3, 8), (5, 14)))

schedules = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=6).map(
    lambda sizes: Schedule(tuple(sorted(sizes, key=lambda size: size[0] * size[1])))
)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    return pipe


def draw(pipe, labels=(1, 2), generator_seeds=(0, 1), **arguments):
    return pipe(class_labels=list(labels), generator=seeds(*generator_seeds), output_type="latent", **arguments)


def step_parts(schedule, step, rows=2, heads=4, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    parts = (torch.randn(rows, heads, schedule.lengths[step], dim, generator=generator) for _ in range(3))
    return [part.to(dtype) for part in parts]


def attend(cache, layer, parts):
    """What an attention layer does: projections are handed over where the cache reads them."""
    return cache.attend(layer, *parts, **({"projection": parts[0]} if cache.wants_projection else {}))


def make_cache(method, schedule, budget, layers=1, heads=4, guided=False, seed=0):
    geometry = Geometry(schedule, layers, heads, 8)
    profile = planted_profile(schedule, layers, heads, 8, seed)
    budget = max(budget, method.min_budget(geometry, profile))
    return hack_pipelines.cache.make_cache(method.plan(geometry, budget, profile), method, guided), budget


# -- exactness ---------------------------------------------------------------------------------------------------------


def lossless_budget(method, schedule):
    return schedule.total if method.protocol == "pre" else schedule.cacheable


@every_method
def test_lossless_budgets_are_exact(pipe, method):
    full = draw(pipe)
    schedule = pipe.transformer.schedule
    for budget in (1.0, lossless_budget(method, schedule)):
        out = draw(pipe, kv_budget=budget, method=method)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.tokens, full.tokens, strict=True))
        assert torch.equal(out.images, full.images)
        assert out.cache_report.peak_tokens == schedule.cacheable


@every_method
def test_one_token_less_than_lossless_is_not_kept(pipe, method):
    schedule = pipe.transformer.schedule
    report = draw(pipe, kv_budget=lossless_budget(method, schedule) - 1, method=method).cache_report
    assert report.peak_tokens < schedule.cacheable or report.attended_by_step[-1] < schedule.total


@every_method
def test_a_small_budget_changes_the_tokens(pipe, method):
    many = tuple(range(8))
    budget = max(8, method.min_budget(pipe.geometry(), pipe.head_profile))
    ours, full = draw(pipe, many, many, kv_budget=budget, method=method), draw(pipe, many, many)
    assert any(not torch.equal(first, second) for first, second in zip(ours.tokens, full.tokens))


@pytest.mark.parametrize("method", PLANNED.values(), ids=PLANNED)
def test_steps_before_the_first_eviction_are_exact(method):
    layers, budget = 2, 30
    cache, budget = make_cache(method, WIDE, budget, layers)
    full = FullCache(WIDE, layers)
    lossless_so_far = True
    for step in range(len(WIDE)):
        parts = step_parts(WIDE, step)
        for layer in range(layers):
            plan = cache.plan.layers[layer]
            present = [count + WIDE.lengths[step] for count in (plan.store[step - 1] if step else plan.attend[0])]
            present = [WIDE.lengths[0]] * len(plan.groups) if step == 0 else present
            lossless_so_far &= list(plan.attend[step]) == present
            ours, theirs = attend(cache, layer, parts), full.attend(layer, *parts)
            if lossless_so_far:
                assert torch.equal(ours, theirs)
            lossless_so_far &= step == len(WIDE) - 1 or list(plan.store[step]) == present
    assert not torch.equal(ours, theirs)


# -- the dense oracle --------------------------------------------------------------------------------------------------


def masked_attention(query, key, value, kept):
    """Attention over all tokens with a mask of those that are there, `kept` `[rows, heads, tokens]`."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=kept.unsqueeze(2).expand(-1, -1, query.shape[2], -1), scale=1.0
    )


@pytest.mark.parametrize("method", RANKED.values(), ids=RANKED)
@pytest.mark.parametrize("budget", [12, 25, 40, 60])
def test_equals_dense_attention_with_a_mask(method, budget):
    """The same sets, held as a mask over everything ever seen, must give the same output for every group."""
    if getattr(method, "merge_at", "never") != "never":
        method = HACK(**{**method_options(method), "merge_at": "never"})
    cache, budget = make_cache(method, WIDE, budget)
    plan = cache.plan.layers[0]
    alive = torch.zeros(2, 4, 0, dtype=torch.bool)
    keys = values = torch.zeros(2, 4, 0, 8)
    for step in range(len(WIDE)):
        query, key, value = step_parts(WIDE, step)
        before = {group.heads: group for group in cache.groups[0]}
        views = record_views(cache)
        output = attend(cache, 0, (query, key, value))
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        alive = F.pad(alive, (0, WIDE.lengths[step]), value=True)
        seen, after = alive.clone(), alive.clone()
        for index, heads in enumerate(plan.groups):
            if heads not in views:
                continue
            scores, tiers, _, store_scores = views[heads]
            store_scores = scores if store_scores is None else store_scores
            for row in range(2):
                for place, head in enumerate(heads):
                    ids = alive[row, head].nonzero()[:, 0]
                    assert len(ids) == scores.shape[-1]
                    own_tiers = tiers if tiers is None or tiers.ndim == 1 else tiers[row, place]
                    for target, own, count in (
                        (seen, scores, plan.attend[step][index]),
                        (after, store_scores, plan.store[step][index]),
                    ):
                        target[row, head] = False
                        target[row, head, ids[top(own[row, place], count, own_tiers)]] = True
        torch.testing.assert_close(output, masked_attention(query, keys, values, seen), atol=1e-5, rtol=1e-5)
        alive = after if step < len(WIDE) - 1 else alive & False
        for group in cache.groups[0]:
            for place, head in enumerate(group.heads):
                for row in range(2):
                    assert torch.equal(group.held.key[0][row, place], keys[row, head, alive[row, head]])
                    assert torch.equal(group.held.value[0][row, place], values[row, head, alive[row, head]])
        assert step == 0 or before is not None


def method_options(method):
    return dict(vars(method))


def record_views(cache):
    """Rankings of the next step by heads, as the method gives them."""
    seen, method = {}, cache.method

    class Watched(type(method)):
        def rank(self, view):
            seen[view.heads] = super().rank(view)
            return seen[view.heads]

    watched = object.__new__(Watched)
    watched.__dict__.update(method.__dict__)
    cache.method = watched
    return seen


# -- budgets and memory ------------------------------------------------------------------------------------------------


def check_bytes(method, schedule, budget, layers=2, heads=4, guided=False, seed=0):
    """What is stored between two steps never exceeds the budget, neither in tokens nor in bytes."""
    cache, budget = make_cache(method, schedule, budget, layers, heads, guided, seed)
    for step in range(len(schedule)):
        for layer in range(layers):
            attend(cache, layer, step_parts(schedule, step, rows=2, heads=heads, seed=seed))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in range(layers)
            for tensor in (*cache._tensors(layer), *cache._metadata(layer))
        }
        allowed = 2 * layers * heads * budget * (8 * 2 * 4 + method.metadata_bytes)
        assert sum(storages.values()) <= allowed
        if step == len(schedule) - 1:
            assert not storages
    report = cache.report()
    images = 1 if guided else 2
    # An arena is as large from its first token on as it is at its largest checkpoint.
    assert report.bytes_logical_peak <= report.bytes_allocated_peak
    assert method.protocol == "static" or report.bytes_allocated_peak == report.bytes_logical_peak
    assert report.bytes_allocated_peak * images <= allowed
    assert report.peak_tokens <= budget
    assert report.metadata_bytes <= 2 * layers * heads * budget * method.metadata_bytes // images


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS),
    schedules,
    st.integers(1, 80),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_stored_bytes_never_exceed_the_budget(method, schedule, budget, layers, heads, guided, seed):
    check_bytes(method, schedule, budget, layers, heads, guided, seed)


@pytest.mark.parametrize("budget", [1, 12, 17, 25, WIDE.cacheable - 1, WIDE.total])
@every_method
def test_every_method_keeps_small_and_large_budgets(method, budget):
    check_bytes(method, WIDE, budget)


@dataclass
class Greedy(Random):
    """Holds nearly everything, whatever it was asked for, in a plan that knows no better."""

    def plan(self, geometry, budget, profile, attention_budget=None):
        return super().plan(geometry, max(budget, geometry.schedule.cacheable - 20), profile)


def test_a_plan_over_its_budget_is_noticed():
    with pytest.raises(AssertionError):
        check_bytes(Greedy(), WIDE, 12)


def test_the_last_scale_is_never_stored():
    cache = FullCache(WIDE, 2)
    stored = []
    for step in range(len(WIDE)):
        for layer in range(2):
            cache.attend(layer, *step_parts(WIDE, step))
            stored.append(sum(tensor.nbytes for index in range(2) for tensor in cache._tensors(index)))
    assert stored[-1] == 0 and stored[-2] == stored[-3] // 2
    assert cache.report().peak_tokens == WIDE.cacheable


@every_method
def test_evicted_storage_is_released(method):
    cache, _ = make_cache(method, WIDE, 20)
    watched = []
    for step in range(len(WIDE)):
        query, key, value = step_parts(WIDE, step)
        watched.append(weakref.ref(key.untyped_storage()))
        attend(cache, 0, (query, key, value))
        watched += [weakref.ref(tensor.untyped_storage()) for tensor in cache._tensors(0)]
        del query, key, value
        alive = {tensor.untyped_storage().data_ptr() for tensor in cache._tensors(0)}
        left = {storage.data_ptr() for reference in watched if (storage := reference()) is not None}
        assert left <= alive
    assert not list(cache._tensors(0))


class LargestKeyAxis(TorchDispatchMode):
    """Notes the token axis of every tensor that looks like keys or values."""

    def __init__(self, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[-1] == self.head_dim:
                self.largest = max(self.largest, tensor.shape[-2])
        return result


@pytest.mark.parametrize("method", [HACK(), Random(protocol="pre"), ScaleWindow(protocol="pre")])
def test_selection_never_joins_history_and_current_tokens(method):
    schedule = Schedule.from_sides((1, 2, 3, 4, 5, 6, 7))
    cache, budget = make_cache(method, schedule, 42)
    for step in range(len(schedule)):
        parts = step_parts(schedule, step)
        held = max((group.held.key[0].shape[2] for group in cache.groups[0]), default=0)
        with LargestKeyAxis(8) as watch:
            cache.attend(0, *parts)
        limit = max(max(cache.plan.layers[0].attend[step]), held, schedule.lengths[step])
        assert watch.largest <= limit
    assert limit < schedule.total


def test_report_of_the_published_setting():
    schedule = Schedule.from_sides((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    cache, budget = make_cache(HACK(), schedule, 204, layers=2)
    for step in range(len(schedule)):
        for layer in range(2):
            cache.attend(layer, *step_parts(schedule, step))
    report = cache.report()
    assert report.tokens_by_step == [1, 5, 14, 30, 55, 79.5, 111.5, 161.5, 204]
    assert report.attended_by_step == [1, 5, 14, 30, 55, 79.5, 111.5, 161.5, 204, 204]
    assert report.peak_tokens == 204 and report.mean_tokens == pytest.approx(sum(report.tokens_by_step) / 9)
    channels = 2 * 4 * 8
    assert report.bytes_by_step == [tokens * channels * 2 * 4 for tokens in report.tokens_by_step]
    assert report.bytes_allocated_peak == 204 * channels * 2 * 4
    assert report.bytes_full == 680 * channels * 8 and report.bytes_full_cacheable == 424 * channels * 8
    flops = sum(4 * 8 * 8 * n * a for n, a in zip(schedule.lengths, report.attended_by_step))
    assert report.attention_flops == flops
    assert "204.0 tokens a head" in str(report)


def test_checkpoint_peak_is_between_boundary_peaks():
    cache = FullCache(WIDE, 2)
    for step in range(len(WIDE)):
        for layer in range(2):
            cache.attend(layer, *step_parts(WIDE, step))
    assert cache.report().checkpoint_peak_tokens == WIDE.cacheable


# -- what the cache refuses --------------------------------------------------------------------------------------------


def test_wrong_number_of_tokens_is_refused():
    cache = FullCache(WIDE, 1)
    with pytest.raises(ValueError, match="got 3 tokens at step 0"):
        cache.attend(0, *step_parts(WIDE, 1))
    for step in range(len(WIDE)):
        cache.attend(0, *step_parts(WIDE, step))
    assert cache.get_seq_length() == WIDE.total
    with pytest.raises(ValueError, match="reset"):
        cache.attend(0, *step_parts(WIDE, 0))
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.attend(0, *step_parts(WIDE, 0))


def test_nothing_to_report_before_the_first_token():
    with pytest.raises(ValueError, match="no token"):
        FullCache(WIDE, 1).report()


def test_scores_that_are_not_finite_are_an_error():
    cache, _ = make_cache(HACK(), WIDE, 20)
    with pytest.raises(ValueError, match="not finite"):
        for step in range(len(WIDE)):
            query, key, value = step_parts(WIDE, step)
            cache.attend(0, query, key * torch.inf, value)


@every_method
def test_a_cache_can_be_used_again_after_reset(method):
    cache, _ = make_cache(method, WIDE, 20)
    runs = []
    for _ in range(2):
        runs.append([attend(cache, 0, step_parts(WIDE, step)) for step in range(len(WIDE))])
        cache.reset()
    assert all(torch.equal(first, second) for first, second in zip(*runs))


# -- independence ------------------------------------------------------------------------------------------------------


@every_method
def test_an_image_does_not_depend_on_its_batch(pipe, method):
    options = {"kv_budget": 15, "method": method}
    both = draw(pipe, (1, 2), (0, 1), **options)
    swapped = draw(pipe, (2, 1), (1, 0), **options)
    for index, (label, seed) in enumerate(((1, 0), (2, 1))):
        alone = draw(pipe, (label,), (seed,), **options)
        for ours, theirs, other in zip(both.tokens, alone.tokens, swapped.tokens, strict=True):
            assert torch.equal(ours[index], theirs[0]) and torch.equal(other[1 - index], theirs[0])
    assert both.cache_report.bytes_allocated_peak == alone.cache_report.bytes_allocated_peak


def unlike_rows(step):
    """Queries, keys and values of six rows: those with odd numbers are far larger than the others, and lie elsewhere."""
    sizes, shifts = torch.tensor([[1.0, 40, 0.02, 40, 1, 40], [0.0, 3, 0, -5, 1, 4]]).view(2, 6, 1, 1, 1)
    return [(part + shifts) * sizes for part in step_parts(WIDE, step, rows=6)]


def outputs_of(method, budget, batch, rows, guided):
    """What some rows of a batch get from attention, step by step."""
    cache, _ = make_cache(method, WIDE, budget, guided=guided)
    places = [batch.index(row) for row in rows]
    return [attend(cache, 0, [part[batch] for part in unlike_rows(step)])[places] for step in range(len(WIDE))]


def check_rows_are_independent(method, budget, guided):
    """An image's rows get the same alone as first and as last of a batch with rows of quite another size."""
    pairs = (
        [([0, 2], [0, 1, 3, 2, 5, 1]), ([2, 4], [3, 1, 2, 5, 1, 4])]
        if guided
        else [([0], [0, 1, 3]), ([4], [3, 1, 4])]
    )
    for rows, batch in pairs:
        alone, together = (outputs_of(method, budget, own, rows, guided) for own in (rows, batch))
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("budget", [12, 30])
@every_method
def test_what_is_kept_does_not_depend_on_other_rows(method, budget, guided):
    check_rows_are_independent(method, budget, guided)


@dataclass
class FarFromTheBatch(Random):
    """Keeps the tokens whose values are farthest from the mean of all rows, which it must not read."""

    def rank(self, view):
        value = torch.cat((view.stored_value, view.value), dim=2)
        return Ranking((value - value.mean((0, 2), keepdim=True)).norm(dim=-1))


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_a_score_of_the_whole_batch_is_noticed(guided):
    with pytest.raises(AssertionError, match="not close"):
        check_rows_are_independent(FarFromTheBatch(), 12, guided)


def test_nothing_is_left_of_earlier_calls(pipe):
    first = draw(pipe, kv_budget=15)
    for seed in range(5):
        draw(pipe, (seed,), (seed,), kv_budget=10 + seed, method=Random(seed))
    again = draw(pipe, kv_budget=15)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.tokens, again.tokens))


@every_method
def test_lengths_do_not_depend_on_the_input(pipe, method):
    reports = [draw(pipe, (label,), (label,), kv_budget=15, method=method).cache_report for label in (1, 5)]
    assert reports[0].tokens_by_step == reports[1].tokens_by_step
    assert reports[0].attended_by_step == reports[1].attended_by_step


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_what_attention_reads_is_exact_under_autocast(pipe, dtype):
    with torch.autocast("cpu", dtype=dtype):
        ours = draw(pipe)
        exact = draw(pipe, kv_budget=1.0)
    labels = torch.tensor([1, 2, 10, 10])
    cache = OriginalCache(pipe.transformer.schedule, 3, guided=True)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        _, tokens = pipe.draw_scales(labels, cache, pipe.prepare_settings(), seeds(0, 1))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours.tokens, tokens, exact.tokens))
    assert all(key.dtype == torch.float32 for key in cache.keys)
    report = ours.cache_report
    assert report.bytes_allocated_peak == pipe.transformer.schedule.cacheable * 2 * 3 * 4 * 16 * 2 * 2
    assert report.bytes_full == pipe.transformer.schedule.total * 2 * 3 * 4 * 16 * (4 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_the_one_attention_reads(dtype):
    cache, _ = make_cache(HACK(), WIDE, 20)
    for step in range(len(WIDE) - 1):
        output = cache.attend(0, *step_parts(WIDE, step, dtype=dtype))
        assert output.dtype == dtype
        assert {tensor.dtype for tensor in cache._tensors(0)} == {dtype}
