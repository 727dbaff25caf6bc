"""diffusers' attention backends: they reach every attention of both transformers, through every cache."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import attention_backend
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch.overrides import TorchFunctionMode

from hack_pipelines.cache import FullCache, RowwiseCache, SegmentCache, make_cache
from hack_pipelines.cache.attention import attention
from hack_pipelines.cache.recording import RecordingCache
from hack_pipelines.methods import HACK, Geometry, HeadKV, HeatKV
from hack_pipelines.models.layers import ScaleAttnProcessor
from hack_pipelines.models.transformer_infinity import InfinityCondition
from hack_pipelines.schedule import Schedule

from .components import (
    SIDES,
    half_contextual,
    planted_profile,
    tiny_bsq,
    tiny_text_transformer,
    tiny_transformer,
    tiny_vae,
)


SCHEDULE = Schedule.from_sides((*SIDES, 5))
GEOMETRY = Geometry(SCHEDULE, num_layers=3, num_heads=4, head_dim=16)
LABELS = torch.tensor([1, 2])
BUILDERS = {"var": partial(tiny_transformer, patch_nums=(*SIDES, 5)), "infinity": tiny_text_transformer}
# What PyTorch has for CPUs; `flex` is there too, but its first call takes seconds.
BACKENDS = ["_native_math", "_native_flash"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def restore_backend():
    """`set_attention_backend` changes the default of the process, which `reset_attention_backend` leaves."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def full_cache():
    return FullCache(SCHEDULE, 3)


def head_groups():
    method = HACK()
    return make_cache(method.plan(GEOMETRY, 12, half_contextual(3, 4)), method)


def segments():
    method = HeatKV()
    cache = make_cache(method.plan(GEOMETRY, 18, planted_profile(SCHEDULE, 3, 4, 16, seed=0)), method)
    assert isinstance(cache, SegmentCache)
    return cache


def rows():
    method = HeadKV(types="online")
    cache = make_cache(method.plan(GEOMETRY, 12, None), method)
    assert isinstance(cache, RowwiseCache)
    return cache


CACHES = [full_cache, head_groups, segments, rows, lambda: RecordingCache(SCHEDULE, 3)]


def condition():
    generator = torch.Generator().manual_seed(1)
    return InfinityCondition([torch.randn(length, 32, generator=generator) for length in (3, 5)], guided=False)


@torch.no_grad()
def drawn(transformer, cache, text=None):
    """Logits of all scales, of random inputs."""
    generator = torch.Generator().manual_seed(0)
    arguments = (LABELS,) if text is None else (text, SCHEDULE)
    logits = []
    for step, length in enumerate(SCHEDULE.lengths):
        latents = torch.randn(2, length, 8, generator=generator) if step else None
        logits.append(transformer(latents, *arguments, step=step, kv_cache=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def teacher_forced(transformer, text=None):
    latents = torch.randn(2, SCHEDULE.total - 1, 8, generator=torch.Generator().manual_seed(0))
    return transformer(latents, *((LABELS,) if text is None else (text, SCHEDULE))).logits


def text_of(family):
    return condition() if family == "infinity" else None


class KernelCounter(TorchFunctionMode):
    """Counts attention calls by whether they may only use the given kernel."""

    def __init__(self, flag):
        super().__init__()
        self.flag = flag
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append(self.flag())
        return func(*args, **(kwargs or {}))


def only_math() -> bool:
    return torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()


# -- every attention, through every cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("family", BUILDERS)
def test_backend_reaches_every_attention(family, make):
    transformer = BUILDERS[family]()
    expected = drawn(transformer, make(), text_of(family))
    with KernelCounter(only_math) as native:
        drawn(transformer, make(), text_of(family))
    assert native.calls and not any(native.calls)
    transformer.set_attention_backend("_native_math")
    # What other models make the default of the process does not matter to one that was told its own.
    with attention_backend("native"), KernelCounter(only_math) as math:
        torch.testing.assert_close(drawn(transformer, make(), text_of(family)), expected, **CLOSE)
    assert len(math.calls) == len(native.calls) and all(math.calls)
    transformer.reset_attention_backend()
    with attention_backend("native"), KernelCounter(only_math) as reset:
        assert torch.equal(drawn(transformer, make(), text_of(family)), expected)
    assert reset.calls == native.calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [full_cache, head_groups])
@pytest.mark.parametrize("family", BUILDERS)
def test_backends_agree_with_native(family, make, backend):
    transformer = BUILDERS[family]()
    expected = drawn(transformer, make(), text_of(family))
    with attention_backend(backend):
        around = drawn(transformer, make(), text_of(family))
    transformer.set_attention_backend(backend)
    told = drawn(transformer, make(), text_of(family))
    torch.testing.assert_close(told, expected, **CLOSE)
    assert torch.equal(told, around)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("make", [full_cache, head_groups])
@pytest.mark.parametrize("family", BUILDERS)
def test_flex_agrees_with_native(family, make):
    transformer = BUILDERS[family]()
    expected = drawn(transformer, make(), text_of(family)), teacher_forced(transformer, text_of(family))
    transformer.set_attention_backend("flex")
    torch.testing.assert_close(drawn(transformer, make(), text_of(family)), expected[0], **CLOSE)
    torch.testing.assert_close(teacher_forced(transformer, text_of(family)), expected[1], **CLOSE)


def test_native_is_what_the_dispatcher_does():
    query, key, value = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(7, 7).tril().bool()
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    for own, theirs in (None, None), (mask, mask[None, None]):
        actual = attention(query, key, value, 0.5, own)
        assert torch.equal(actual, F.scaled_dot_product_attention(query, key, value, own, scale=0.5))
        assert torch.equal(actual, dispatch_attention_fn(*parts, theirs, scale=0.5).transpose(1, 2))


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILDERS)
def test_teacher_forcing_by_backend(family):
    transformer = BUILDERS[family]()
    expected = teacher_forced(transformer, text_of(family))
    with attention_backend("_native_math"):
        torch.testing.assert_close(teacher_forced(transformer, text_of(family)), expected, **CLOSE)
    with attention_backend("_native_flash"), pytest.raises(ValueError, match="`attn_mask` is not supported"):
        teacher_forced(transformer, text_of(family))


def test_backends_that_know_lengths_only_refuse_masks():
    """They would take a boolean mask, as one of keys that any query may look at."""
    query = torch.randn(2, 4, 7, 16)
    mask = torch.ones(7, 7).tril().bool()
    with pytest.raises(ValueError, match="must be of type bool"):
        attention(query, query, query, 1.0, mask, AttentionBackendName.FLASH_VARLEN)


def test_as_many_rows_as_tokens():
    """A mask of two dimensions would be taken for one of `[rows, keys]`."""
    query, key, value = torch.randn(3, 7, 4, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(7, 7).tril().bool()
    single = attention(query[:1], key[:1], value[:1], 1.0, mask)
    torch.testing.assert_close(attention(query, key, value, 1.0, mask)[:1], single)


# -- diffusers' switches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILDERS)
def test_unknown_and_absent_backends_are_refused(family):
    transformer = BUILDERS[family]()
    with pytest.raises(ValueError, match="must be one of the following"):
        transformer.set_attention_backend("fast")
    for name, package in {"flash_hub": "kernels", "xformers": "xformers"}.items():
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(RuntimeError, match=f"'{name}' is not usable"):
                transformer.set_attention_backend(name)
    assert {processor._attention_backend for processor in transformer.attn_processors.values()} == {None}


@pytest.mark.parametrize(("family", "count"), [("var", 3), ("infinity", 7)])
def test_processors_are_found_and_replaced(family, count):
    class Halved(ScaleAttnProcessor):
        def __call__(self, attn, hidden_states, *arguments):
            return 0.5 * super().__call__(attn, hidden_states, *arguments)

    transformer = BUILDERS[family]()
    processors = transformer.attn_processors
    assert len(processors) == count
    expected = drawn(transformer, full_cache(), text_of(family))
    name = "transformer_blocks.1.attn.processor"
    transformer.set_attn_processor({**processors, name: Halved()})
    assert isinstance(transformer.attn_processors[name], Halved)
    assert not torch.equal(drawn(transformer, full_cache(), text_of(family)), expected)
    transformer.set_attn_processor(dict(processors))
    assert torch.equal(drawn(transformer, full_cache(), text_of(family)), expected)
    with pytest.raises(ValueError, match="number of processors"):
        transformer.set_attn_processor({name: Halved()})


@pytest.mark.parametrize("family", BUILDERS)
def test_projections_are_fused_from_the_start(family):
    transformer = BUILDERS[family]()
    expected = drawn(transformer, full_cache(), text_of(family))
    names = transformer.state_dict().keys()
    for switch in (transformer.fuse_qkv_projections, transformer.unfuse_qkv_projections):
        switch()
        assert transformer.state_dict().keys() == names
        assert all(block.attn.fused_projections for block in transformer.transformer_blocks)
        assert torch.equal(drawn(transformer, full_cache(), text_of(family)), expected)


@pytest.mark.parametrize(("build", "attends"), [(tiny_vae, True), (tiny_bsq, False)])
def test_tokenizers_take_backends(build, attends):
    """Attention in a decoder, if any, is diffusers' own class, which no backend reaches: setting one changes nothing."""
    vae = build()
    latents = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents)
        vae.set_attention_backend("_native_math")
        with KernelCounter(only_math) as counter:
            assert torch.equal(vae.decode(latents), expected)
    assert bool(counter.calls) == attends and not any(counter.calls)


# -- handles -----------------------------------------------------------------------------------------------------------


def test_a_copied_cache_is_another_one():
    transformer, cache = tiny_transformer(), full_cache()
    with torch.no_grad():
        transformer(None, LABELS, step=0, kv_cache=cache)
        copied = copy.deepcopy(cache)
        logits = [transformer(torch.ones(2, 4, 8), LABELS, step=1, kv_cache=each).logits for each in (copied, cache)]
    assert torch.equal(*logits)
    assert copied.get_seq_length() == cache.get_seq_length() == 5
