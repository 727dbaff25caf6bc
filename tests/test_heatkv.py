"""HeatKV: its plan against released data and a simulator of sets, its arena, its cache against dense attention."""

import hashlib
import json
import weakref
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hack_pipelines import HeadProfile
from hack_pipelines.activations import segment_tokens
from hack_pipelines.cache import FullCache, SegmentCache, make_cache
from hack_pipelines.cache.arena import FreeList, SlotMap, most_alive, segments_of
from hack_pipelines.cache.storage import get_storage
from hack_pipelines.cli import main
from hack_pipelines.methods import Geometry, HeatKV, SegmentPlan
from hack_pipelines.methods.heatkv import (
    cumulative_scores,
    forgotten_counts,
    lifetimes,
    pruning_orders,
    sink_tokens,
)
from hack_pipelines.schedule import Schedule

from .components import planted_profile, seeds, tiny_pipeline


INFINITY_1M = Schedule.from_sides((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
WIDE = Schedule(((1, 1), (1, 3), (2, 5), (3, 8), (5, 14)))
RELEASED = Path(__file__).parents[2] / "shared" / "reference" / "data" / "heatkv"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released order files are not here")
SHAPES = {"2b": (32, 16), "8b": (40, 28)}
# Model, budget as a fraction of what is cacheable: heads that have forgotten, early atoms by step, missing ones by step,
# SHA-256 of all missing ones.
VECTORS = {
    ("2b", 0.2): (
        [0] * 9 + [74, 254, 355, 411],
        {9: 103, 10: 66, 11: 75},
        {9: 547, 10: 1844, 11: 2915, 12: 3699},
        "f3c1886c96926f14aa3aa3069076a13307fd6359bd2f8ef9f17200bf86565d70",
    ),
    ("2b", 0.1): (
        [0] * 8 + [159, 297, 385, 435, 463],
        {8: 99, 9: 67, 10: 28, 11: 43},
        {8: 894, 9: 1849, 10: 2723, 11: 3523, 12: 4167},
        "b687f7f8708cde6bd016fb11054db1c42c0fa40e6f9efd223910c7345a1536dc",
    ),
    ("2b", 0.05): (
        [0] * 7 + [205, 342, 408, 451, 475, 488],
        {7: 87, 8: 57, 9: 24, 10: 26, 11: 24},
        {7: 907, 8: 1767, 9: 2472, 10: 3183, 11: 3824, 12: 4392},
        "a201fcef02d2ac6ac93dc86e073934661cf2139d7e07f6612654a679ebd78f2a",
    ),
    ("8b", 0.2): (
        [0] * 9 + [161, 554, 775, 899],
        {9: 390, 10: 318, 11: 228},
        {9: 1356, 10: 4196, 11: 6428, 12: 8091},
        "2f5a3a818cfb86214ee29fce69589f50c117e0078b69ab7fcf0d39c056c97633",
    ),
    ("8b", 0.1): (
        [0] * 8 + [347, 649, 842, 951, 1012],
        {8: 277, 9: 288, 10: 181, 11: 93},
        {8: 2012, 9: 4182, 10: 6075, 11: 7701, 12: 9108},
        "76964a7e4ac2f535fb53f2a6535175546270a7ff17e27b39573671d0c8b0d085",
    ),
    ("8b", 0.05): (
        [0] * 7 + [448, 747, 893, 986, 1038, 1068],
        {7: 271, 8: 143, 9: 103, 10: 79, 11: 50},
        {7: 2063, 8: 3878, 9: 5461, 10: 6981, 11: 8354, 12: 9612},
        "cf2defe4b0846fde81f2d8b9027dffe23846cc0fa6598c3d5fdd3dd0261d8abf",
    ),
}

schedules = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=6).map(
    lambda sizes: Schedule(tuple(sorted(sizes, key=lambda size: size[0] * size[1])))
)


@lru_cache
def released_orders(model):
    return np.array(json.loads((RELEASED / f"{model}.json").read_text()))


def missing_atoms(until, steps):
    """Step, scale, layer, head of all that a step cannot read."""
    return [
        (step, scale, layer, head)
        for step in range(steps)
        for scale in range(step)
        for layer, head in np.argwhere(until[:, :, scale] <= step).tolist()
    ]


# -- the plan ----------------------------------------------------------------------------------------------------------


@needs_released
@pytest.mark.parametrize(("model", "fraction"), VECTORS)
def test_released_orders_give_the_released_schedules(model, fraction):
    counts, early, missing, digest = VECTORS[model, fraction]
    layers, heads = SHAPES[model]
    head_tokens = fraction * INFINITY_1M.cacheable * layers * heads
    forgotten = forgotten_counts(INFINITY_1M, layers * heads, 3, head_tokens)
    assert forgotten.tolist() == counts
    until = lifetimes(released_orders(model), INFINITY_1M, SHAPES[model], 3, head_tokens)
    atoms = missing_atoms(until, 13)
    by_step = {step: sum(atom[0] == step for atom in atoms) for step in range(13)}
    assert {step: count for step, count in by_step.items() if count} == missing
    regular = {step: max(0, step - 3) * int(forgotten[step]) for step in range(13)}
    assert {step: count - regular[step] for step, count in by_step.items() if count > regular[step]} == early
    text = "".join(f"{step} {scale} {layer} {head}\n" for step, scale, layer, head in sorted(atoms))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def simulate(orders, schedule, layers, heads, sinks, head_tokens):
    """
    Section 4.4 of the specification with sets of atoms and scales counted from 1: what each step cannot read, and what is
    held after each layer of each step.
    """
    scales, tokens = len(schedule), dict(enumerate(schedule.lengths, 1))
    prefix = {k: sum(tokens[s] for s in range(1, k)) for k in range(1, scales + 1)}
    sinks = min(sinks, scales - 1)
    kept = sum(tokens[s] for s in range(1, sinks + 1))
    lists = {s: [tuple(pair) for pair in orders[s - sinks - 1]] for s in range(sinks + 1, scales)}

    def forgotten(k):
        total, budget = layers * heads, Fraction(head_tokens)
        if total * prefix[k] <= budget:
            return 0
        count = Fraction(total * prefix[k] - budget, prefix[k] - kept)
        return min(total, -(-count.numerator // count.denominator))

    def gone_after(k):
        if k == scales:
            return gone_after(scales - 1)
        if k == 0:
            return set()
        return {
            (s, layer, head)
            for s in range(sinks + 1, min(k, scales - 1) + 1)
            for head, layer in lists[s][: forgotten(k + 1)]
        }

    cannot_read, held = {}, []
    for k in range(1, scales + 1):
        before, after = gone_after(k - 1), gone_after(k)
        assert before <= after
        active, early = set(before), set()
        for layer in range(layers):
            active |= {atom for atom in after if atom[1] <= layer}

            def total():
                sunk = layers * heads * sum(tokens[s] for s in range(1, min(sinks, k - 1) + 1))
                return sunk + sum(
                    tokens[s]
                    for s in range(sinks + 1, min(k, scales - 1) + 1)
                    for own in range(layers)
                    if s < k or own <= layer
                    for head in range(heads)
                    if (s, own, head) not in active
                )

            while k < scales and total() > head_tokens:
                spare = [atom for atom in after - active if atom[1] > layer and atom[0] < k]
                atom = min(spare, key=lambda a: (-a[1], -a[0], lists[a[0]].index((a[2], a[1]))))
                active.add(atom)
                early.add(atom)
            held.append(total())
        assert active == after
        cannot_read[k] = before | early
    return cannot_read, held


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_plan_equals_a_simulation_with_sets(data):
    schedule = data.draw(schedules)
    layers, heads, sinks = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    smallest = sink_tokens(schedule, sinks)
    budget = data.draw(st.integers(smallest, schedule.cacheable + 1))
    pairs = [[head, layer] for layer in range(layers) for head in range(heads)]
    count = max(0, len(schedule) - 1 - sinks)
    orders = np.array([data.draw(st.permutations(pairs)) for _ in range(count)]).reshape(count, -1 if count else 0, 2)
    head_tokens = budget * layers * heads
    cannot_read, held = simulate(orders, schedule, layers, heads, sinks, head_tokens)
    assert max(held) <= head_tokens
    plan = SegmentPlan.from_lifetimes(
        schedule, budget, lifetimes(orders, schedule, (layers, heads), sinks, head_tokens)
    )
    stored = [0] * layers
    for step in range(len(schedule)):
        for layer in range(layers):
            own = plan.layers[layer]
            for head in range(heads):
                wanted = [s for s in range(step) if (s + 1, layer, head) not in cannot_read[step + 1]]
                assert list(plan.read(layer, step, head)) == wanted
                history = sum(schedule.lengths[s] for s in wanted)
                assert own.attend[step][head] == history + schedule.lengths[step]
                later = [(step + 1, layer, head) not in cannot_read[k] for k in range(step + 2, len(schedule) + 1)]
                assert plan.stores(layer, step, head) == bool(later and later[0])
                assert later == sorted(later, reverse=True), "what is forgotten stays forgotten"
            stored[layer] = sum(own.store[step])
            next_reads = (own.attend[step + 1][head] - schedule.lengths[step + 1] for head in range(heads))
            assert stored[layer] == (sum(next_reads) if step < len(schedule) - 1 else 0)
            assert sum(stored) <= head_tokens
    assert plan.strict() is plan


def test_budgets_below_the_sinks_are_refused():
    orders = np.zeros((1, 12, 2), dtype=int)
    with pytest.raises(
        ValueError, match="first 3 scales, which no head loses, take 168 head-tokens but the budget is 167"
    ):
        lifetimes(orders, WIDE, (3, 4), 3, 167)
    assert HeatKV().min_budget(Geometry(WIDE, 3, 4, 8), None) == 14
    assert HeatKV(sinks=0).min_budget(Geometry(WIDE, 3, 4, 8), None) == 0
    assert HeatKV(sinks=9).min_budget(Geometry(WIDE, 3, 4, 8), None) == WIDE.cacheable


@pytest.mark.parametrize("sinks", [-1, 1.0, True])
def test_bad_sinks_are_refused(sinks):
    with pytest.raises(ValueError, match=f"`sinks` must be an int of at least 0 but is {sinks}"):
        HeatKV(sinks=sinks)


@pytest.mark.parametrize("sinks", [4, 9])
def test_a_schedule_of_sinks_keeps_everything(sinks):
    plan = plan_for(WIDE, WIDE.cacheable, sinks=sinks)
    assert all(layer.store[3] == (WIDE.cacheable,) * 4 for layer in plan.layers)
    one = Schedule(((2, 2),))
    assert plan_for(one, 0, sinks=sinks).layers[0].attend == ((4, 4, 4, 4),)


def test_scores_are_means_over_later_steps():
    mass = planted_profile(WIDE, 3, 4, 8, seed=5).mean["mass"].double().numpy()
    scores = cumulative_scores(mass, 2)
    assert scores.shape == (2, 3, 4)
    for layer in range(3):
        for head in range(4):
            for scale in (2, 3):
                later = [mass[layer, head, k, scale] for k in range(scale + 1, 5)]
                assert scores[scale - 2, layer, head] == pytest.approx(sum(later) / len(later), rel=1e-12)


def test_orders_are_by_score_then_head_then_layer():
    scores = np.array([[[0.3, 0.1, 0.1], [0.1, 0.2, 0.1]]])
    wanted = sorted(
        ((scores[0, layer, head], head, layer) for layer in range(2) for head in range(3)),
    )
    assert pruning_orders(scores).tolist() == [[[head, layer] for _, head, layer in wanted]]
    assert pruning_orders(scores)[0, :3].tolist() == [[0, 1], [1, 0], [2, 0]]


def test_heads_that_look_back_keep_what_they_look_at():
    profile = planted_profile(WIDE, 3, 4, 8, seed=0)
    profile.mean["mass"][:, :, 3:, 2] = 0.1
    profile.mean["mass"][1, 2, 3:, 2] = 0.9
    plan = HeatKV(sinks=2).plan(Geometry(WIDE, 3, 4, 8), 10, profile)
    assert 2 in plan.read(1, 4, 2)
    assert sum(2 in plan.read(layer, 4, head) for layer in range(3) for head in range(4)) < 12


def test_plans_need_a_profile_that_says_enough():
    geometry = Geometry(WIDE, 3, 4, 8)
    with pytest.raises(ValueError, match="needs a head profile"):
        HeatKV().plan(geometry, 20, None)
    profile = planted_profile(WIDE, 3, 4, 8, seed=0)
    del profile.mean["mass"]
    with pytest.raises(ValueError, match="has no `mass`"):
        HeatKV().plan(geometry, 20, profile)
    with pytest.raises(ValueError, match="nothing to rank"):
        HeatKV().rank(None)


def plan_for(schedule, budget, layers=3, heads=4, sinks=2, seed=0):
    profile = planted_profile(schedule, layers, heads, 8, seed)
    return HeatKV(sinks=sinks).plan(Geometry(schedule, layers, heads, 8), budget, profile)


# -- the arena ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_two_live_segments_share_a_slot_and_no_slot_is_too_many(data):
    schedule = data.draw(schedules)
    layers, heads, sinks = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    budget = data.draw(st.integers(sink_tokens(schedule, sinks), schedule.cacheable + 1))
    plan = plan_for(schedule, budget, layers, heads, sinks, data.draw(st.integers(0, 3)))
    slot_map, segments = SlotMap(plan), segments_of(plan)
    worst = 0
    for step in range(len(schedule)):
        for layer in range(layers):
            checkpoint = step * layers + layer
            alive = [segment for segment in segments if segment.start <= checkpoint < segment.end]
            slots = [slot_map.slots(s.layer, [(s.head, [s.scale])]).tolist() for s in alive]
            assert [len(own) for own in slots] == [schedule.lengths[s.scale] for s in alive]
            taken = [slot for own in slots for slot in own]
            assert len(set(taken)) == len(taken) and set(taken) <= set(range(slot_map.capacity))
            done = [plan.layers[own].store[step if own <= layer else step - 1] for own in range(layers)]
            assert len(taken) == sum(map(sum, done if step else done[: layer + 1]))
            worst = max(worst, len(taken))
    assert slot_map.capacity == worst == most_alive(segments) == plan.checkpoint_peak <= budget * layers * heads


def test_free_slots_are_found_by_best_fit_and_joined_again():
    free = FreeList(20)
    first, second, third = free.take(5), free.take(3), free.take(4)
    assert (first, second, third) == (((0, 5),), ((5, 8),), ((8, 12),))
    free.give(*first[0])
    assert free.take(4) == ((0, 4),), "the smallest interval that is large enough"
    free.give(*second[0])
    assert free.take(10) == ((12, 20), (4, 6)), "split where none is"
    free.give(12, 20)
    free.give(8, 12)
    assert free.take(14) == ((6, 20),), "neighbours become one"
    with pytest.raises(ValueError, match="1 slots of the arena are missing"):
        free.take(1)


@needs_released
@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_allocated_is_accounted_at_the_published_settings(fraction):
    """Slabs for each layer's own worst step would take 28 and 54 % more than the budget here (2B)."""
    budget = int(fraction * INFINITY_1M.cacheable)
    until = lifetimes(released_orders("2b"), INFINITY_1M, SHAPES["2b"], 3, budget * 512)
    slot_map = SlotMap(SegmentPlan.from_lifetimes(INFINITY_1M, budget, until))
    assert 0.98 * budget * 512 <= slot_map.capacity <= budget * 512


# -- the cache ---------------------------------------------------------------------------------------------------------


def step_parts(schedule, step, layer=0, rows=2, heads=4, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * step + layer)
    parts = (torch.randn(rows, heads, schedule.lengths[step], dim, generator=generator) for _ in range(3))
    return [part.to(dtype) for part in parts]


def steps_of(cache, dtype=torch.float32):
    """Step, layer, its parts and what the cache made of them."""
    for step in range(len(cache.schedule)):
        for layer in range(cache.num_layers):
            parts = step_parts(cache.schedule, step, layer, dtype=dtype)
            yield step, layer, parts, cache.attend(layer, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("budget", "sinks"), [(0, 0), (6, 0), (9, 2), (20, 2), (25, 1), (38, 2)])
def test_equals_dense_attention_with_a_mask(budget, sinks, dtype):
    plan = plan_for(WIDE, budget, sinks=sinks)
    seen = {layer: ([], []) for layer in range(3)}
    without_history = 0
    for step, layer, (query, key, value), output in steps_of(SegmentCache(plan), dtype):
        for history, part in zip(seen[layer], (key, value)):
            history.append(part.float())
        mask = torch.zeros(4, sum(WIDE.lengths[: step + 1]), dtype=torch.bool)
        mask[:, WIDE.prefixes[step] :] = True
        for head in range(4):
            scales = plan.read(layer, step, head)
            without_history += bool(step and not scales)
            for scale in scales:
                mask[head, WIDE.prefixes[scale] : WIDE.prefixes[scale] + WIDE.lengths[scale]] = True
        bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, :, None]
        keys, values = (torch.cat(history, dim=2) for history in seen[layer])
        dense = F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=bias, scale=1.0)
        assert output.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(output.float(), dense, atol=tolerance, rtol=tolerance)
    assert (without_history > 0) == (sinks == 0)


def test_layers_are_exact_until_they_lose_their_first_atom():
    plan = plan_for(WIDE, 20)
    exact = differing = 0
    full = FullCache(WIDE, 3)
    for step, layer, parts, output in steps_of(SegmentCache(plan)):
        wanted = full.attend(layer, *parts)
        if all(len(plan.read(layer, step, head)) == step for head in range(4)):
            assert torch.equal(output, wanted)
            exact += step > 0
        else:
            differing += not torch.equal(output, wanted)
    assert exact and differing


@pytest.mark.parametrize("budget", [14, 20, 38])
def test_the_arena_is_all_that_is_allocated_and_dies_at_the_end(budget):
    plan = plan_for(WIDE, budget, sinks=3)
    cache = SegmentCache(plan)
    bytes_of_slot, capacity = 2 * 8 * 4, plan.checkpoint_peak
    assert capacity <= budget * 12
    watched, stored = [], [0] * 3
    for step, layer, parts, _ in steps_of(cache):
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for own in range(3)
            for tensor in (*cache._tensors(own), *cache._metadata(own))
        }
        stored[layer] = sum(plan.layers[layer].store[step])
        if (step, layer) == (1, 0):
            watched = [weakref.ref(storage) for storage in storages.values()]
        if (step, layer) == (len(WIDE) - 1, 2):
            assert not storages
        else:
            # Of the first scale only what is stored: where the other layers are is not known yet.
            slots = capacity if step else sum(stored)
            assert sum(storage.nbytes() for storage in storages.values()) == slots * 2 * bytes_of_slot
        tensors = [next(iter(cache._tensors(own)), torch.empty(2, 1, 0, 8)) for own in range(3)]
        assert [tensor.shape[2] for tensor in tensors] == stored
        del storages, tensors, parts
    assert len(watched) == 2 and all(reference() is None for reference in watched)
    report = cache.report()
    held = [sum(sum(layer.store[step]) for layer in plan.layers) for step in range(len(WIDE) - 1)]
    assert report.tokens_by_step == [count / 12 for count in held]
    assert report.bytes_allocated_peak == capacity * 2 * 8 * 4
    assert report.bytes_logical_peak == max(held) * 2 * 8 * 4
    assert report.checkpoint_peak_tokens == capacity / 12 <= budget
    assert report.metadata_bytes == 0


def test_tokens_written_over_do_not_keep_the_step_alive():
    cache = SegmentCache(plan_for(WIDE, 20))
    for step in range(len(WIDE)):
        for layer in range(3):
            parts = step_parts(WIDE, step, layer)
            watched = [weakref.ref(part.untyped_storage()) for part in parts]
            cache.attend(layer, *parts)
            del parts
            assert all(reference() is None for reference in watched)


class MostAlive(TorchDispatchMode):
    """Notes the most tokens that are alive in tensors `[rows, heads, tokens, head_dim]` that a layer makes."""

    def __init__(self):
        super().__init__()
        self.made: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.cat.default,
            torch.ops.aten.index_select.default,
            torch.ops.aten.empty_like.default,
        ):
            self.made.append(weakref.ref(result.untyped_storage()))
            alive = [storage for reference in self.made if (storage := reference()) is not None]
            self.most = max(self.most, sum(storage.nbytes() for storage in alive) // (2 * 8 * 4))
        return result


@pytest.mark.parametrize("budget", [20, 38])
def test_memory_of_attention_is_what_is_estimated(budget):
    """By layers whose steps are larger than what they store of them; outputs are counted apart."""
    plan = plan_for(WIDE, budget)
    cache = SegmentCache(plan)
    for step in range(len(WIDE)):
        measured = []
        for layer in range(3):
            with MostAlive() as watch:
                cache.attend(layer, *step_parts(WIDE, step, layer))
            output = 4 * WIDE.lengths[step] if len(set(plan.layers[layer].attend[step])) > 1 else 0
            measured.append(watch.most - output)
        if step:
            assert max(measured) == segment_tokens(plan, step)


def test_a_cache_can_be_used_again_after_reset():
    cache = SegmentCache(plan_for(WIDE, 20))
    first = [output for *_, output in steps_of(cache)]
    cache.reset()
    assert all(torch.equal(ours, theirs) for ours, (*_, theirs) in zip(first, steps_of(cache), strict=True))


@pytest.mark.parametrize("budget", [20, 38])
def test_int8_attends_to_exact_current_and_decoded_stored_tokens(budget):
    plan, storage = plan_for(WIDE, budget), get_storage("int8")
    cache = make_cache(plan, HeatKV(sinks=2), storage=storage)
    seen = {layer: [] for layer in range(3)}
    for step, layer, (query, key, value), output in steps_of(cache):
        for head in range(4):
            own = [[part[:, head] for part in seen[layer][scale]] for scale in plan.read(layer, step, head)]
            own.append([key[:, head], value[:, head]])
            keys, values = (torch.cat(parts, dim=1) for parts in zip(*own))
            wanted = F.scaled_dot_product_attention(query[:, head], keys, values, scale=1.0)
            assert torch.allclose(output[:, head], wanted, atol=1e-5)
        seen[layer].append([storage.decode(storage.encode(part), torch.float32) for part in (key, value)])
        if step == 3 and layer == 2:
            assert {tensor.dtype for tensor in cache._tensors(0)} == {torch.int8}
            assert {tensor.dtype for tensor in cache._metadata(0)} == {torch.float16}
    report = cache.report()
    assert report.bytes_allocated_peak == cache.plan.checkpoint_peak * 2 * (8 + 2)
    assert report.metadata_bytes == max(sum(sum(own.store[k]) for own in plan.layers) for k in range(4)) * 2 * 2


# -- through the pipeline ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, seed=1)
    return pipe


def draw(pipe, labels=(1, 2), generator_seeds=(0, 1), sinks=1, **arguments):
    return pipe(
        class_labels=list(labels),
        generator=seeds(*generator_seeds),
        output_type="latent",
        method=HeatKV(sinks=sinks),
        **arguments,
    )


@pytest.mark.parametrize("budget", [14, 15, 1.0])
def test_lossless_budgets_are_exact(pipe, budget):
    full, ours = draw(pipe), draw(pipe, kv_budget=budget)
    assert all(torch.equal(first, second) for first, second in zip(ours.tokens, full.tokens, strict=True))
    assert torch.equal(ours.images, full.images)
    assert ours.cache_report.peak_tokens == pipe.schedule.cacheable
    assert ours.cache_report.bytes_allocated_peak == full.cache_report.bytes_allocated_peak


def test_a_smaller_budget_is_kept_and_changes_the_tokens(pipe):
    many = tuple(range(8))
    ours, full = draw(pipe, many, many, kv_budget=5), draw(pipe, many, many)
    assert any(not torch.equal(first, second) for first, second in zip(ours.tokens, full.tokens))
    report = ours.cache_report
    assert report.peak_tokens <= report.checkpoint_peak_tokens <= 5
    assert report.bytes_allocated_peak <= 5 * 2 * 3 * 4 * 16 * 2 * 4


def test_budgets_below_the_sinks_are_refused_by_the_pipeline(pipe):
    with pytest.raises(ValueError, match="method 'heatkv' needs at least 14: set `kv_budget` to 14"):
        draw(pipe, kv_budget=4, sinks=3)


def test_an_image_does_not_depend_on_its_batch(pipe):
    both, swapped = draw(pipe, kv_budget=8), draw(pipe, (2, 1), (1, 0), kv_budget=8)
    for index, (label, seed) in enumerate(((1, 0), (2, 1))):
        alone = draw(pipe, (label,), (seed,), kv_budget=8)
        for ours, theirs, other in zip(both.tokens, alone.tokens, swapped.tokens, strict=True):
            assert torch.equal(ours[index], theirs[0]) and torch.equal(other[1 - index], theirs[0])
        assert alone.cache_report.bytes_allocated_peak == both.cache_report.bytes_allocated_peak


def test_sets_do_not_depend_on_what_is_drawn(pipe):
    caches = [pipe.prepare_cache(8, method=HeatKV(sinks=1)) for _ in range(2)]
    assert all(isinstance(cache, SegmentCache) for cache in caches)
    for label, cache in enumerate(caches):
        condition = pipe.encode_inputs([label], True)
        with torch.no_grad():
            pipe.draw_scales(condition, cache, pipe.prepare_settings(), seeds(label))
    assert caches[0].plan == caches[1].plan
    first, second = (cache.report() for cache in caches)
    assert first.tokens_by_step == second.tokens_by_step and first.attended_by_step == second.attended_by_step


@pytest.mark.parametrize("budget", [8, None])
def test_int8_composes(pipe, budget):
    report = draw(pipe, kv_budget=budget, kv_dtype="int8").cache_report
    assert 0 < report.metadata_bytes < report.bytes_logical_peak <= report.bytes_allocated_peak
    assert report.bytes_allocated_peak <= (budget or 14) * 2 * 3 * 4 * 2 * (16 + 2)


# -- order files -------------------------------------------------------------------------------------------------------


def order_lists(layers=3, heads=4, count=2, seed=0):
    generator = np.random.default_rng(seed)
    pairs = [[head, layer] for layer in range(layers) for head in range(heads)]
    return [[pairs[place] for place in generator.permutation(len(pairs))] for _ in range(count)]


def profile_from(folder, lists, **overrides):
    path = folder / "orders.json"
    path.write_text(lists if isinstance(lists, str) else json.dumps(lists))
    arguments = {"schedule": WIDE, "head_dim": 8, "num_layers": 3, "num_heads": 4, "sinks": 2, "family": "var"}
    return HeadProfile.from_heatkv_orders(path, **(arguments | overrides))


@pytest.mark.parametrize("given_shape", [{}, {"num_layers": None, "num_heads": None}])
def test_orders_survive_profile_and_folder(tmp_path, given_shape):
    lists = order_lists()
    profile = profile_from(tmp_path, lists, base_model="someone/tiny", **given_shape)
    assert (profile.num_layers, profile.num_heads) == (3, 4) and sorted(profile.mean) == ["mass"]
    mass = profile.mean["mass"]
    assert torch.allclose(mass.sum(-1), torch.ones(3, 4, 5)) and bool((mass >= 0).all())
    assert torch.equal(mass, mass.tril())
    profile.save_pretrained(tmp_path / "profile")
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "README.md",
        "config.json",
        "profile.safetensors",
    ]
    loaded = HeadProfile.from_pretrained(tmp_path / "profile")
    assert loaded == profile
    assert loaded != profile_from(tmp_path, order_lists(seed=1), base_model="someone/tiny", **given_shape)
    loaded.save_heatkv_orders(tmp_path / "again.json", sinks=2)
    assert json.loads((tmp_path / "again.json").read_text()) == lists
    by_hand = lifetimes(np.array(lists), WIDE, (3, 4), 2, 10 * 12)
    plan = HeatKV(sinks=2).plan(Geometry(WIDE, 3, 4, 8), 10, loaded)
    assert np.array_equal(np.array(plan.until), by_hand)


def test_what_the_orders_do_not_say_is_refused(tmp_path):
    profile = profile_from(tmp_path, order_lists())
    for needs_types in (lambda: profile.scores, lambda: profile.contextual_heads(0.5), profile.head_map):
        with pytest.raises(ValueError, match="has no `colvar`.*HeatKV orders.*hack-pipelines calibrate"):
            needs_types()
    with pytest.raises(ValueError, match="begin after 2 sinks.*set `sinks` to 2 or more instead of 1"):
        HeatKV(sinks=1).plan(Geometry(WIDE, 3, 4, 8), 20, profile)
    HeatKV(sinks=3).plan(Geometry(WIDE, 3, 4, 8), 20, profile)


def test_card_and_command_line_say_where_orders_come_from(tmp_path, capsys):
    profile_from(tmp_path, order_lists()).save_pretrained(tmp_path / "profile")
    text = ModelCard.load(tmp_path / "profile" / "README.md").text
    assert "HeatKV order file orders.json" in text and 'method="heatkv"' in text
    assert "head_map.png" not in text and "contextual" not in text
    assert main(["profile", "show", str(tmp_path / "profile")]) == 0
    shown = capsys.readouterr().out
    assert "no head types: it holds mass only" in shown and "samples: none, read from HeatKV order file" in shown


def edited(edit):
    lists = order_lists()
    edit(lists)
    return lists


def swap(lists, which=slice(None)):
    lists[1][which] = [pair[::-1] for pair in lists[1][which]]


def repeat(lists):
    lists[0][3] = lists[0][4]


def swap_one(lists):
    place = lists[1].index([0, 2])
    swap(lists, slice(place, place + 1))


@pytest.mark.parametrize(
    ("lists", "overrides", "message"),
    [
        ("[[", {}, "is no JSON"),
        ("{}", {}, "has no lists, but 5 scales, of which the first 2 are sinks.*need 2"),
        (order_lists(count=3), {}, "has 3 lists.*need 2"),
        (order_lists(), {"sinks": 3}, "has 2 lists.*first 3 are sinks.*need 1"),
        (order_lists(), {"sinks": 4}, "`sinks` must be at least 0 and leave a scale to order, at most 3 .* is 4"),
        ([1, 2], {}, "List 0 of .* is no list but 1"),
        (edited(lambda lists: lists[1].append([1])), {}, r"List 1 .* must hold pairs \[head, layer\] but holds \[1\]"),
        (edited(lambda lists: lists[1].append([1, 1.0])), {}, r"List 1 .* but holds \[1, 1.0\]"),
        (edited(swap), {}, r"List 1 .* outside a model with 3 layers of 4 heads.*\[layer, head\]: swap them"),
        (
            edited(swap_one),
            {},
            r"List 1 .* lacks \[0, 2\], head 0 of layer 2.*\[2, 0\] more than once, which looks.*swap",
        ),
        (edited(repeat), {}, "List 0 .* lacks .* more than once.*12 pairs and must hold each of the 12"),
        (edited(lambda lists: lists[0].pop()), {}, "List 0 .* lacks .* 11 pairs and must hold each of the 12"),
        (edited(lambda lists: lists[1].append([2, 2])), {}, r"List 1 .* 13 pairs, but .* 12 heads: \[2, 2\]"),
        (edited(lambda lists: lists[1].append([-1, 2])), {}, r"List 1 .* holds \[-1, 2\], which is outside"),
        (order_lists(), {"num_layers": 2}, "which is outside a model with 2 layers of 4 heads"),
        (order_lists(), {"num_layers": None, "num_heads": 5}, r"lacks \[4, 0\], head 4 of layer 0"),
    ],
)
def test_bad_order_files_are_refused(tmp_path, lists, overrides, message):
    with pytest.raises(ValueError, match=message):
        profile_from(tmp_path, lists, **overrides)


def test_scores_are_written_beside_the_orders(tmp_path):
    profile = planted_profile(WIDE, 3, 4, 8, seed=2)
    profile.save_heatkv_orders(tmp_path / "orders.json", sinks=2)
    orders = json.loads((tmp_path / "orders.json").read_text())
    stored = json.loads((tmp_path / "orders.scores.json").read_text())
    assert stored["sinks"] == 2 and stored["num_heads"] == 4 and stored["seeds"] == [0]
    scores = cumulative_scores(profile.mean["mass"].double().numpy(), 2)
    for source, order, written in zip(scores, orders, stored["scores"], strict=True):
        assert written == [source[layer, head] for head, layer in order] == sorted(written)
    again = profile_from(tmp_path, (tmp_path / "orders.json").read_text())
    geometry = Geometry(WIDE, 3, 4, 8)
    assert HeatKV(sinks=2).plan(geometry, 12, again) == HeatKV(sinks=2).plan(geometry, 12, profile)


@needs_released
@pytest.mark.parametrize("model", SHAPES)
def test_released_files_come_back_byte_for_byte(tmp_path, model):
    layers, heads = SHAPES[model]
    path = RELEASED / f"{model}.json"
    profile = HeadProfile.from_heatkv_orders(
        path, schedule=INFINITY_1M, head_dim=128, num_layers=layers, num_heads=heads
    )
    profile.save_heatkv_orders(tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    profile.check_fits(Geometry(INFINITY_1M, layers, heads, 128))
    with pytest.raises(ValueError, match="swap them"):
        HeadProfile.from_heatkv_orders(path, schedule=INFINITY_1M, head_dim=128, num_layers=heads, num_heads=layers)
