"""Text to image: prompts, sizes, independence, precision."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines import HACK, HackVARPipeline, HackVARTextPipeline, Random, ScaleWindow
from hack_pipelines.calibration import calibrate
from hack_pipelines.models.infinity_schedules import (
    PIXEL_CLASSES,
    RATIOS,
    image_size,
    nearest_ratio,
    nearest_schedule,
    reference_size,
    template_schedule,
    template_sizes,
)
from hack_pipelines.models.tiling import decode_in_tiles
from hack_pipelines.models.transformer_infinity import rotary_positions
from hack_pipelines.pipelines import pipeline_hack_var_text
from hack_pipelines.schedule import Schedule

from .components import OriginalCache, planted_profile, seeds, tiny_bsq, tiny_text_pipeline


PROMPTS = ["a lighthouse in a storm", "a storm"]
WIDE = [(1, 1), (2, 3), (2, 4), (4, 6)]


@pytest.fixture
def pipe():
    pipe = tiny_text_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    return pipe


def draw(pipe, prompts=PROMPTS, **arguments):
    count = len(prompts) * arguments.get("num_images_per_prompt", 1)
    options = {"prompt": list(prompts), "generator": seeds(*range(count)), "output_type": "pt", "temperature": 1.0}
    return pipe(**{**options, **arguments})


def same_tokens(first, second) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(first.tokens, second.tokens, strict=True))


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(pipeline_hack_var_text.logger, "warning", messages.append)
    return messages


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_tokens_are_bits(pipe):
    tokens = draw(pipe).tokens
    assert [bits.shape for bits in tokens] == [(2, 1, 8), (2, 4, 8), (2, 9, 8), (2, 16, 8)]
    assert all(bits.dtype == torch.uint8 and bits.max() <= 1 for bits in tokens)


# -- text --------------------------------------------------------------------------------------------------------------


def test_embeds_stand_for_prompts(pipe):
    condition = pipe.encode_prompt(PROMPTS, ["a lighthouse", "a storm in a storm"])
    assert [len(rows) for rows in condition.prompt_embeds] == [6, 3]
    by_text = draw(pipe, negative_prompt=["a lighthouse", "a storm in a storm"])
    by_embeds = draw(
        pipe,
        prompt=None,
        prompt_embeds=list(condition.prompt_embeds),
        negative_prompt_embeds=list(condition.negative_prompt_embeds),
    )
    assert same_tokens(by_text, by_embeds)
    assert not same_tokens(by_text, draw(pipe))


@pytest.mark.parametrize("negative", [None, "a lighthouse", ["a lighthouse in a lighthouse", ""]])
@pytest.mark.parametrize("budget", [None, 12])
def test_prompts_of_different_lengths_do_not_touch_each_other(pipe, negative, budget):
    together = draw(pipe, negative_prompt=negative, kv_budget=budget)
    for index, prompt in enumerate(PROMPTS):
        own = negative if not isinstance(negative, list) else [negative[index]]
        alone = draw(pipe, [prompt], negative_prompt=own, generator=seeds(index), kv_budget=budget)
        for bits, single in zip(together.tokens, alone.tokens):
            assert torch.equal(bits[index], single[0])


def test_an_empty_negative_prompt_is_none(pipe):
    assert same_tokens(draw(pipe, negative_prompt=""), draw(pipe))


def test_unconditional_features_are_as_long_as_the_prompt(pipe):
    condition = pipe.encode_prompt(PROMPTS)
    assert condition.text_rows.lengths == (6, 3, 6, 3)
    packed = condition.packed(pipe.transformer.uncond_embeds)
    assert torch.equal(packed[9:15], pipe.transformer.uncond_embeds[:6])
    assert torch.equal(packed[15:], pipe.transformer.uncond_embeds[:3])


def test_text_is_projected_once_a_call(pipe):
    calls = []
    for block in pipe.transformer.transformer_blocks:
        block.cross_attn.to_kv.register_forward_hook(lambda *args: calls.append("block"))
    pipe.transformer.text_pooling.to_kv.register_forward_hook(lambda *args: calls.append("pooling"))
    draw(pipe)
    assert sorted(calls) == ["block"] * 3 + ["pooling"]


def test_long_prompts_are_cut_and_said_so(pipe, warnings):
    draw(pipe, ["a storm in a storm in a lighthouse in a storm in a lighthouse"])
    assert warnings == ["A prompt has 15 tokens but the model reads 12. This part of it was cut: 'in a lighthouse'"]
    warnings.clear()
    draw(pipe)
    assert not warnings


def test_a_pipeline_without_text_encoder_takes_embeds_and_gets_a_profile(warnings):
    pipe = tiny_text_pipeline(with_text_encoder=False)
    embeds = [torch.randn(5, 32, generator=torch.Generator().manual_seed(0))]
    out = pipe(prompt_embeds=embeds, kv_budget=0.5, generator=seeds(0), output_type="latent")
    assert out.cache_report.peak_tokens <= 15
    assert pipe._fallback_profile is not None and pipe._fallback_profile.inputs == [""]
    with pytest.raises(ValueError, match="no text encoder: give `prompt_embeds`"):
        pipe("a storm")


def test_a_profile_on_the_spot_takes_the_smallest_size():
    """A megapixel without compression would take the memory that the budget is to save."""
    pipe = tiny_text_pipeline(template_schedule(1.25, "1M").sizes, with_text_encoder=False, num_layers=1)
    pipe.prepare_cache(0.1)
    assert pipe._fallback_profile.schedule == template_schedule(1.25, "0.06M")
    assert len(pipe._fallback_profile.sampling["guidance"]) == 7
    assert tiny_text_pipeline().fallback_schedule is None


# -- sizes -------------------------------------------------------------------------------------------------------------

# Rows of the published table: tokens and image sizes for 0.06M, 0.25M, 0.60M, 1M.
TABLE = {
    1.0: ((521, 2521, 6425, 10521), ((256, 256), (512, 512), (768, 768), (1024, 1024))),
    1.25: ((614, 2814, 6854, 10774), ((320, 256), (560, 448), (880, 704), (1120, 896))),
    1.333: ((665, 2657, 7085, 10973), ((320, 240), (576, 432), (960, 720), (1152, 864))),
    1.5: ((533, 2759, 6941, 10997), ((336, 224), (624, 416), (1008, 672), (1248, 832))),
    1.75: ((472, 2628, 7220, 11252), ((336, 192), (672, 384), (1120, 640), (1344, 768))),
    2.0: ((451, 2681, 7219, 11269), ((352, 176), (736, 368), (1184, 592), (1440, 720))),
    2.5: ((555, 2555, 6805, 10805), ((400, 160), (800, 320), (1280, 512), (1600, 640))),
    3.0: ((509, 2588, 7016, 11123), ((432, 144), (864, 288), (1440, 480), (1776, 592))),
}
WIDE_OF = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}


@pytest.mark.parametrize("ratio", TABLE)
def test_templates_are_those_of_the_table(ratio):
    totals, sizes = TABLE[ratio]
    for name, total, size in zip(PIXEL_CLASSES, totals, sizes):
        tall = template_schedule(ratio, name)
        assert tall.total == total and image_size(tall) == size
        assert reference_size(tall) == template_sizes(ratio)[-1]
        if ratio in WIDE_OF:
            wide = template_schedule(WIDE_OF[ratio], name)
            assert wide.sizes == tuple((width, height) for height, width in tall.sizes)
            assert reference_size(wide) == template_sizes(WIDE_OF[ratio])[-1]
            assert nearest_schedule(*image_size(wide)) == wide
        assert nearest_schedule(*size) == tall


@given(st.integers(16, 4096), st.integers(16, 4096))
@settings(max_examples=50, deadline=None)
def test_the_nearest_template_is_the_nearest(height, width):
    best = nearest_ratio(height, width)
    assert all(abs(height / width - best) <= abs(height / width - ratio) for ratio in RATIOS)
    assert nearest_schedule(height, width).sizes == template_sizes(best)[: len(nearest_schedule(height, width))]


@pytest.mark.parametrize("ratio", [1.25, 2.0, 0.333])
def test_positions_round_half_to_even(ratio):
    """Against the formula written out, on schedules where some coordinates lie at exactly one half."""
    schedule, halves = template_schedule(ratio, "1M"), 0
    high, wide = template_sizes(ratio)[-1]
    cos, _ = rotary_positions(schedule, range(len(schedule)), 8, torch.device("cpu"))
    for (height, width), part in zip(schedule.sizes, cos.split(schedule.lengths)):
        for y, x in {(0, 0), (height - 1, width - 1), (height // 2, width // 2), (1 % height, 1 % width)}:
            exact_y, exact_x = np.float32(y) * np.float32(high / height), np.float32(x) * np.float32(wide / width)
            halves += exact_y % 1 == 0.5 or exact_x % 1 == 0.5
            angles = [np.rint(exact_y), np.rint(exact_y) * 0.01, np.rint(exact_x), np.rint(exact_x) * 0.01]
            np.testing.assert_allclose(part[y * width + x].numpy(), np.cos(angles), atol=1e-5)
    assert halves


def test_native_size_needs_no_size(pipe, warnings):
    assert same_tokens(draw(pipe), draw(pipe, height=8, width=8))
    assert not warnings
    draw(pipe, height=16)
    assert "16 x 8 (height x width) is not a size that this model draws: taking the nearest, 8 x 8" in warnings[0]


def test_a_released_size_snaps_to_its_templates(warnings):
    native = [list(size) for size in template_schedule(1.0, "0.06M").sizes]
    pipe = tiny_text_pipeline(native)
    # A tiny tokenizer with stride 2 instead of 16.
    assert pipe.resolve_schedule() == template_schedule(1.0, "0.06M")
    assert pipe.resolve_schedule(320, 256) == template_schedule(1.25, "0.06M")
    assert pipe.resolve_schedule(1000, 1000) == template_schedule(1.0, "1M")
    assert "taking the nearest" in warnings[-1]


@pytest.mark.parametrize("budget", [None, 0.4])
def test_schedules_that_are_not_square(pipe, budget):
    out = draw(pipe, scale_schedule=WIDE, kv_budget=budget)
    assert out.images.shape == (2, 3, 8, 12)
    assert [bits.shape[1] for bits in out.tokens] == [1, 6, 8, 24]
    if budget:
        assert out.cache_report.peak_tokens <= int(budget * 39)
    transposed = draw(pipe, scale_schedule=[(width, height) for height, width in WIDE])
    assert transposed.images.shape == (2, 3, 12, 8)


def test_patchified_pair_draws_at_twice_the_grid():
    vae = tiny_bsq(latent_channels=2, patchify=True)
    pipe = tiny_text_pipeline()
    pipe.register_modules(vae=vae)
    out = draw(pipe)
    assert out.images.shape == (2, 3, 16, 16) and out.tokens[-1].shape == (2, 16, 8)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = vae.encode(images)
        tokens = vae.tokenize(features, pipe.schedule)
        assert [bits.shape for bits in tokens] == [(1, n, 8) for n in (1, 4, 9, 16)]
        first = vae.unpack(tokens[0], (1, 1))
        pooled = torch.nn.functional.interpolate(features, size=(2, 2), mode="area")
        assert torch.equal(first.bool(), pooled > 0)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_numbers_hold_for_all_scales_and_lists_are_taken_as_they_are(pipe):
    assert pipe.prepare_settings().guidance == (3.0,) * 4
    assert pipe.prepare_settings().temperature == (0.5,) * 4
    assert pipe.prepare_settings(guidance_scale=[1, 2, 3, 1]).guidance == (1, 2, 3, 1)
    assert not pipe.prepare_settings(guidance_scale=1).guided
    assert same_tokens(draw(pipe, guidance_scale=2.0), draw(pipe, guidance_scale=[2.0] * 4))
    assert not same_tokens(draw(pipe, guidance_scale=2.0), draw(pipe, guidance_scale=[2.0, 1.0, 2.0, 1.0]))


def test_model_defaults_are_stored(tmp_path):
    pipe = tiny_text_pipeline()
    pipe.register_to_config(sampling={"guidance_scale": 4.0, "temperature": 0.9})
    pipe.save_pretrained(tmp_path)
    loaded = HackVARPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, HackVARTextPipeline)
    assert loaded.prepare_settings() == pipe.prepare_settings()
    assert (loaded.prepare_settings().guidance[0], loaded.prepare_settings().top_p[0]) == (4.0, 0.97)
    assert loaded.schedule == Schedule.from_sides((1, 2, 3, 4))


def test_greedy_needs_no_generator(pipe):
    assert same_tokens(draw(pipe, top_k=1, generator=None), draw(pipe, top_k=1, generator=seeds(7, 8)))
    assert same_tokens(draw(pipe, top_k=0), draw(pipe, top_k=900))


def test_one_generator_draws_for_the_batch_as_the_original_does(pipe):
    one = draw(pipe, PROMPTS[:1], generator=torch.Generator().manual_seed(5))
    assert same_tokens(one, draw(pipe, PROMPTS[:1], generator=seeds(5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": [torch.zeros(2, 32)]}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": []}, "must be a text or a list of at least one text but is []"),
        ({"prompt": [3]}, "must be a text or a list of at least one text"),
        ({"negative_prompt": ["a"] * 3}, "has 3 entries for 2 prompts"),
        (
            {"prompt": None, "prompt_embeds": [torch.zeros(2, 31)], "generator": None},
            r"[length, 32] but holds [2, 31]",
        ),
        (
            {"prompt": None, "prompt_embeds": [torch.zeros(13, 32)], "generator": None},
            "1 to 12 text tokens each but has 13",
        ),
        ({"prompt": None, "prompt_embeds": [torch.zeros(2, 32).long()], "generator": None}, "floating tensors"),
        ({"prompt": None, "prompt_embeds": [], "generator": None}, "must be a list of tensors"),
        ({"height": 0}, "`height` must be a positive whole number of pixels but is 0"),
        ({"width": 8.5}, "`width` must be a positive whole number"),
        ({"height": 8, "scale_schedule": WIDE}, "either `scale_schedule` or `height` and `width`"),
        ({"scale_schedule": [(2, 2)]}, "starts with (1, 1)"),
        ({"scale_schedule": [(1, 1)] * 16}, "1 to 15 pairs"),
        ({"scale_schedule": [(1, 1, 1)]}, "pairs (height, width)"),
        ({"guidance_scale": -1}, "`guidance_scale` must be a number in [0, 1000] but is -1"),
        ({"guidance_scale": [1, 2]}, "a list of 4"),
        ({"temperature": 0}, "`temperature` must be a number in (0, 1000]"),
        ({"top_p": 0.0}, "`top_p` must be a number in (0, 1]"),
        ({"top_k": 1.5}, "`top_k` must be a whole number"),
        ({"guidance_layers": [1]}, "`guidance_layers` must list whole numbers from -2 to 0"),
        ({"guidance_layers": []}, "`guidance_layers` must list"),
        ({"generator": seeds(1)}, "`generator` has 1 entries but 2 images"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"kv_budget": 3}, "needs at least"),
        ({"kv_budget": float("nan")}, "must be a fraction"),
        ({"method": "magic"}, "`method` must be one of"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipe, arguments, message, monkeypatch):
    monkeypatch.setattr(pipe, "predict", lambda *args: pytest.fail("work has started"))
    if isinstance(arguments.get("prompt", ""), (list, type(None))) and len(arguments) == 1:
        arguments = {**arguments, "generator": None}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        draw(pipe, **arguments)


# -- cache -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [HACK(), HACK(protocol="post"), Random(), ScaleWindow()])
def test_a_budget_holds_and_its_bytes_are_measured(pipe, method):
    full = draw(pipe)
    for budget in (9, 14, 20, 30):
        out = draw(pipe, kv_budget=budget, method=method)
        report = out.cache_report
        assert report.peak_tokens <= budget
        assert report.bytes_allocated_peak <= budget * 2 * 3 * 4 * 16 * 2 * 4
        if budget == 30:
            assert same_tokens(out, full)


def test_a_profile_serves_every_schedule_of_its_model(pipe):
    profile = calibrate(pipe, 2, inputs=PROMPTS, progress=False)
    pipe.load_head_profile(profile)
    assert profile.family == "infinity" and profile.inputs == PROMPTS
    assert draw(pipe, scale_schedule=WIDE, kv_budget=0.5).cache_report.peak_tokens <= 19


def beside_the_original(pipe, prompts, dtype) -> tuple[int, int]:
    """Bytes an image of the original's cache and of ours, measured from storages, after both have drawn the same bits."""
    condition, geometry = pipe.encode_prompt(prompts), pipe.geometry()
    cache = OriginalCache(geometry.schedule, geometry.num_layers, guided=True)
    numbers = range(len(prompts))
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        out = draw(pipe, prompts, prompt=None, prompt_embeds=list(condition.prompt_embeds), output_type="latent")
        _, tokens = pipe.draw_scales(condition, cache, pipe.prepare_settings(temperature=1.0), seeds(*numbers))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.tokens, tokens))
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*cache.keys, *cache.values)) // len(prompts)
    assert out.cache_report.bytes_full == held
    return held, out.cache_report.bytes_allocated_peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_what_attention_reads_is_exact_under_autocast(dtype):
    held, ours = beside_the_original(tiny_text_pipeline(), PROMPTS, dtype)
    assert held == 30 * 2 * 3 * 4 * 16 * (4 + 2)
    assert ours == 14 * 2 * 3 * 4 * 16 * 4


@pytest.mark.slow
def test_a_megapixel_takes_two_and_a_half_times_less_without_losing_a_bit():
    schedule = template_schedule(1.0, "1M").sizes
    pipe = tiny_text_pipeline(schedule, num_layers=1, num_attention_heads=1, ff_hidden_dim=16, num_pooling_heads=1)
    held, ours = beside_the_original(pipe, PROMPTS[:1], torch.bfloat16)
    assert held == 10_521 * 2 * 16 * 6 and ours == 6_425 * 2 * 16 * 4
    assert held / ours > 2.45


# -- precision, loading ------------------------------------------------------------------------------------------------


def test_half_precision_keeps_what_the_original_keeps(tmp_path):
    tiny_text_pipeline().save_pretrained(tmp_path)
    pipe = HackVARPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = ("uncond_embeds", "text_norm", "pos_start", "level_embed", "shared_modulation", "head_modulation", "head")
    for name, parameter in pipe.transformer.named_parameters():
        wanted = torch.float32 if name.split(".")[0] in kept else torch.bfloat16
        assert parameter.dtype == wanted, name
    assert pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float16
    assert pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert pipe.vae.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    out = draw(pipe, output_type="latent")
    assert out.images.dtype == torch.float32
    assert out.cache_report.bytes_allocated_peak == 14 * 2 * 3 * 4 * 16 * 4
    explicit = HackVARPipeline.from_pretrained(
        tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    assert explicit.text_encoder.dtype == torch.float32


def test_float32_is_the_default_whatever_the_files_hold(tmp_path):
    pipe = tiny_text_pipeline()
    pipe.transformer.half(), pipe.text_encoder.half(), pipe.vae.half()
    pipe.save_pretrained(tmp_path)
    loaded = HackVARPipeline.from_pretrained(tmp_path)
    for model in (loaded.transformer, loaded.text_encoder, loaded.vae):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bfloat16_weights_compute_what_autocast_computes(tmp_path):
    """Weights rounded beforehand give the original's half precision without autocast: same dtypes, same roundings."""
    tiny_text_pipeline().save_pretrained(tmp_path)
    half = HackVARPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rounded = HackVARPipeline.from_pretrained(tmp_path)
    rounded.transformer.load_state_dict({k: v.float() for k, v in half.transformer.state_dict().items()})
    embeds = [torch.randn(5, 32, generator=torch.Generator().manual_seed(0))]
    options = {"prompt_embeds": embeds, "generator": seeds(0), "output_type": "latent", "temperature": 1.0}
    ours = half(**options)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = rounded(**{**options, "generator": seeds(0)})
    assert same_tokens(ours, theirs)


# -- decoder -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 12), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_tiles_of_a_local_decoder_are_seamless(height, width, tile, overlap):
    """A decoder that looks at one position only must give the same in any tiles."""

    def decode(latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    latents = torch.rand(2, 4, height, width)
    tiled = decode_in_tiles(decode, latents, 2, tile, min(overlap, tile - 1))
    torch.testing.assert_close(tiled, decode(latents), atol=1e-6, rtol=1e-5)
