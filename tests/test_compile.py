"""`torch.compile`: blocks in one graph each, shared by all layers, scales and caches, with the results of eager mode."""

import shutil
import weakref

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch._dynamo.testing import CompileCounterWithBackend

from hack_pipelines import HackVARTextPipeline
from hack_pipelines.cache import FullCache
from hack_pipelines.cache.recording import RecordingCache
from hack_pipelines.models.transformer_infinity import InfinityCondition
from hack_pipelines.schedule import Schedule

from .components import (
    planted_profile,
    seeds,
    tiny_pipeline,
    tiny_text_pipeline,
    tiny_text_transformer,
    tiny_transformer,
)


SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCHEDULE = Schedule.from_sides(SIDES)
LABELS = torch.tensor([1, 2])
PROMPTS = ["a red apple", "a smiling cat in a house", "a lighthouse in a storm"]
FAMILIES = ["var", "infinity"]
# Compiling takes seconds: what the families share is tested with one, and in the slow run with both.
VAR_AND_SLOWLY_INFINITY = ["var", pytest.param("infinity", marks=pytest.mark.slow)]
# One of each kind of cache: head groups, segments, one a row, 8 bits.
BUDGETS = [
    {},
    {"kv_budget": 60, "method": "hack"},
    {"kv_budget": 60, "method": "hack++"},
    {"kv_budget": 80, "method": "heatkv"},
    {"kv_budget": 60, "method": "headkv:types=online"},
    {"kv_budget": 60, "method": "h2o", "kv_dtype": "int8"},
]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pipeline(family):
    if family == "var":
        pipe = tiny_pipeline(patch_nums=SIDES)
    else:
        pipe = tiny_text_pipeline([(side, side) for side in SIDES])
    profile = planted_profile(SCHEDULE, 3, 4, 16, seed=0)
    profile.family = family
    pipe.load_head_profile(profile)
    return pipe


def draw(pipe, images=2, **overrides):
    if isinstance(pipe, HackVARTextPipeline):
        inputs = {"prompt": PROMPTS[:images]}
    else:
        inputs = {"class_labels": list(range(images))}
    out = pipe(**{**inputs, "generator": seeds(*range(images)), "output_type": "latent", **overrides})
    return torch.cat([tokens.flatten(1) for tokens in out.tokens], dim=1)


def compiled(pipe, backend="eager"):
    """The compiler of its blocks, which counts what it compiled."""
    counter = CompileCounterWithBackend(backend)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    return counter


def condition():
    generator = torch.Generator().manual_seed(1)
    return InfinityCondition([torch.randn(length, 32, generator=generator) for length in (3, 5)], guided=False)


def arguments(family):
    return (LABELS,) if family == "var" else (condition(), SCHEDULE)


@torch.no_grad()
def logits_of_scales(transformer, family, cache):
    generator = torch.Generator().manual_seed(0)
    given, logits = arguments(family), []
    for step, length in enumerate(SCHEDULE.lengths):
        latents = torch.randn(2, length, 8, generator=generator) if step else None
        logits.append(transformer(latents, *given, step=step, kv_cache=cache).logits)
    return torch.cat(logits, dim=1)


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_graphs_for_ten_scales_three_layers_and_every_cache(family, backend):
    """One for the first scale, of a single token, and one for all others."""
    pipe = pipeline(family)
    expected = [draw(pipe, **budget) for budget in BUDGETS]
    counter = compiled(pipe, backend)
    for budget, tokens in zip(BUDGETS, expected):
        assert torch.equal(draw(pipe, **budget), tokens), budget
        assert counter.frame_count == 2, budget


@pytest.mark.parametrize("family", VAR_AND_SLOWLY_INFINITY)
def test_projections_are_another_pair_of_graphs(family):
    pipe, budget = pipeline(family), {"kv_budget": 100, "method": "scalekv:scoring=released"}
    expected = draw(pipe, **budget)
    counter = compiled(pipe)
    draw(pipe)
    assert counter.frame_count == 2
    for _ in range(2):
        assert torch.equal(draw(pipe, **budget), expected)
        assert counter.frame_count == 4


@pytest.mark.parametrize("family", VAR_AND_SLOWLY_INFINITY)
def test_graphs_by_number_of_rows(family):
    """A pair for the first number of rows, one for a single row, and one for all others."""
    pipe, reference = pipeline(family), pipeline(family)
    counter = compiled(pipe)
    for images, guidance, graphs in [(1, 3, 2), (1, 1, 4), (2, 3, 6), (3, 1, 6), (3, 3, 6), (1, 3, 6)]:
        inputs = {"images": images, "guidance_scale": guidance}
        assert torch.equal(draw(pipe, **inputs), draw(reference, **inputs)), inputs
        assert counter.frame_count == graphs, inputs


def test_another_graph_when_the_length_of_the_text_changes():
    pipe = pipeline("infinity")
    counter, graphs = compiled(pipe), []
    for prompt in PROMPTS:
        draw(pipe, 1, prompt=[prompt])
        graphs.append(counter.frame_count)
    assert graphs == [2, 3, 3]


@pytest.mark.parametrize(("family", "graphs"), [("var", 2), pytest.param("infinity", 3, marks=pytest.mark.slow)])
def test_autocast(family, graphs):
    """In half precision Infinity's first block gets another dtype than the others. Caches choose tokens under autocast too."""
    pipe, budgets = pipeline(family), [{}, {"kv_budget": 60, "method": "h2o"}]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [draw(pipe, **budget) for budget in budgets]
        counter = compiled(pipe, "aot_eager")
        assert all(torch.equal(draw(pipe, **budget), tokens) for budget, tokens in zip(budgets, expected))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("family", VAR_AND_SLOWLY_INFINITY)
def test_attention_backend_of_compiled_blocks(family):
    pipe, cache = pipeline(family), FullCache(SCHEDULE, 3)
    eager = logits_of_scales(pipe.transformer, family, cache)
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = AttentionBackendName._NATIVE_MATH
    math = logits_of_scales(pipe.transformer, family, FullCache(SCHEDULE, 3))
    assert not torch.equal(math, eager)
    counter = compiled(pipe)
    assert torch.equal(logits_of_scales(pipe.transformer, family, FullCache(SCHEDULE, 3)), math)
    pipe.transformer.reset_attention_backend()
    assert torch.equal(logits_of_scales(pipe.transformer, family, FullCache(SCHEDULE, 3)), eager)
    assert counter.frame_count == 4


@pytest.mark.parametrize("family", VAR_AND_SLOWLY_INFINITY)
def test_recording(family):
    pipe, caches = pipeline(family), [RecordingCache(SCHEDULE, 3) for _ in range(2)]
    expected = logits_of_scales(pipe.transformer, family, caches[0])
    counter = compiled(pipe)
    assert torch.equal(logits_of_scales(pipe.transformer, family, caches[1]), expected)
    assert counter.frame_count == 2
    assert all(torch.equal(caches[1].statistics[name], value) for name, value in caches[0].statistics.items())


@pytest.mark.slow
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("family", FAMILIES)
def test_group_offload(family, offload_type):
    pipe = pipeline(family)
    expected = draw(pipe, kv_budget=60)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert torch.equal(draw(pipe, kv_budget=60), expected)


@pytest.mark.parametrize("family", VAR_AND_SLOWLY_INFINITY)
def test_compiled_code_keeps_no_cache_alive(family):
    pipe = pipeline(family)
    compiled(pipe)
    cache = FullCache(SCHEDULE, 3)
    alive = weakref.ref(cache)
    logits_of_scales(pipe.transformer, family, cache)
    del cache
    assert alive() is None


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_the_cache_come_through(family):
    pipe = pipeline(family)
    compiled(pipe)
    with pytest.raises(ValueError, match="Layer 0 got 4 tokens at step 0, where its schedule has 1"):
        pipe.transformer(torch.zeros(2, 4, 8), *arguments(family), step=1, kv_cache=FullCache(SCHEDULE, 3))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
def test_cuda_graphs_leave_the_operator_out():
    """Replayed, it would not reach the cache."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.hack_pipelines.attend.default.tags


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on CPUs")
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_is_close(family):
    pipe = pipeline(family)
    expected = logits_of_scales(pipe.transformer, family, FullCache(SCHEDULE, 3))
    counter = compiled(pipe, "inductor")
    actual = logits_of_scales(pipe.transformer, family, FullCache(SCHEDULE, 3))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2


# -- teacher forcing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("family", "build"), [("var", tiny_transformer), ("infinity", tiny_text_transformer)])
def test_teacher_forcing_is_one_graph(family, build, whole):
    transformer = build(**({"patch_nums": SIDES} if family == "var" else {}))
    latents = torch.randn(2, SCHEDULE.total - 1, 8, generator=torch.Generator().manual_seed(0))
    given = arguments(family)
    expected = transformer(latents, *given).logits
    counter = CompileCounterWithBackend("eager")
    if whole:
        transformer = torch.compile(transformer, fullgraph=True, backend=counter)
    else:
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(transformer(latents, *given).logits, expected)
        assert counter.frame_count == 1
