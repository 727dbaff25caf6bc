"""Pictures from tiny next-token models with their processors, opened from folders."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from hack_pipelines.integrations.next_token import (
    CodeSampling,
    Emu3Pipeline,
    NextTokenPipeline,
    draw_codes,
    to_images,
)

from ..components import seeds
from .folders import CLASSES, save_code_model, save_emu3, save_janus
from .models import SIDE


TOTAL = SIDE * SIDE
EMU3_GRID = (6, 8)
SAVE = {"janus": save_janus, "emu3": save_emu3, "llama": save_code_model}
INPUTS = {"janus": ["a cat", "a red house dog"], "emu3": ["a cat", "a red house dog"], "llama": ["puppy", -1]}
FORM = {"janus": {}, "emu3": {"grid": EMU3_GRID}, "llama": {}}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """The pipeline of each kind of model, opened once."""
    opened = {}

    def open_one(name):
        if name not in opened:
            folder = tmp_path_factory.mktemp(name) / "model"
            SAVE[name](folder)
            opened[name] = NextTokenPipeline.from_pretrained(folder)
            opened[name].set_progress_bar_config(disable=True)
        return opened[name]

    return open_one


def drawn(pipe, name, rows=slice(None), **kwargs):
    generator = seeds(*range(2)[rows])
    return pipe(INPUTS[name][rows], generator=generator, **FORM[name], **kwargs)


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_budget", [None, 24])
@pytest.mark.parametrize("name", SAVE)
def test_pictures_depend_on_their_own_seed_only(name, kv_budget, pipes):
    pipe = pipes(name)
    torch.manual_seed(1)
    together = drawn(pipe, name, kv_budget=kv_budget)
    for index in range(2):
        alone = drawn(pipe, name, slice(index, index + 1), kv_budget=kv_budget)
        assert torch.equal(alone.tokens[0], together.tokens[index])
        assert np.array_equal(alone.images[0], together.images[index])
    assert not torch.equal(*together.tokens)
    held = together.cache_report.peak_tokens
    assert held == 24 if kv_budget else held > 40
    other = together.unconditional_cache_report
    assert (other is not None and other.peak_tokens == held) if name == "emu3" else other is None


def test_janus_draws_what_its_own_generate_does(pipes):
    pipe = pipes("janus")
    inputs = pipe._encode(INPUTS["janus"])
    # The shorter prompt is padded on the left, where the unconditional rows are not told from it.
    assert inputs["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    expected = pipe.model.generate(
        **inputs, generation_mode="image", guidance_scale=3.0, do_sample=False, past_key_values=DynamicCache()
    )
    assert torch.equal(drawn(pipe, "janus", guidance_scale=3.0, top_k=1).tokens, expected)


def test_janus_without_guidance_is_the_conditional_rows(pipes):
    pipe = pipes("janus")
    plain = drawn(pipe, "janus", guidance_scale=1, top_k=1).tokens
    almost = drawn(pipe, "janus", guidance_scale=1 + 1e-6, top_k=1).tokens
    assert torch.equal(plain, almost)
    assert not torch.equal(plain, drawn(pipe, "janus", guidance_scale=3.0, top_k=1).tokens)


def test_emu3_draws_what_its_own_generate_does(pipes):
    pipe: Emu3Pipeline = pipes("emu3")
    rows, columns = EMU3_GRID
    line = columns + 1
    inputs, negative = (pipe._encode(texts, rows, columns) for texts in (["a cat"], ["blurry"]))
    start = inputs["input_ids"].shape[1]
    vocabulary = pipe.model.model.vocabulary_mapping

    def allowed(row, sequence):
        column = (len(sequence) - start) % line
        return [vocabulary.eol_token_id] if column == columns else vocabulary.image_tokens

    expected = pipe.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=rows * line,
        prefix_allowed_tokens_fn=allowed,
        guidance_scale=3.0,
        negative_prompt_ids=negative["input_ids"],
        past_key_values=DynamicCache(),
    )[:, start:]
    options = {"grid": EMU3_GRID, "guidance_scale": 3.0, "top_k": 1}
    output = pipe("a cat", negative_prompt="blurry", **options)
    assert torch.equal(output.tokens, expected)
    assert (output.tokens[:, columns::line] == vocabulary.eol_token_id).all()
    assert output.images[0].size == (columns, rows)
    unguided = pipe("a cat", **{**options, "guidance_scale": 1})
    assert unguided.unconditional_cache_report is None and not torch.equal(unguided.tokens, expected)


def test_codes_of_classes_are_those_of_a_dynamic_cache(pipes):
    pipe = pipes("llama")
    sampling = pipe.default_sampling
    expected = draw_codes(pipe.model, torch.tensor([1, 3]), TOTAL, sampling, DynamicCache(), seeds(0, 1))
    assert torch.equal(drawn(pipe, "llama").tokens, expected)
    assert not torch.equal(drawn(pipe, "llama", kv_budget=24).tokens, expected)
    assert (
        drawn(pipe, "llama", guidance_scale=1).cache_report.bytes_full * 2
        == drawn(pipe, "llama").cache_report.bytes_full
    )


def test_method_and_budget_reach_the_cache(pipes):
    pipe = pipes("llama")
    by_method = [drawn(pipe, "llama", kv_budget=0.4, method=method) for method in ("headkv_ar", "linear_ar")]
    assert not torch.equal(*(output.tokens for output in by_method))
    with pytest.raises(ValueError, match="`method` must be one of 'h2o', 'headkv_ar'"):
        drawn(pipe, "llama", method="hack++")
    with pytest.raises(ValueError, match="15"):
        drawn(pipe, "llama", kv_budget=15)


def test_grid_of_a_size(pipes):
    pipe: Emu3Pipeline = pipes("emu3")
    assert pipe.grid == (90, 90)
    assert pipe.resolve_grid(48) == (6, 6) and pipe.resolve_grid(width=64) == (8, 8)
    assert pipe.resolve_grid(48, 67) == (6, 8)
    with pytest.raises(ValueError, match="`height` must be a whole number"):
        pipe.resolve_grid(0.5)


def test_pixels_are_what_the_processor_makes_of_them(pipes):
    pipe = pipes("emu3")
    pixels = torch.rand(2, 3, 4, 6) * 2 - 1
    expected = pipe.processor.postprocess(list(pixels.numpy()), input_data_format="channels_first")["pixel_values"]
    for image, other in zip(to_images(pixels, pipe.processor), expected):
        # The processor cuts off what is behind the point.
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_codes_follow_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = CodeSampling(temperature=2.0, top_k=3)
    generator = torch.Generator().manual_seed(0)
    codes = sampling.draw(logits.expand(20000, -1), generator=generator)
    expected = (logits[0, :3] / 2).softmax(-1)
    torch.testing.assert_close(codes.bincount(minlength=4)[:3] / 20000, expected, atol=0.015, rtol=0)
    assert codes.max() == 2


@pytest.mark.parametrize(
    ("name", "value"), [("guidance_scale", -1), ("temperature", 0), ("top_k", 1.5), ("top_p", 0), ("top_p", 2)]
)
def test_sampling_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* but is {value}"):
        CodeSampling(**{name: value})


# -- what is opened ----------------------------------------------------------------------------------------------------


def test_other_models_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    with pytest.raises(
        ValueError, match="'chameleon', but .* 'janus', 'emu3', 'llama' only.*HeadKVCache.*chameleon_loop"
    ):
        NextTokenPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="diffusers layout: .*HackVARPipeline"):
        NextTokenPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        NextTokenPipeline.from_pretrained(tmp_path.parent)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    save_code_model(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights: model.norm.weight"):
        NextTokenPipeline.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        NextTokenPipeline.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        NextTokenPipeline.from_pretrained(tmp_path)


def test_llama_without_codes_is_refused(tmp_path):
    save_code_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_codes"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`num_codes`"):
        NextTokenPipeline.from_pretrained(tmp_path)


def test_dtype_of_the_weights(tmp_path):
    pipe = NextTokenPipeline.from_pretrained(save_code_model(tmp_path), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe([0], generator=seeds(0), kv_budget=24).images[0].size == (16, 16)


def test_classes_by_name(pipes):
    pipe = pipes("llama")
    assert pipe.encode_class_labels(["dog", "PUPPY", 0, -1]).tolist() == [1, 1, 0, len(CLASSES)]
    with pytest.raises(ValueError, match="no class named 'cart'.* 'car'"):
        pipe.encode_class_labels(["cart"])
