"""Head-aware caches in real next-token models of transformers, at tiny sizes with random weights."""

import copy
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessorList
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as library_logging

from hack_pipelines.cache.raster import RasterCache
from hack_pipelines.integrations.transformers import (
    ATTENTION_NAME,
    WATCHES,
    HeadKVCache,
    LineARCache,
    compressed_guidance,
    head_attention,
    nested_configs,
)
from hack_pipelines.methods import RASTER_METHODS, Geometry, HeadKVAR
from hack_pipelines.methods.lines import LineView
from hack_pipelines.schedule import Schedule

from .models import SIDE, chameleon, emu3, janus, llama


TOTAL = SIDE * SIDE
PROMPT = torch.tensor([[1, 10, 11, 12, 13, 4], [1, 20, 21, 22, 23, 4]])
# Every budget that loses something here: below what all lines but the last hold.
LOSSLESS = (SIDE - 1) * SIDE


def drawn(model, cache, inputs=PROMPT, mask=None, sample=False, autocast=False, guidance=3.0):
    """Image tokens of Janus."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs) if mask is None else mask,
            generation_mode="image",
            guidance_scale=guidance,
            do_sample=sample,
            past_key_values=cache,
        )


def continued(model, cache, inputs=PROMPT, mask=None, sample=False, autocast=False, **kwargs):
    """Tokens that a text model's `generate` draws for a grid."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs) if mask is None else mask,
            do_sample=sample,
            past_key_values=cache,
            min_new_tokens=TOTAL,
            max_new_tokens=TOTAL,
            **kwargs,
        )
    return tokens[:, inputs.shape[1] :]


def looped(model, cache, inputs=PROMPT, head=None):
    """Greedy tokens from a bare loop over forward passes, without masks and positions."""
    step, tokens = inputs, []
    with torch.no_grad():
        for _ in range(TOTAL):
            hidden = model.model(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            step = model.lm_head(hidden).argmax(-1, keepdim=True)
            tokens.append(step)
    return torch.cat(tokens, dim=1)


MODELS = {
    "janus": (janus, drawn),
    "llama": (llama, continued),
    "emu3": (emu3, continued),
    "chameleon": (chameleon, looped),
}


def first_difference(tokens, reference) -> int:
    differs = (tokens != reference).any(0)
    return int(differs.nonzero()[0]) if differs.any() else tokens.shape[1]


def cache_of(model, budget, **kwargs) -> HeadKVCache:
    return HeadKVCache.from_model(model, budget, (SIDE, SIDE), **{"line_end": False, **kwargs})


# -- the ground --------------------------------------------------------------------------------------------------------


def test_janus_draws_what_its_parts_do():
    """Without this no comparison with `DynamicCache` means anything: some releases feed tokens of the prompt."""
    model = janus()
    tokens = drawn(model, DynamicCache())
    unconditional = PROMPT.clone()
    unconditional[(PROMPT != 1) & (PROMPT != 4)] = 0
    embeddings = model.get_input_embeddings()(torch.cat([PROMPT, unconditional]))
    cache, expected = DynamicCache(), []
    with torch.no_grad():
        for _ in range(TOTAL):
            hidden = model.model.language_model(inputs_embeds=embeddings, past_key_values=cache).last_hidden_state
            conditional, other = model.model.generation_head(hidden[:, -1]).chunk(2)
            conditional, other = conditional.log_softmax(-1), other.log_softmax(-1)
            token = (other + 3.0 * (conditional - other)).argmax(-1)
            expected.append(token)
            embeddings = model.prepare_embeddings_for_image_generation(torch.cat([token, token])[:, None])
    assert torch.equal(tokens, torch.stack(expected, dim=1))
    assert len(tokens.unique()) > 4


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_while_nothing_has_to_go(name, kv_heads):
    make, run = MODELS[name]
    model = make(kv_heads)
    expected = run(model, DynamicCache())
    for budget in (None, 1.0, LOSSLESS):
        with head_attention(model):
            assert torch.equal(run(model, cache_of(model, budget)), expected), budget


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["janus", "llama", "emu3"])
def test_samples_and_half_precision_are_the_same(name, autocast):
    make, run = MODELS[name]
    model = make(2)
    expected = run(model, DynamicCache(), sample=True, autocast=autocast)
    for budget in (None, LOSSLESS):
        with head_attention(model):
            tokens = run(model, cache_of(model, budget), sample=True, autocast=autocast)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("method", RASTER_METHODS)
def test_first_difference_is_not_before_the_first_loss(method):
    model = llama(2)
    expected = continued(model, DynamicCache())
    for budget in (24, 40, LOSSLESS - 1):
        with head_attention(model):
            tokens = continued(model, cache_of(model, budget, method=method))
        # The token that ends the line after which the budget is passed is the last that was drawn from everything.
        assert first_difference(tokens, expected) > (budget // SIDE + 1) * SIDE
        if budget == 24:
            assert not torch.equal(tokens, expected)


def test_grid_need_not_be_square():
    model = llama()
    expected = continued(model, DynamicCache())
    for grid in ((4, 16), (16, 4)):
        lossless = (grid[0] - 1) * grid[1]
        with head_attention(model):
            assert torch.equal(continued(model, HeadKVCache(grid, lossless)), expected)
            tokens = continued(model, HeadKVCache(grid, 2 * grid[1] if grid[1] == 16 else 20))
        assert not torch.equal(tokens, expected)


def test_bare_loop_equals_generate():
    model = llama(2)
    with head_attention(model):
        assert torch.equal(looped(model, cache_of(model, 24)), continued(model, cache_of(model, 24)))


# -- against a dense computation -----------------------------------------------------------------------------------


class Oracle:
    """Attention over all tokens with a mask of those that each layer, row and head still had at the time."""

    def __init__(self, kept: dict[int, torch.Tensor], padding: torch.Tensor):
        self.kept, self.padding = kept, padding

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = module.num_key_value_groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        mask = self.kept[module.layer_idx].repeat_interleave(groups, dim=1) & self.padding[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2), None


def teacher_forced(model, cache, tokens, condition, mask):
    """Logits of all tokens after the condition, one at a time, and which tokens each head attended to."""
    rows, length = tokens.shape
    heads = model.config.num_key_value_heads
    kept = {
        layer: torch.zeros(rows, heads, length, length, dtype=torch.bool)
        for layer in range(model.config.num_hidden_layers)
    }
    logits = []
    with torch.no_grad():
        for position in range(condition, length + 1):
            new = tokens[:, :condition] if position == condition else tokens[:, position - 1 : position]
            # As `generate` counts them.
            places = (mask[:, :position].cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
            output = model(
                input_ids=new,
                attention_mask=mask[:, :position],
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[:, -1])
            for layer, seen in kept.items():
                raster = cache.raster.layers[layer]
                if position == condition:
                    seen[:, :, :condition, :condition] = torch.ones(condition, condition).tril().bool()
                    continue
                here = held_before_the_end_of(raster, position, condition, rows, heads)
                seen[:, :, position - 1, :position] = here
            remember(cache, condition, rows, heads)
    return torch.stack(logits, dim=1), kept


def remember(cache, condition, rows, heads):
    """What is held now is what the next token attends to."""
    for raster in cache.raster.layers:
        held = torch.zeros(rows, heads, raster.seen, dtype=torch.bool)
        if not raster.groups:
            held[:] = True
        for group in raster.groups:
            for row in range(rows):
                for place, head in enumerate(group.heads[row].tolist()):
                    held[row, head, :condition] = True
                    held[row, head, condition + group.ids[row, place, : group.tokens].long()] = True
        raster.remembered = held


def held_before_the_end_of(raster, position, condition, rows, heads):
    return torch.cat([raster.remembered, torch.ones(rows, heads, 1, dtype=torch.bool)], dim=-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("method", ["headkv_ar", "linear_ar", "h2o"])
def test_equals_attention_with_a_mask(method, kv_heads, padded):
    model = llama(kv_heads)
    condition = PROMPT.shape[1]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.cat([PROMPT, torch.randint(40, 72, (2, TOTAL), generator=generator)], dim=1)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :3] = 0
    cache = cache_of(model, 24, method=method)
    with head_attention(model):
        logits, kept = teacher_forced(model, cache, tokens, condition, mask)
    for layer in range(2):
        counts = kept[layer][:, :, -1].sum(-1)
        # The last token attends to the budget, its line and the condition.
        assert counts.float().mean() == 24 + SIDE + condition
        assert method == "headkv_ar" and kv_heads > 1 or counts.unique().numel() == 1
    AttentionInterface.register("oracle", Oracle(kept, mask.bool()))
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = model(input_ids=tokens, attention_mask=mask, position_ids=places).logits[:, condition - 1 :]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


# -- independence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["janus", "llama"])
def test_batch_is_its_images_alone(name):
    make, run = MODELS[name]
    model = make(2)
    with head_attention(model):
        both = run(model, cache_of(model, 24))
        swapped = run(model, cache_of(model, 24), PROMPT.flip(0))
        alone = [run(model, cache_of(model, 24), row[None]) for row in PROMPT]
    assert torch.equal(swapped.flip(0), both)
    assert torch.equal(torch.cat(alone), both)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["janus", "llama"])
def test_padding_changes_nothing(name):
    make, run = MODELS[name]
    model = make(2)
    padded = F.pad(PROMPT[:1], (3, 0))
    mask = F.pad(torch.ones_like(PROMPT[:1]), (3, 0))
    for budget in (None, 24):
        with head_attention(model):
            alone = run(model, cache_of(model, budget), PROMPT[:1])
            assert torch.equal(run(model, cache_of(model, budget), padded, mask), alone)


def test_a_cache_can_be_reset_and_copied():
    model = llama(2)
    cache = cache_of(model, 24)
    pristine = copy.deepcopy(cache)
    with head_attention(model):
        first = continued(model, cache)
        with pytest.raises(ValueError, match="serves one generation"):
            looped(model, cache)
        cache.reset()
        assert torch.equal(continued(model, cache), first)
        assert torch.equal(continued(model, pristine), first)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("method", ["headkv_ar", "linear_ar"])
def test_stored_bytes(method, strict):
    model = llama(2)
    condition, budget = PROMPT.shape[1], 32
    cache = cache_of(model, budget, method=method, strict=strict)
    dense = []

    class Spy(type(cache)):
        def update(self, key, value, layer_idx, *args, **kwargs):
            result = super().update(key, value, layer_idx, *args, **kwargs)
            layer = self.raster.layers[layer_idx]
            if layer.whole is not None:
                dense.append(weakref.ref(layer.whole.key))
            held = sum(group.heads.shape[1] * group.tokens for group in layer.groups)
            # Inside of a line it comes on top of the budget; a strict budget includes it.
            assert held <= 2 * (budget if strict else budget + SIDE)
            return result

    cache.__class__ = Spy
    with head_attention(model):
        continued(model, cache)
    assert dense and not any(ref() is not None for ref in dense)
    own = budget - SIDE if strict else budget
    assert cache.report().peak_tokens <= own
    assert cache.report().checkpoint_peak_tokens <= (budget if strict else budget + SIDE)
    for layer in cache.raster.layers:
        for group in layer.groups:
            # The last image token is never fed: the last line is complete but for it.
            assert group.tokens <= group.ids.shape[2]
            slots = group.key.shape[2]
            assert group.key.untyped_storage().nbytes() == 2 * group.heads.shape[1] * slots * 16 * 4
            stores = [line.store[layer.groups.index(group)] for line in cache.raster.lines if line.loses]
            assert slots == condition + max(stores) + SIDE


def test_report_counts_what_is_there():
    model = llama(2)
    cache = cache_of(model, 24)
    with head_attention(model):
        continued(model, cache)
    report = cache.report()
    condition, slots = PROMPT.shape[1], PROMPT.shape[1] + 24 + SIDE
    token = 2 * 16 * 4 * 2 * 2
    assert report.tokens_by_step == [8, 16, 24, 24, 24, 24, 24]
    assert report.checkpoint_peak_tokens <= 24 + SIDE
    assert report.bytes_full == (condition + TOTAL) * token
    queries = 2 * 4 * 8 * 16 * 4
    beside = (24 + SIDE) * 2 * 2 * (2 + 4)
    assert report.bytes_allocated_peak == slots * token + queries + beside
    assert report.metadata_bytes == queries + 24 * 2 * 2 * (2 + 4)
    assert report.bytes_logical_peak == (condition + 24) * token + report.metadata_bytes
    assert "all tokens" in str(report) and "float32" not in str(report)


def test_attended_keys_are_counted():
    model = llama(2)
    cache = cache_of(model, 24, method="linear_ar")
    with head_attention(model):
        continued(model, cache)
    attended = cache.report().attended_by_step
    condition, middle = PROMPT.shape[1], (SIDE + 1) / 2
    assert attended == [condition + min(24, step * SIDE) + middle for step in range(SIDE - 1)]
    assert cache.report().attention_flops == round(sum(attended) * SIDE * 2 * 2 * 4 * 16 * 2)


def test_full_budget_is_reported_too():
    model = llama()
    cache = cache_of(model, None)
    continued(model, cache)
    assert cache.report().tokens_by_step == [SIDE * line for line in range(1, SIDE)]
    assert cache.report().peak_tokens == LOSSLESS


def test_budget_in_bytes_is_for_one_image():
    model = janus(2)
    condition, token = PROMPT.shape[1], 2 * 16 * 4 * 2 * 2 * 2
    metadata = 2 * 2 * 2 * 6
    cache = cache_of(model, f"{(condition + 24 + SIDE) * (token + metadata)}B")
    with head_attention(model):
        drawn(model, cache)
    assert cache.raster.plan.budget == 24
    with head_attention(model), pytest.raises(ValueError, match="needs at least 16"):
        drawn(model, cache_of(model, f"{(condition + 15 + SIDE) * (token + metadata)}B"))


# -- heads -------------------------------------------------------------------------------------------------------------


def planted_line_attention(kinds, rows=1, width=SIDE, lines=4):
    """Evidence of heads with planted patterns: attention that is `near`, `uniform`, or on the `margin` columns."""
    cache = RasterCache((SIDE, width), 24)
    method = cache.method
    present = lines * width
    heads = len(kinds)
    ids = torch.arange(present)
    key = torch.zeros(rows, heads, present + 1, present)
    key[:, :, 1:] = torch.eye(present)
    query = torch.full((rows, heads, width, 1, present), -30.0)
    for head, kind in enumerate(kinds):
        for column in range(width):
            line, own = ids // width, ids % width
            near = (lines - 1 - line <= 1) & ((own - column).abs() <= 1)
            margin = (own == 0) | (own == width - 1)
            target = {"near": near, "margin": margin, "uniform": torch.ones_like(near)}[kind]
            query[:, head, column, 0, target] = 0
    return method, LineView(
        schedule=cache.schedule,
        step=lines - 1,
        layer=0,
        heads=tuple(range(heads)),
        label="",
        budget=24,
        query=query,
        key=key[:, :, -width:],
        value=key[:, :, -width:],
        stored_key=key[:, :, 1:-width],
        stored_value=key[:, :, 1:-width],
        attend=present,
        store=present,
        scale=1.0,
        guided=False,
        columns=torch.arange(width),
        condition_key=key[:, :, :1],
    )


def test_broad_heads_come_first():
    method, view = planted_line_attention(["near", "margin", "near", "uniform"])
    evidence = method.head_evidence(view)
    order = method.head_order(evidence)[0].tolist()
    assert set(order[:2]) == {1, 3} and order[2:] == [0, 2]
    near, everything = evidence[0].unbind(-1)
    assert (near[[0, 2]] / everything[[0, 2]] > 0.99).all() and (near[[1, 3]] / everything[[1, 3]] < 0.6).all()


def test_line_ends_count_neither_way():
    method, view = planted_line_attention(["near", "uniform"])
    _, everything = method.head_evidence(view)[0].unbind(-1)
    near_without, without = method.head_evidence(replace(view, line_end=True))[0].unbind(-1)
    assert (without < everything).all() and (near_without <= without).all()


def test_each_row_has_its_own_heads():
    model = llama(4)
    cache = cache_of(model, 24)
    prompts = torch.randint(5, 40, (6, 6), generator=torch.Generator().manual_seed(3))
    with head_attention(model):
        continued(model, cache, prompts)
    layer = cache.raster.layers[1]
    assert [group.heads.shape[1] for group in layer.groups] == [1, 1, 1, 1]
    # Together every head once, ascending in a group.
    together = torch.cat([group.heads for group in layer.groups], dim=1)
    assert torch.equal(together.sort(-1).values, torch.arange(4).expand(6, 4))
    assert len({tuple(row) for row in layer.groups[0].heads.tolist()}) > 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(1, 24), st.integers(1, 32), st.integers(2, 4), st.data())
def test_plans_keep_the_budget(lines, width, heads, groups, data):
    lines = max(lines, 3)
    budget = data.draw(st.integers(2 * width, (lines - 1) * width))
    schedule = Schedule.from_lines(lines, width)
    plan = HeadKVAR(groups=groups).plan(Geometry(schedule, 2, heads, 8), budget, None)
    layer = plan.layers[0]
    for step, counts in enumerate(layer.store[:-1]):
        held = sum(len(group) * count for group, count in zip(layer.groups, counts))
        present = (step + 1) * width
        assert held <= budget * heads
        # Not more than rounding is left unused.
        assert held > min(budget, present) * heads - max(map(len, layer.groups))
        assert min(counts) >= min(2 * width, present)
        # A token that is left may be enough for a later group of one head, and not for an earlier one of two.
        assert all(earlier >= later - 1 for earlier, later in pairwise(counts))


@pytest.mark.parametrize(("budget", "expected"), [(96, (144, 48)), (72, (96, 48)), (48, (48, 48))])
def test_lengths_of_janus(budget, expected):
    plan = HeadKVAR(groups=2, spread=1.0).plan(Geometry(Schedule.from_lines(24, 24), 1, 16, 128), budget, None)
    assert plan.layers[0].store[-2] == expected
    assert [len(group) for group in plan.layers[0].groups] == [8, 8]


# -- guidance of Emu3 --------------------------------------------------------------------------------------------------

NEGATIVE = torch.tensor([[1, 30, 4]])


def test_guidance_in_a_pass_of_its_own():
    model = emu3(2)
    expected = continued(model, DynamicCache(), PROMPT[:1], guidance_scale=3.0, negative_prompt_ids=NEGATIVE)
    for budget, same in ((None, True), (LOSSLESS, True), (24, False)):
        caches = [cache_of(model, budget) for _ in range(2)]
        with head_attention(model):
            guidance = compressed_guidance(model, 3.0, NEGATIVE, caches[1])
            tokens = continued(model, caches[0], PROMPT[:1], logits_processor=LogitsProcessorList([guidance]))
        assert torch.equal(tokens, expected) is same
        peaks = [cache.report().peak_tokens for cache in caches]
        assert peaks == [24 if budget == 24 else LOSSLESS] * 2


def test_uncompressed_second_cache_is_warned_about(caplog):
    library_logging.enable_propagation()
    model = emu3(2)
    try:
        with head_attention(model):
            continued(model, cache_of(model, 24), PROMPT[:1], guidance_scale=3.0, negative_prompt_ids=NEGATIVE)
            assert caplog.text.count("compressed_guidance") == 1
            caplog.clear()
            continued(model, cache_of(model, None), PROMPT[:1], guidance_scale=3.0, negative_prompt_ids=NEGATIVE)
    finally:
        library_logging.disable_propagation()
    assert "compressed_guidance" not in caplog.text


# -- nothing global ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [janus, emu3, chameleon, llama])
def test_context_leaves_nothing_behind(make, tmp_path):
    model = make()
    before = [config._attn_implementation for config in nested_configs(model.config)]
    with pytest.raises(RuntimeError, match="on purpose"), head_attention(model):
        assert model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME
        model.save_pretrained(tmp_path)
        raise RuntimeError("on purpose")
    assert [config._attn_implementation for config in nested_configs(model.config)] == before
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    assert not WATCHES


def test_other_models_and_text_are_untouched():
    model, other = janus(2), llama(2)
    expected = continued(other, DynamicCache()), model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    with head_attention(model):
        drawn(model, cache_of(model, 24))
        assert torch.equal(continued(other, DynamicCache()), expected[0])
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected[1])


# -- loud --------------------------------------------------------------------------------------------------------------


def test_without_the_context_it_says_what_to_write():
    model = llama()
    with pytest.raises(ValueError, match=r"with head_attention\(model\): model.generate"):
        continued(model, cache_of(model, 24))


def test_other_attention_is_refused():
    model = llama()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager', but head groups are attended to with SDPA"), head_attention(model):
        pass


def test_beams_cropping_and_parts_are_refused():
    model = llama()
    with head_attention(model):
        with pytest.raises(ValueError, match="use greedy search or sampling"):
            continued(model, cache_of(model, 24), num_beams=2)
        cache = cache_of(model, 24)
        continued(model, cache)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="repeat the inputs"):
            cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="make one for each batch"):
            cache.batch_select_indices(torch.tensor([0]))
        with torch.no_grad():
            cache = cache_of(model, 24)
            model(input_ids=PROMPT[:, :3], past_key_values=cache)
            with pytest.raises(ValueError, match="say with `condition_tokens`"):
                model(input_ids=PROMPT[:, 3:], past_key_values=cache)


def test_prompt_in_parts():
    model = llama(2)
    with head_attention(model), torch.no_grad():
        whole = looped(model, cache_of(model, 24))
        cache = cache_of(model, 24, condition_tokens=6)
        model(input_ids=PROMPT[:, :3], past_key_values=cache)
        tokens, step = [], PROMPT[:, 3:]
        for _ in range(TOTAL):
            step = model(input_ids=step, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(step)
    assert torch.equal(torch.cat(tokens, dim=1), whole)


def test_more_tokens_than_the_grid():
    model = llama()
    with head_attention(model), torch.no_grad():
        cache = HeadKVCache((4, SIDE), 16)
        with pytest.raises(ValueError, match="but the grid has 32"):
            looped(model, cache)
        # What ends an image has room behind it.
        assert cache.get_seq_length() == PROMPT.shape[1] + 32 + SIDE + 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"grid": (8,)}, "`grid` must be two positive ints"),
        ({"grid": (8, 0)}, "`grid` must be two positive ints"),
        ({"kv_budget": 15}, "needs at least 16 on lines of 8: set `kv_budget` to 16"),
        ({"kv_budget": 23, "strict": True}, "needs at least 24 with `strict=True`"),
        ({"kv_budget": 1.5}, "`kv_budget` must be a fraction"),
        ({"kv_budget": "much"}, "`kv_budget` must be a fraction"),
        ({"method": "hack"}, "`method` must be one of 'h2o', 'headkv_ar'"),
        ({"method": "h2o:protocol=pre", "kv_budget": 24}, "use 'post'"),
        ({"condition_tokens": 0}, "`condition_tokens` must be a positive int"),
        ({"rows_per_image": 3}, "`rows_per_image` must be 1"),
        ({"method": "headkv_ar:groups=1"}, "`groups` must be at least 2"),
        ({"method": "headkv_ar:spread=2.5"}, r"`spread` must lie in \[0, 2\]"),
        ({"method": "headkv_ar:decay=1.0"}, r"`decay` must lie in \[0, 1\)"),
        ({"method": "linear_ar:recent=0"}, "`recent` and `observe` at least 1"),
        ({"method": "streaming_llm:sinks=3"}, "`sinks` must be 1 or 2"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HeadKVCache(**{"grid": (8, 8), **kwargs})


def test_grid_of_the_model():
    with pytest.raises(ValueError, match="`grid` must be given for a model of type 'llama'"):
        HeadKVCache.from_model(llama(), 24)
    with pytest.raises(ValueError, match=r"this model draws \(8, 8\)"):
        HeadKVCache.from_model(janus(), 24, grid=(4, 16))
    cache = LineARCache.from_model(janus(2), 24)
    assert cache.raster.method.name == "linear_ar"
    assert (cache.raster.rows_per_image, cache.raster.sharing, cache.raster.line_end) == (2, 2, False)
    assert HeadKVCache.from_model(emu3(), 27, grid=(8, 9)).raster.line_end


def test_scores_that_are_not_finite():
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(float("inf"))
    with head_attention(model), pytest.raises(ValueError, match="scores that are not finite"):
        looped(model, cache_of(model, 24))
