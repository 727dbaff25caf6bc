"""The class-conditional models: the parts that no fixture covers."""

import math

import pytest
import torch
import torch.nn.functional as F

from hack_pipelines.cache import FullCache
from hack_pipelines.models.layers import ScaleAttention
from hack_pipelines.schedule import Schedule

from .components import SIDES, tiny_transformer, tiny_vae


LABELS = torch.tensor([3, 10])


def teacher_input(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = transformer.schedule.total - transformer.schedule.lengths[0]
    return torch.randn(2, tokens, transformer.config.latent_channels, generator=generator)


@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}, {"patch_nums": (2, 3, 5)}])
def test_steps_with_a_cache_equal_the_masked_pass(options):
    transformer = tiny_transformer(**options)
    latents = teacher_input(transformer)
    lengths = transformer.schedule.lengths
    with torch.no_grad():
        masked = transformer(latents, LABELS).logits
        cache = FullCache(transformer.schedule, 3)
        logits = []
        for step, rows in enumerate((None, *latents.split(lengths[1:], dim=1))):
            logits.append(transformer(rows, LABELS, step=step, kv_cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), masked, atol=1e-4, rtol=1e-4)


def test_masked_pass_hides_later_scales():
    transformer = tiny_transformer()
    latents = teacher_input(transformer)
    changed = latents.clone()
    changed[:, -16:] += 1
    with torch.no_grad():
        first, second = transformer(latents, LABELS).logits, transformer(changed, LABELS).logits
    assert torch.equal(first[:, :14], second[:, :14]) and not torch.equal(first[:, 14:], second[:, 14:])


def test_both_halves_of_guidance_read_the_same_latents():
    transformer = tiny_transformer()
    latents = torch.randn(1, 4, 8)
    with torch.no_grad():
        cache, doubled = FullCache(transformer.schedule, 3), FullCache(transformer.schedule, 3)
        for step, rows in enumerate((None, latents)):
            repeated = None if rows is None else rows.repeat(2, 1, 1)
            ours = transformer(rows, LABELS, step=step, kv_cache=cache).logits
            theirs = transformer(repeated, LABELS, step=step, kv_cache=doubled).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_without_normalisation_has_the_extra_quarter():
    torch.manual_seed(0)
    attention = ScaleAttention(24, heads=3, layer_idx=0, l2_norm=False)
    hidden_states = torch.randn(2, 5, 24)
    query, key, value = attention.to_qkv(hidden_states).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) * 0.25 / math.sqrt(8)).softmax(-1)
    wanted = attention.to_out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(hidden_states), wanted)


def test_temperature_is_clamped_on_the_log():
    attention = ScaleAttention(16, heads=2, layer_idx=0, l2_norm=True)
    hidden_states = torch.randn(1, 4, 16)
    with torch.no_grad():
        attention.log_scale.fill_(math.log(100))
        wanted = attention(hidden_states)
        attention.log_scale.fill_(9.0)
        torch.testing.assert_close(attention(hidden_states), wanted)


def test_step_and_cache_go_together():
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match="go together"):
        transformer(None, LABELS, step=0)
    with pytest.raises(ValueError, match="go together"):
        transformer(teacher_input(transformer), LABELS, kv_cache=FullCache(transformer.schedule, 3))


def test_dtypes_under_autocast():
    """The types that the original has under half-precision autocast."""
    transformer = tiny_transformer(shared_aln=True)
    seen = {}

    def note(name):
        return lambda module, args, output: seen.update({name: (args[0].dtype, output.dtype)})

    block = transformer.transformer_blocks[0]
    block.register_forward_hook(note("block"))
    block.attn.register_forward_hook(note("attention"))
    block.ff.register_forward_hook(note("feed-forward"))
    cache = FullCache(transformer.schedule, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = transformer(None, LABELS, step=0, kv_cache=cache).logits
    half = torch.bfloat16
    assert seen["block"] == (torch.float32, torch.float32)
    assert seen["attention"] == (torch.float32, half) and seen["feed-forward"] == (torch.float32, half)
    assert cache.keys[0].dtype == cache.values[0].dtype == half
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.to(half).float())


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_soft_codes_of_one_hot_weights_are_the_codes():
    vae, schedule = tiny_vae(), Schedule.from_sides(SIDES)
    ids = torch.randint(0, 32, (2, 4), generator=torch.Generator().manual_seed(0))
    latents = torch.zeros(2, 8, 4, 4)
    with torch.no_grad():
        hard, hard_input = vae.accumulate(latents, ids, 1, schedule)
        soft, soft_input = vae.accumulate(latents, F.one_hot(ids, 32).float(), 1, schedule)
    torch.testing.assert_close(hard, soft)
    torch.testing.assert_close(hard_input, soft_input)
    assert hard_input.shape == (2, 9, 8)


def test_tokens_rebuild_the_latent_on_a_wide_grid():
    vae, schedule = tiny_vae(), Schedule(((1, 1), (1, 2), (2, 3), (4, 6)))
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = vae.encode(images)
        tokens = vae.tokenize(features, schedule)
        latents = torch.zeros_like(features)
        errors = [features.square().mean()]
        for step, ids in enumerate(tokens):
            latents, _ = vae.accumulate(latents, ids, step, schedule)
            errors.append((features - latents).square().mean())
        assert vae(images, schedule).sample.shape == images.shape
    assert [ids.shape for ids in tokens] == [(2, 1), (2, 2), (2, 6), (2, 24)]
    assert vae.downscale_factor == 2


def test_features_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\).*\(4, 4\).*2 times"):
        tiny_vae().tokenize(torch.zeros(1, 8, 5, 5), Schedule.from_sides(SIDES))


@pytest.mark.parametrize("sizes", [(), ((0, 1),), ((1, 1), (2, -1))])
def test_schedule_needs_positive_sides(sizes):
    with pytest.raises(ValueError, match="at least"):
        Schedule(sizes)


def test_schedule_numbers_are_those_of_the_specification():
    schedule = Schedule.from_sides((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert schedule.prefixes == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424)
    assert (schedule.total, schedule.cacheable, len(schedule)) == (680, 424, 10)
    assert Schedule.from_sides((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).total == 2240
