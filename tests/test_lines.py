"""Methods for models that draw token by token: what they keep, against plain loops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines.cache.raster import RasterCache
from hack_pipelines.methods import RASTER_METHODS, Geometry, HeadKVAR, LineAR, get_method
from hack_pipelines.methods.headkv_ar import shared_quotas
from hack_pipelines.methods.lines import LineView, even_columns
from hack_pipelines.methods.selection import top
from hack_pipelines.schedule import Schedule


ROWS, HEADS, SHARING, CHANNELS, CONDITION = 2, 3, 2, 4, 3


def random_view(width, step, kept_lines, columns, store, seed, padded=False, carried=True) -> LineView:
    """The end of a line in a cache that holds random tokens of the lines before the last `kept_lines`, and these whole."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    whole = range(max(0, step - kept_lines) * width, step * width)
    older = max(0, step - kept_lines) * width
    count = older // 2
    ids = torch.stack(
        [
            torch.stack(
                [
                    torch.cat(
                        [torch.randperm(older, generator=generator)[:count].sort().values, torch.tensor(whole).long()]
                    )
                    for _ in range(HEADS)
                ]
            )
            for _ in range(ROWS)
        ]
    )
    stored = ids.shape[-1]
    mask = None
    if padded:
        mask = torch.ones(ROWS, 1, CONDITION + stored + width, dtype=torch.bool)
        mask[1, :, :2] = False
    return LineView(
        schedule=Schedule.from_lines(step + 3, width),
        step=step,
        layer=0,
        heads=tuple(range(HEADS)),
        label="",
        budget=store,
        query=2 * draw(ROWS, HEADS, len(columns), SHARING, CHANNELS),
        key=draw(ROWS, HEADS, width, CHANNELS),
        value=draw(ROWS, HEADS, width, CHANNELS),
        stored_key=draw(ROWS, HEADS, stored, CHANNELS),
        stored_value=draw(ROWS, HEADS, stored, CHANNELS),
        attend=stored + width,
        store=store,
        scale=0.5,
        guided=False,
        stored_ids=ids.to(torch.int16),
        stored_carried=torch.rand(ROWS, HEADS, stored, generator=generator) if carried else None,
        columns=torch.tensor(columns),
        condition_key=draw(ROWS, HEADS, CONDITION, CHANNELS),
        mask=mask,
    )


def plain_attention(view: LineView) -> list:
    """Mean over observed queries and sharing heads, `[row][head][present]`, by plain loops in float64."""
    result = []
    for row in range(ROWS):
        result.append([])
        for head in range(HEADS):
            keys = torch.cat([view.condition_key, view.stored_key, view.key], dim=2)[row, head].double()
            line_start = len(keys) - view.width
            total = [0.0] * (len(keys) - CONDITION)
            for place, column in enumerate(view.columns.tolist()):
                for query in view.query[row, head, place].double():
                    logits = keys @ query * view.scale
                    allowed = [
                        (view.mask is None or bool(view.mask[row, 0, j])) and j - line_start <= column
                        for j in range(len(keys))
                    ]
                    weights = [float(logit.exp()) if ok else 0.0 for logit, ok in zip(logits, allowed)]
                    for j in range(CONDITION, len(keys)):
                        total[j - CONDITION] += weights[j] / sum(weights) / SHARING / len(view.columns)
            result[-1].append(total)
    return result


def plain_strata(ids, scores, step, width, store, strata, anchors) -> set[int]:
    """Ids that HeadKV's rule keeps of one head."""
    recent = max(1, min(2, (store - anchors * width) // (2 * width)))
    age = {i: -1 if i // width < anchors else step - i // width - recent for i in ids}
    kept = {i for i in ids if age[i] < 0}
    room = store - (anchors + recent) * width
    ends = [2 * (2**index - 1) for index in range(1, strata)] + [10**9]
    share, spare, start = room // strata, 0, 0
    best = lambda members: sorted(members, key=lambda i: (-scores[i], i))  # noqa: E731
    for end in ends:
        members = [i for i in ids if start <= age[i] < end]
        quota = share + spare
        kept |= set(best(members)[:quota])
        spare, start = max(0, quota - len(members)), end
    return kept | set(best([i for i in ids if i not in kept])[: store - len(kept)])


@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_a_line_is_causal_and_leaves_out_the_condition(padded):
    view = random_view(width=5, step=4, kept_lines=1, columns=(1, 3, 4), store=15, seed=0, padded=padded)
    rows = view.attention_rows(torch.arange(3))
    assert rows.shape == (ROWS, HEADS, 3, view.num_present)
    torch.testing.assert_close(
        rows.mean(2).double(), torch.tensor(plain_attention(view), dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert (rows[:, :, 0, -3:] == 0).all() and (rows[:, :, 2] > 0).all()
    assert (rows.sum(-1) < 1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 4),
    st.integers(4, 12),
    st.integers(1, 5),
    st.integers(0, 1),
    st.integers(0, 10**6),
    st.booleans(),
    st.data(),
)
def test_headkv_keeps_anchors_recent_lines_and_strata(width, step, strata, anchors, seed, carried, data):
    columns = even_columns(width, 2)
    view = random_view(width, step, 2, columns, 2 * width, seed, carried=carried)
    store = data.draw(st.integers((1 + max(1, anchors)) * width, view.num_present - 1))
    view = replace(view, store=store)
    ranking = HeadKVAR(strata=strata, anchors=anchors).rank(view)
    kept = top(ranking.scores, store, ranking.tiers)
    ids = view.ids
    attention = torch.tensor(plain_attention(view), dtype=torch.float64)
    for row in range(ROWS):
        for head in range(HEADS):
            own = ids[row, head].tolist()
            scores = attention[row, head].clone()
            if carried:
                scores[: view.num_stored] = (
                    0.5 * scores[: view.num_stored] + 0.5 * view.stored_carried[row, head].double()
                )
            torch.testing.assert_close(ranking.carried[row, head].double(), scores, atol=1e-6, rtol=0)
            # The selection itself goes by the float32 scores, so that a tie in them is a tie.
            by_id = dict(zip(own, ranking.scores[row, head].tolist()))
            expected = plain_strata(own, by_id, step, width, store, strata, anchors)
            assert set(ids[row, head, kept[row, head]].tolist()) == expected


def test_strata_hand_on_what_they_leave():
    present = torch.tensor([[1, 9, 0, 9], [9, 9, 9, 9], [0, 0, 0, 30]])
    assert shared_quotas(present, 4).tolist() == [[1, 7, 0, 8], [4, 4, 4, 4], [0, 0, 0, 16]]


def test_a_long_memory_is_kept():
    """With strata a third of the oldest tokens stays even when all attention is on the newest."""
    view = random_view(width=4, step=20, kept_lines=2, columns=(3,), store=20, seed=1, carried=False)
    carried = torch.arange(view.num_stored).float().expand(ROWS, HEADS, -1)
    view = replace(view, stored_carried=carried)
    oldest = {}
    for strata in (1, 4):
        ranking = HeadKVAR(strata=strata, anchors=0, decay=0.99).rank(view)
        kept = top(ranking.scores, view.store, ranking.tiers)
        oldest[strata] = (view.ids.gather(-1, kept) < 14 * 4 - 12).sum(-1)
    assert (oldest[1] == 0).all() and (oldest[4] > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(0, 10**6), st.data())
def test_linear_ar_keeps_anchors_and_recent_lines(anchors, recent, seed, data):
    width, step = 3, 8
    view = random_view(width, step, 2, (1, 2), 1, seed)
    first = torch.arange(anchors * width).expand(ROWS, HEADS, -1)
    stored = view.stored_ids.clone()
    stored[..., : anchors * width] = first
    stored[..., anchors * width :] = stored[..., anchors * width :].clamp_min(anchors * width)
    view = replace(view, stored_ids=stored)
    store = data.draw(st.integers((anchors + recent) * width, view.num_present - 1))
    ranking = LineAR(anchors=anchors, recent=recent).rank(replace(view, store=store))
    torch.testing.assert_close(
        ranking.scores.double(), torch.tensor(plain_attention(view), dtype=torch.float64), atol=1e-6, rtol=0
    )
    kept = top(ranking.scores, store, ranking.tiers)
    places = range(view.num_present)
    protected = {p for p in places if p < anchors * width or p >= view.num_present - recent * width}
    for row in range(ROWS):
        for head in range(HEADS):
            scores = ranking.scores[row, head].tolist()
            rest = sorted((p for p in places if p not in protected), key=lambda p: (-scores[p], p))
            assert set(kept[row, head].tolist()) == protected | set(rest[: store - len(protected)])


@given(st.integers(1, 100), st.integers(1, 100))
def test_even_columns(width, count):
    columns = even_columns(width, count)
    assert len(columns) == min(width, count) == len(set(columns))
    assert list(columns) == sorted(columns) and columns[-1] == width - 1 and columns[0] >= 0
    gaps = {b - a for a, b in zip(columns, columns[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(RASTER_METHODS)),
    st.integers(3, 7),
    st.integers(2, 5),
    st.booleans(),
    st.integers(0, 10**6),
    st.data(),
)
def test_every_method_keeps_its_budget_and_the_condition(name, lines, width, strict, seed, data):
    method = get_method(name, RASTER_METHODS)
    least = method.min_budget(Geometry(Schedule.from_lines(lines, width), 2, HEADS, CHANNELS), None) + strict * width
    budget = data.draw(st.integers(least, max(least, lines * width)))
    cache = RasterCache((lines, width), budget, method, strict=strict)
    generator = torch.Generator().manual_seed(seed)
    for position in range(lines * width):
        tokens = CONDITION if position == 0 else 1
        for index in range(2):
            layer = cache.layer(index)
            key, value = torch.randn(2, ROWS, HEADS, tokens, CHANNELS, generator=generator)
            present = layer.append(key, value)
            if present is None:
                query = torch.randn(ROWS, HEADS * SHARING, 1, CHANNELS, generator=generator)
                dense = lambda query, key, value: torch.zeros_like(query)  # noqa: E731
                assert layer.attend(query, None, 0.5, dense).shape == query.shape
            held = sum(group.heads.shape[1] * group.tokens for group in layer.groups)
            assert held <= HEADS * (budget if strict else budget + width)
            for group in layer.groups:
                ids = group.ids[:, :, : group.tokens].long()
                assert (ids.diff(dim=-1) > 0).all() and int(ids.max()) <= position - 1
    report = cache.report()
    assert report.peak_tokens <= min(budget, (lines - 1) * width)
    allowed = min(budget if strict else budget + width, lines * width - 1)
    assert report.checkpoint_peak_tokens <= allowed


@pytest.mark.parametrize("name", sorted(RASTER_METHODS))
def test_half_precision_and_devices_follow_the_keys(name):
    cache = RasterCache((6, 4), 12, name)
    layer = cache.layer(0)
    for position in range(24):
        key = torch.randn(1, 2, 1, CHANNELS, dtype=torch.bfloat16)
        if layer.append(key, key) is None:
            output = layer.attend(key, None, 0.5, lambda query, key, value: query)
            assert output.dtype == torch.bfloat16
    assert layer.groups and all(group.key.dtype == torch.bfloat16 for group in layer.groups)
