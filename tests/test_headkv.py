"""HeadKV on scales: how local a head is, budgets by head, what every scale keeps, and types found online."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines.cache import FullCache, HeadGroupCache, RowwiseCache, make_cache
from hack_pipelines.methods import Geometry, HeadKV
from hack_pipelines.methods.headkv import locality_of
from hack_pipelines.methods.selection import top
from hack_pipelines.schedule import Schedule

from .components import planted_profile, seeds, tiny_pipeline
from .test_cache import step_parts
from .test_methods import INFINITY_1M, VAR_256, schedules, view_of


SMALL = Schedule.from_sides((1, 2, 3, 5, 6, 8, 9))


def make_plan(method, schedule, budget, layers=2, heads=4, seed=0):
    geometry = Geometry(schedule, layers, heads, 8)
    return method.plan(geometry, budget, planted_profile(schedule, layers, heads, 8, seed))


def scale_of(schedule):
    return [scale for scale, length in enumerate(schedule.lengths) for _ in range(length)]


# -- locality ----------------------------------------------------------------------------------------------------------


def locality_oracle(view, ids, row, head, radius):
    """Attention on near tokens over attention on all, on large scales, query by query with fractions of the picture."""
    keys = torch.cat((view.stored_key, view.key), dim=2)[row, head].double()
    scales = scale_of(view.schedule)
    height, width = view.schedule.sizes[view.step]
    near = total = 0.0
    for query in range(view.query.shape[2]):
        weights = (view.query[row, head, query].double() @ keys.T).softmax(-1).tolist()
        y, x = query // width, query % width
        for token, weight in zip(ids, weights):
            scale = scales[token]
            high, wide = view.schedule.sizes[scale]
            if high * wide < 25:
                continue
            total += weight
            place = token - view.schedule.prefixes[scale]
            down = abs((y + 0.5) / height - (place // wide + 0.5) / high) * high
            across = abs((x + 0.5) / width - (place % wide + 0.5) / wide) * wide
            near += weight * (down <= radius + 0.5 + 1e-9 and across <= radius + 0.5 + 1e-9)
    return near / total


@pytest.mark.parametrize("radius", [1, 2])
def test_locality_equals_the_oracle(radius):
    ids = sorted(set(range(0, SMALL.prefixes[5], 2)) | {1, 3})
    stored_ids = torch.tensor(ids).expand(2, 2, -1)
    view = view_of(SMALL, 5, len(ids), stored_ids=stored_ids, rows=2)
    present = [*ids, *range(SMALL.prefixes[5], SMALL.prefixes[5] + SMALL.lengths[5])]
    found = locality_of(view, radius)
    for row in range(2):
        for head in range(2):
            assert found[row, head].item() == pytest.approx(
                locality_oracle(view, present, row, head, radius), rel=1e-4
            )


def planted_view(step, sharpness):
    """One head that looks at its own place, one at its place and around, one everywhere."""
    side, channels = SMALL.sizes[step][0], 16
    angles = torch.arange(side).float() * torch.pi / side / 2
    rows, columns = torch.meshgrid(angles, angles, indexing="ij")
    places = torch.stack((rows.cos(), rows.sin(), columns.cos(), columns.sin()), -1).flatten(0, 1)
    places = F.pad(places, (0, channels - 4)).expand(1, 3, -1, -1)
    strength = torch.tensor([sharpness, sharpness / 8, 0.0]).view(1, 3, 1, 1)
    stored = torch.zeros(1, 3, SMALL.prefixes[step], channels)
    return view_of(
        SMALL, step, SMALL.prefixes[step], rows=1, heads=3, dim=channels, query=places * strength, key=places,
        stored_key=stored, stored_value=stored, value=places,
    )  # fmt: skip


@pytest.mark.parametrize("radius", [1, 2])
def test_planted_heads_are_ordered(radius):
    local, around, broad = locality_of(planted_view(5, 800.0), radius)[0].tolist()
    assert local > around > broad
    assert local > 0.9 and broad < 0.6


def test_small_scales_do_not_count():
    tiny = Schedule.from_sides((1, 2, 3, 4))
    assert (locality_of(view_of(tiny, 3, 14), 1) == 0).all()


@pytest.mark.parametrize(
    ("schedule", "step"),
    [
        (VAR_256, 6),
        (INFINITY_1M, 4),
        (SMALL, 5),
        (Schedule.from_sides((1, 2, 3, 4, 8)), 3),
        (Schedule.from_sides((8,)), 0),
    ],
)
def test_heads_are_told_apart_at_the_first_large_scale(schedule, step):
    assert HeadKV().identify_step(schedule) == step


# -- budgets -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(schedules, st.floats(0.02, 1.0), st.integers(1, 3), st.integers(1, 6), st.sampled_from(["post", "pre"]))
def test_budgets_average_to_the_budget(schedule, fraction, layers, heads, protocol):
    method = HeadKV(protocol=protocol)
    smallest = method.min_budget(Geometry(schedule, layers, heads, 8), None)
    budget = max(int(fraction * schedule.total), smallest)
    plan = make_plan(method, schedule, budget, layers, heads)
    for layer in plan.layers:
        for store in layer.store:
            held = sum(len(group) * count for group, count in zip(layer.groups, store))
            assert held <= budget * heads


def test_broad_heads_get_more():
    profile = planted_profile(VAR_256, 1, 4, 8, 0)
    step = HeadKV().identify_step(VAR_256)
    counted = profile.mean["mass"][0, :, step, 4:7].sum(-1)
    profile.mean["local"][0, :, step, 0] = counted * torch.tensor([0.9, 0.1, 0.5, 0.5])
    plan = HeadKV().plan(Geometry(VAR_256, 1, 4, 8), 100, profile)
    (layer,) = plan.layers
    limits = {head: count for group, count in zip(layer.groups, layer.store[-2]) for head in group}
    weights = [1.05 - locality for locality in (0.9, 0.1, 0.5, 0.5)]
    for head, weight in enumerate(weights):
        assert limits[head] == pytest.approx(400 * weight / sum(weights), abs=1)
    assert sum(limits.values()) == 400
    equal = HeadKV(exponent=0.0).plan(Geometry(VAR_256, 1, 4, 8), 100, profile)
    assert equal.layers[0].store[-2] == (100,)


# -- eviction ----------------------------------------------------------------------------------------------------------


def eviction_oracle(scores, ids, schedule, count, guarantee):
    """What stays, by explicit sets: the first scales, each scale's share, and the best of the rest."""
    scales = scale_of(schedule)
    order = lambda pool: sorted(pool, key=lambda place: (-scores[place], place))  # noqa: E731
    kept = {place for place, token in enumerate(ids) if scales[token] < 2}
    room = count - len(kept)
    members: dict[int, list[int]] = {}
    for place, token in enumerate(ids):
        if scales[token] >= 2:
            members.setdefault(scales[token], []).append(place)
    share = int(guarantee * room / len(members)) if members else 0
    for places in members.values():
        kept.update(order(places)[:share])
    rest = [place for place in range(len(ids)) if place not in kept]
    return sorted(kept | set(order(rest)[: count - len(kept)]))


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 5), st.integers(0, 200), st.floats(0, 1), st.integers(6, 60), st.booleans())
def test_eviction_equals_the_oracle(step, seed, guarantee, count, ties):
    generator = torch.Generator().manual_seed(seed)
    older = torch.randperm(SMALL.prefixes[step] - 5, generator=generator)[: SMALL.prefixes[step] // 2]
    ids = sorted([*range(5), *(older + 5).tolist()])
    tokens = {"query": torch.zeros(1, 1, SMALL.lengths[step], 8)} if ties else {}
    view = view_of(
        SMALL, step, len(ids), rows=1, heads=1, seed=seed, stored_ids=torch.tensor([[ids]]), store=count, **tokens
    )
    if count >= view.num_present:
        return
    ranking = HeadKV(guarantee=guarantee).rank(view)
    present = view.ids[0, 0].tolist()
    wanted = eviction_oracle(ranking.scores[0, 0].tolist(), present, SMALL, count, guarantee)
    assert top(ranking.scores, count, ranking.tiers)[0, 0].tolist() == wanted


def test_no_scale_vanishes():
    method = HeadKV()
    plan = make_plan(method, VAR_256, 60)
    cache = make_cache(plan, method)
    scales = torch.tensor(scale_of(VAR_256))
    for step in range(len(VAR_256) - 1):
        for layer in range(2):
            cache.attend(layer, *step_parts(VAR_256, step))
        for layer in range(2):
            for group in cache.groups[layer]:
                if not group.held.ids:
                    continue
                room = group.held.key[0].shape[2] - 5
                if room >= 2 * (step - 1):
                    for ids in group.held.ids[0].squeeze(-1).flatten(0, 1):
                        assert set(scales[ids.long()].tolist()) == set(range(step + 1))


# -- online ------------------------------------------------------------------------------------------------------------


def online_cache(budget, rows=2, **options):
    method = HeadKV(types="online", **options)
    plan = make_plan(method, SMALL, budget)
    return make_cache(plan, method), method


def test_online_types_give_every_row_its_own_lengths():
    cache, method = online_cache(60)
    assert isinstance(cache, RowwiseCache)
    outputs = {}
    for step in range(len(SMALL)):
        parts = step_parts(SMALL, step)
        # The first row looks everywhere, the second at single tokens.
        query = parts[0] * torch.tensor([0.01, 6.0]).view(2, 1, 1, 1)
        outputs[step] = [cache.attend(layer, query, *parts[1:]) for layer in range(2)]
        if step == method.identify_step(SMALL):
            plans = [row.layer_plans[0] for row in cache.rows]
            assert plans[0].store[step] != plans[1].store[step]
    assert cache.report().peak_tokens <= 60
    for row in range(2):
        alone = make_cache(make_plan(method, SMALL, 60), method)
        for step in range(len(SMALL)):
            parts = [part[row : row + 1] for part in step_parts(SMALL, step)]
            parts[0] = parts[0] * (0.01 if row == 0 else 6.0)
            for layer in range(2):
                assert torch.equal(alone.attend(layer, *parts), outputs[step][layer][row : row + 1])


def test_online_budgets_hold_for_every_row_and_head_average():
    cache, method = online_cache(50)
    for step in range(len(SMALL) - 1):
        for layer in range(2):
            cache.attend(layer, *step_parts(SMALL, step))
        for row in cache.rows:
            for layer in range(2):
                held = sum(len(group.heads) * group.held.key[0].shape[2] for group in row.groups[layer])
                assert held <= 50 * 4


def test_online_is_exact_with_room_for_everything():
    cache, _ = online_cache(SMALL.cacheable)
    assert isinstance(cache, HeadGroupCache)
    full = FullCache(SMALL, 2)
    for step in range(len(SMALL)):
        for layer in range(2):
            assert torch.equal(
                cache.attend(layer, *step_parts(SMALL, step)), full.attend(layer, *step_parts(SMALL, step))
            )


@pytest.mark.parametrize("types", ["profile", "online"])
def test_images_do_not_depend_on_their_batch(types):
    pipe = tiny_pipeline(patch_nums=(1, 2, 3, 5, 6))
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    options = {"kv_budget": 25, "method": HeadKV(types=types), "output_type": "latent"}
    both = pipe([1, 2], generator=seeds(0, 1), **options)
    for index, (label, seed) in enumerate(((1, 0), (2, 1))):
        alone = pipe([label], generator=seeds(seed), **options)
        assert all(torch.equal(ours[index], theirs[0]) for ours, theirs in zip(both.tokens, alone.tokens))


def test_only_types_from_a_profile_need_one():
    assert HeadKV().needs_profile and not HeadKV(types="online").needs_profile
    with pytest.raises(ValueError, match="types='online'"):
        HeadKV().plan(Geometry(SMALL, 2, 4, 8), 60, None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"types": "offline"}, "types"),
        ({"radius": 3}, "radius"),
        ({"exponent": -1}, "exponent"),
        ({"weight_floor": 0}, "weight_floor"),
        ({"guarantee": 2}, "guarantee"),
        ({"identify_tokens": 0}, "identify_tokens"),
        ({"protocol": "static"}, "protocol"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        HeadKV(**options)
