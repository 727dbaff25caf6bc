"""Classes, sampling, profiles, precision, and what a class-conditional pipeline refuses."""

import math
import re

import pytest
import torch

from hack_pipelines import HACK, HackVARClassPipeline, HackVARPipeline, Random
from hack_pipelines.pipelines.sampling import filter_logits

from .components import planted_profile, seeds, tiny_pipeline, tiny_transformer, tiny_vae


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    return pipe


def draw(pipe, labels=(1, 2), **arguments):
    options = {"class_labels": list(labels), "generator": seeds(*range(len(labels))), "output_type": "pt"}
    return pipe(**{**options, **arguments})


def same_tokens(first, second) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(first.tokens, second.tokens, strict=True))


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_labels_by_name_id_and_tensor(pipe):
    by_id = draw(pipe, (0, 1))
    assert same_tokens(by_id, draw(pipe, ("Tabby Cat", "golden_retriever")))
    assert same_tokens(by_id, draw(pipe, ("tabby, tabby cat", 1)))
    assert same_tokens(by_id, pipe(class_labels=torch.tensor([0, 1]), generator=seeds(0, 1), output_type="pt"))
    assert pipe.get_label_ids("beacon") == [4]


def test_null_and_random_labels(pipe):
    assert pipe.encode_class_labels(-1).tolist() == [10]
    drawn = pipe.encode_class_labels(None, 50, torch.Generator().manual_seed(0))
    assert len(drawn) == 50 and len(set(drawn.tolist())) > 5
    assert pipe(generator=torch.Generator().manual_seed(0), output_type="pt").images.shape[0] == 1


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_guidance_is_ramped_and_lists_are_taken_as_they_are(pipe):
    assert pipe.prepare_settings(guidance_scale=4.0).guidance == (1.0, 2.0, 3.0, 4.0)
    assert pipe.prepare_settings(guidance_scale=[1, 3, 2, 1]).guidance == (1, 3, 2, 1)
    assert not pipe.prepare_settings(guidance_scale=1.0).guided
    ramped = draw(pipe, guidance_scale=4.0)
    assert same_tokens(ramped, draw(pipe, guidance_scale=[1.0, 2.0, 3.0, 4.0]))
    assert not same_tokens(ramped, draw(pipe, guidance_scale=1.0))


def test_model_defaults_can_be_stored(tmp_path):
    pipe = HackVARClassPipeline(
        tiny_transformer(), tiny_vae(), sampling={"guidance_scale": 1.0, "top_k": 3, "top_p": 0.5}
    )
    settings = pipe.prepare_settings()
    assert (settings.guidance[-1], settings.top_k[0], settings.top_p[0]) == (1.0, 3, 0.5)
    assert tiny_pipeline().prepare_settings().guidance[-1] == 2.5
    pipe.save_pretrained(tmp_path)
    assert HackVARPipeline.from_pretrained(tmp_path).prepare_settings() == settings


def test_greedy_needs_no_generator(pipe):
    assert same_tokens(draw(pipe, top_k=1, generator=None), draw(pipe, top_k=1, generator=seeds(7, 8)))


def test_temperature_sharpens(pipe):
    cold = draw(pipe, temperature=1e-4, top_k=0, top_p=1.0)
    assert same_tokens(cold, draw(pipe, top_k=1))
    assert not same_tokens(cold, draw(pipe, temperature=[5.0] * 4, top_k=0, top_p=1.0))


def test_filter_leaves_its_input_alone():
    logits = torch.randn(2, 3, 10)
    before = logits.clone()
    filter_logits(logits, 2, 0.5)
    assert torch.equal(logits, before)


def test_smooth_pictures_differ_and_are_reproducible(pipe):
    smooth = draw(pipe, more_smooth=True)
    assert torch.equal(smooth.images, draw(pipe, more_smooth=True).images)
    assert not torch.equal(smooth.images, draw(pipe).images)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_labels": 10}, "ids from 0 to 9.*10"),
        ({"class_labels": -2}, "-2"),
        ({"class_labels": True}, "True"),
        ({"class_labels": [1, 2.5]}, "2.5"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": "golden retreiver"}, "'golden retreiver'.*'golden retriever'"),
        ({"class_labels": "crane"}, "2 .*3 .*Give the id"),
        ({"class_labels": "zzzz"}, "no class named 'zzzz'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt"),
        ({"generator": seeds(0, 1, 2)}, "3 entries but 2 images"),
        ({"generator": [None, None]}, "None"),
        ({"generator": 42}, "42"),
        ({"output_type": "jpeg"}, "jpeg"),
        ({"guidance_scale": math.nan}, "guidance_scale.*nan"),
        ({"guidance_scale": [1.0, 2.0]}, "list of 4.*has 2"),
        ({"guidance_scale": "3"}, "guidance_scale"),
        ({"temperature": 0}, "temperature"),
        ({"top_k": 33}, "top_k.*32.*33"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k.*whole"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"callback_on_step_end_tensor_inputs": ["logits"]}, "logits"),
        ({"kv_budget": 0.0}, "kv_budget"),
        ({"kv_budget": math.nan}, "kv_budget.*nan"),
        ({"kv_budget": "64 parsecs"}, "64 parsecs"),
        ({"method": "h3o"}, "'h3o'"),
        ({"kv_budget": 0.5, "method": "h3o"}, "'h3o'"),
        ({"attention_budget": 0.3, "method": "hack"}, "attention_budget.*'hack'"),
        ({"kv_budget": 0.5, "attention_budget": 1}, "attention_budget=1.*at least 5"),
        ({"kv_dtype": "int3"}, "kv_dtype.*int3"),
    ],
)
def test_bad_input_is_answered_before_the_first_step(pipe, arguments, match, monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("a step was started")

    monkeypatch.setattr(pipe.transformer, "forward", unreachable)
    if "class_labels" in arguments:
        arguments = {"generator": None, **arguments}
    with pytest.raises((ValueError, TypeError), match=re.compile(match, re.DOTALL)):
        draw(pipe, **arguments)


@pytest.mark.parametrize("budget", [1, 3, 0.05, "100B"])
def test_smallest_budget_is_named_and_works(pipe, budget):
    with pytest.raises(ValueError, match="needs at least") as error:
        draw(pipe, kv_budget=budget)
    tokens, fraction, size = re.search(
        r"to (\d+) \(tokens\), ([\d.]+) \(of 30\) or \"(\d+B)\"", str(error.value)
    ).groups()
    for smallest in (int(tokens), float(fraction), size):
        assert draw(pipe, kv_budget=smallest).cache_report.peak_tokens <= int(tokens)
    with pytest.raises(ValueError, match="needs at least"):
        draw(pipe, kv_budget=int(tokens) - 1)


def test_byte_budgets_are_kept(pipe):
    for size, method in ((20_000, HACK()), (30_000, Random())):
        report = draw(pipe, kv_budget=f"{size}B", method=method).cache_report
        assert size * 0.8 < report.bytes_allocated_peak <= size


def test_a_profile_of_another_model_is_refused():
    from hack_pipelines.calibration.calibrate import calibrate

    profile = calibrate(tiny_pipeline(), num_samples=1, progress=False)
    other = tiny_pipeline(num_layers=2)
    with pytest.raises(ValueError, match="layers"):
        other.load_head_profile(profile)
    assert other.head_profile is None


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_profile_gets_one_that_no_call_can_change(caplog):
    first = tiny_pipeline()
    expected = draw(first, kv_budget=12)
    other = tiny_pipeline()
    draw(other, (5, 6), kv_budget=14)
    assert same_tokens(draw(other, kv_budget=12), expected)


def test_profile_travels_with_the_pipeline(tmp_path):
    from hack_pipelines.calibration.calibrate import calibrate

    pipe = tiny_pipeline()
    pipe.load_head_profile(calibrate(pipe, num_samples=2, progress=False))
    pipe.save_pretrained(tmp_path)
    loaded = HackVARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.head_profile is not None
    assert same_tokens(draw(loaded, kv_budget=12), draw(pipe, kv_budget=12))


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(pipe, tmp_path, dtype):
    pipe.head_profile = None
    pipe.save_pretrained(tmp_path)
    loaded = HackVARPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    kept = {"class_embed", "pos_start", "pos_embed", "level_embed", "log_scale", "quantizer"}
    for model in (loaded.transformer, loaded.vae):
        for name, parameter in model.named_parameters():
            wanted = torch.float32 if kept & set(name.split(".")) else dtype
            assert parameter.dtype == wanted, name
    out = draw(loaded, kv_budget=12)
    assert out.images.isfinite().all()
    assert out.cache_report.bytes_full == 30 * 2 * 3 * 4 * 16 * 6
    labels, latents = torch.tensor([1, 2]), torch.randn(2, 29, 8)
    with torch.no_grad():
        half = loaded.transformer(latents, labels).logits
        full = pipe.transformer(latents, labels).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.15 * full.std().item(), rtol=0)


def test_dtype_by_its_former_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = HackVARPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torch.float16 .*`torch_dtype`.* torch.bfloat16"):
        HackVARPipeline.from_pretrained(tmp_path, dtype=torch.float16, torch_dtype=torch.bfloat16)
