"""What diffusers' own testers ask of a pipeline, of both; docs/diffusers.md has the list."""

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import apply_group_offloading

from hack_pipelines import HackVARClassPipeline, HackVARPipeline, HackVARTextPipeline
from hack_pipelines.cache import SegmentCache
from hack_pipelines.models.transformer_infinity import InfinityCondition

from ..components import planted_profile, seeds, tiny_pipeline, tiny_text_pipeline
from .devices import SECOND, THIRD, no_data, place, spread, units


CPU = torch.device("cpu")
COMMON_ARGUMENTS = {
    "num_images_per_prompt",
    "guidance_scale",
    "generator",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "kv_budget",
}


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline: how it is built at a tiny size, and what it is called with."""

    pipeline_class: type[HackVARPipeline]
    build: Callable[..., Any]
    condition: str
    conditions: tuple[Any, ...]
    index: dict[str, list[str]]
    expected_slice: tuple[float, ...]

    def get_dummy_components(self) -> dict[str, Any]:
        return self.build().components

    def get_dummy_inputs(self, **overrides) -> dict[str, Any]:
        inputs = {self.condition: list(self.conditions), "generator": seeds(0, 1), "output_type": "pt"}
        return {**inputs, **overrides}

    def draw(self, pipe: HackVARPipeline, **overrides):
        return pipe(**self.get_dummy_inputs(**overrides))


CASES = {
    "class": PipelineCase(
        HackVARClassPipeline,
        tiny_pipeline,
        "class_labels",
        (1, 2),
        {
            "transformer": ["hack_pipelines.models.transformer_var", "VARTransformer2DModel"],
            "vae": ["hack_pipelines.models.autoencoder_msvq", "MultiScaleVQModel"],
        },
        (0.3013, 0.4250, 0.6341, 0.4709, 0.6091, 0.6068, 0.6533, 0.7337, 0.5835),
    ),
    "text": PipelineCase(
        HackVARTextPipeline,
        tiny_text_pipeline,
        "prompt",
        ("a lighthouse in a storm", "a storm"),
        {
            "transformer": ["hack_pipelines.models.transformer_infinity", "InfinityTransformer2DModel"],
            "vae": ["hack_pipelines.models.autoencoder_bsq", "MultiScaleBSQModel"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
        },
        (0.2718, 0.4386, 0.6440, 0.4572, 0.5467, 0.7299, 0.6434, 0.5107, 0.5922),
    ),
}


@pytest.fixture(params=CASES, name="case")
def _case(request) -> PipelineCase:
    return CASES[request.param]


@pytest.fixture(name="pipe")
def _pipe(case) -> HackVARPipeline:
    return case.build()


def same(first, second) -> bool:
    """Whether two outputs are the same to the last bit."""
    tokens = zip(first.tokens, second.tokens, strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in tokens) and torch.equal(first.images, second.images)


def models(pipe: HackVARPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def settings(pipe: HackVARPipeline) -> dict[str, Any]:
    """What a pipeline was made with beside its components."""
    return {name: value for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}


def quiet(pipe: HackVARPipeline) -> HackVARPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- saving and loading ------------------------------------------------------------------------------------------------


def test_save_and_load(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == case.pipeline_class.__name__
    assert {name: entry for name, entry in index.items() if name in case.index} == case.index
    for entry in (HackVARPipeline, case.pipeline_class):
        loaded = quiet(entry.from_pretrained(tmp_path))
        assert type(loaded) is case.pipeline_class and settings(loaded) == settings(pipe)
        assert same(case.draw(loaded), case.draw(pipe))


def test_components_can_be_passed_in(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    given = case.get_dummy_components()
    loaded = HackVARPipeline.from_pretrained(tmp_path, vae=given["vae"], transformer=given["transformer"])
    assert loaded.vae is given["vae"] and loaded.transformer is given["transformer"]
    again = quiet(case.pipeline_class(**pipe.components, **settings(pipe)))
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert same(case.draw(again), case.draw(pipe))


def test_from_pipe_shares_the_components(case, pipe):
    expected = case.draw(pipe)
    other = quiet(case.pipeline_class.from_pipe(pipe))
    assert other is not pipe and all(other.components[name] is part for name, part in pipe.components.items())
    assert settings(other) == settings(pipe) and same(case.draw(other), expected)


def test_optional_components():
    """The text encoder and its tokenizer may be absent, in the files, too."""
    assert HackVARTextPipeline._optional_components == ["text_encoder", "tokenizer"]
    assert HackVARClassPipeline._optional_components == []


def test_optional_components_are_saved_as_absent(tmp_path):
    pipe = tiny_text_pipeline(with_text_encoder=False)
    embeds = {"prompt": None, "prompt_embeds": [torch.ones(3, 32), torch.ones(5, 32)]}
    expected = CASES["text"].draw(pipe, **embeds)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    loaded = quiet(HackVARPipeline.from_pretrained(tmp_path))
    assert loaded.text_encoder is None and same(CASES["text"].draw(loaded, **embeds), expected)


def test_variant(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = quiet(HackVARPipeline.from_pretrained(tmp_path, variant="fp16"))
    assert same(case.draw(loaded), case.draw(pipe))
    with pytest.raises((ValueError, OSError), match="bf16"):
        HackVARPipeline.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(case, pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(HackVARPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert {loaded.transformer.dtype, loaded.vae.dtype} == {dtype}
    images = case.draw(loaded, kv_budget=12).images
    assert images.dtype == torch.float32 and images.isfinite().all() and images.std() > 0.01


def test_dtype_by_component(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    loaded = quiet(HackVARPipeline.from_pretrained(tmp_path, dtype=dtypes))
    assert {name: part.dtype for name, part in models(loaded).items()} == {
        name: dtypes.get(name, torch.float32) for name in models(pipe)
    }
    assert case.draw(loaded).images.isfinite().all()


def test_copies_are_pipelines(case, pipe):
    expected = case.draw(pipe)
    for again in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert same(case.draw(again), expected)
    for config in (copy.deepcopy(pipe.config), pickle.loads(pickle.dumps(pipe.config))):
        assert dict(config) == dict(pipe.config)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_output_types_agree(case, pipe):
    out = case.draw(pipe)
    assert out.images.shape == (2, 3, 8, 8) and out.images.dtype == torch.float32
    assert 0 <= out.images.min() and out.images.max() <= 1 and out.images.std() > 0.01
    arrays = case.draw(pipe, output_type="np").images
    np.testing.assert_array_equal(arrays, out.images.permute(0, 2, 3, 1).numpy())
    pictures = case.draw(pipe, output_type="pil").images
    assert all(isinstance(picture, PIL.Image.Image) for picture in pictures)
    np.testing.assert_array_equal(np.stack(pictures), (arrays * 255).round().astype("uint8"))
    latents = case.draw(pipe, output_type="latent").images
    assert torch.equal(pipe.decode_latents(latents), out.images)


def test_dict_and_tuple(case, pipe):
    out = case.draw(pipe)
    images, tokens, report = case.draw(pipe, return_dict=False)
    assert torch.equal(images, out.images) and report == out.cache_report
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tokens, out.tokens, strict=True))
    assert torch.equal(out[0], out["images"])


def test_expected_slice(case, pipe):
    """Literals, so that a change of anything on the way is seen."""
    drawn = case.draw(pipe).images[0, -1, -3:, -3:].flatten()
    torch.testing.assert_close(drawn, torch.tensor(case.expected_slice), atol=1e-3, rtol=0)


@pytest.mark.parametrize("budget", [None, 12])
def test_a_batch_is_its_singles(case, pipe, budget):
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    together = case.draw(pipe, kv_budget=budget)
    for index, condition in enumerate(case.conditions):
        single = case.draw(pipe, **{case.condition: condition}, generator=seeds(index), kv_budget=budget)
        assert all(torch.equal(ours[index], own[0]) for ours, own in zip(together.tokens, single.tokens))
        torch.testing.assert_close(together.images[index], single.images[0], atol=1e-5, rtol=0)


def test_images_per_prompt(case, pipe):
    several = case.draw(pipe, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    repeated = [condition for condition in case.conditions for _ in range(2)]
    assert same(several, case.draw(pipe, **{case.condition: repeated}, generator=seeds(0, 1, 2, 3)))
    assert (
        len(case.draw(pipe, **{case.condition: case.conditions[0]}, num_images_per_prompt=3, generator=None).images)
        == 3
    )


def test_calls_do_not_touch_each_other(case, pipe):
    expected = case.draw(pipe)
    case.draw(pipe, generator=seeds(7, 8), guidance_scale=1.0, kv_budget=20)
    assert same(case.draw(pipe), expected)


def test_guidance_can_be_switched_off(case, pipe):
    rows = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    alone, guided = case.draw(pipe, guidance_scale=1.0), case.draw(pipe, guidance_scale=3.0)
    hook.remove()
    assert rows == [2] * 4 + [4] * 4 and not same(alone, guided)


def test_budget_of_everything_is_no_budget(case, pipe):
    assert same(case.draw(pipe, kv_budget=1.0), case.draw(pipe))
    assert case.draw(pipe, kv_budget=0.5).cache_report.peak_tokens <= 15


# -- the signature -----------------------------------------------------------------------------------------------------


def documented_arguments(text: str) -> set[str]:
    entries = re.findall(r"^\s+([\w, ]+) \([\[`]", text, flags=re.MULTILINE)
    return {name.strip() for entry in entries for name in entry.split(",")}


def test_arguments_of_a_call(case):
    parameters = set(inspect.signature(case.pipeline_class.__call__).parameters) - {"self"}
    assert COMMON_ARGUMENTS | {case.condition} <= parameters
    assert documented_arguments(case.pipeline_class.__call__.__doc__) == parameters
    parts = set(inspect.signature(case.pipeline_class.__init__).parameters) - {"self"}
    assert documented_arguments(case.pipeline_class.__doc__) == parts


@pytest.mark.parametrize(
    "function",
    [
        HackVARPipeline.from_pretrained,
        HackVARPipeline.from_original,
        HackVARPipeline.load_head_profile,
        HackVARPipeline.prepare_cache,
        HackVARPipeline.draw_scales,
        HackVARClassPipeline.encode_class_labels,
        HackVARTextPipeline.encode_prompt,
        HackVARTextPipeline.resolve_schedule,
    ],
)
def test_docstrings_list_every_argument(function):
    listed = documented_arguments(function.__doc__) | set(re.findall(r"^\s+(kwargs):", function.__doc__, re.MULTILINE))
    assert set(inspect.signature(function).parameters) - {"self", "cls"} <= listed


def test_encode_prompt_alone(tmp_path):
    """A process may hold the text encoder only; what it encodes is what a whole call uses."""
    case, whole = CASES["text"], tiny_text_pipeline()
    whole.head_profile = planted_profile(whole.schedule, 3, 4, 16, 0)
    whole.save_pretrained(tmp_path)
    encoder = HackVARTextPipeline.from_pretrained(tmp_path, transformer=None, vae=None)
    with torch.no_grad():
        condition = encoder.encode_prompt(list(case.conditions), ["a cat", ""])
    assert [len(embeds) for embeds in condition.prompt_embeds] == [6, 3]
    painter = quiet(HackVARTextPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None))
    drawn = case.draw(painter, prompt=None, prompt_embeds=list(condition.prompt_embeds))
    assert same(drawn, case.draw(whole))
    negative = condition.negative_prompt_embeds[0]
    steered = case.draw(
        painter,
        prompt=None,
        prompt_embeds=list(condition.prompt_embeds),
        negative_prompt_embeds=[negative, negative],
    )
    assert same(steered, case.draw(whole, negative_prompt="a cat"))


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_callback_sees_every_scale(case, pipe):
    seen = []

    def callback(pipeline, step, size, kwargs):
        assert pipeline is pipe and pipe.num_timesteps == 4
        seen.append((step, size, kwargs["tokens"].shape[:2], pipe.decode_latents(kwargs["latents"]).shape))
        return kwargs

    names = ["latents", "tokens"]
    out = case.draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(k, (k + 1, k + 1), (2, (k + 1) ** 2), (2, 3, 8, 8)) for k in range(4)]
    assert pipe._callback_tensor_inputs == names and same(out, case.draw(pipe))
    with pytest.raises(ValueError, match="logits"):
        case.draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["logits"])


def test_callback_can_change_the_latents(case, pipe):
    def last(pipeline, step, size, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == pipeline.num_timesteps - 1 else kwargs

    def early(pipeline, step, size, kwargs):
        return {"latents": -3 * kwargs["latents"]} if step == 0 else {}

    assert case.draw(pipe, callback_on_step_end=last, output_type="latent").images.abs().max() == 0
    assert not same(case.draw(pipe, callback_on_step_end=early), case.draw(pipe))


class Note(PipelineCallback):
    """A callback in diffusers' own form, which says itself what it reads."""

    tensor_inputs = ["tokens"]

    def __init__(self):
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=0)
        self.seen = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen.append((step_index, timestep, sorted(callback_kwargs)))
        return callback_kwargs


def test_diffusers_callback_objects(case, pipe):
    first, second, alone = Note(), Note(), Note()
    case.draw(pipe, callback_on_step_end=alone)
    out = case.draw(pipe, callback_on_step_end=MultiPipelineCallbacks([first, second]))
    wanted = [(step, (step + 1, step + 1), ["tokens"]) for step in range(4)]
    assert alone.seen == first.seen == second.seen == wanted
    assert same(out, case.draw(pipe))


def test_interrupt(case, pipe):
    def callback(pipeline, step, size, kwargs):
        pipeline._interrupt = step == 1
        return kwargs

    out, full = case.draw(pipe, callback_on_step_end=callback), case.draw(pipe)
    assert len(out.tokens) == 2 and len(full.tokens) == 4 and not pipe.interrupt
    assert torch.equal(out.tokens[1], full.tokens[1]) and out.images.shape == full.images.shape


def test_progress_bar(case, pipe, capsys):
    pipe.set_progress_bar_config(disable=False, desc="Scales")
    case.draw(pipe)
    shown = capsys.readouterr().err
    assert "Scales" in shown and "4/4" in shown
    pipe.set_progress_bar_config(disable=True)
    case.draw(pipe)
    assert not capsys.readouterr().err


# -- devices and memory ------------------------------------------------------------------------------------------------


def test_to(case, pipe):
    assert pipe.to("cpu") is pipe and pipe.device == CPU
    assert pipe.to(torch.bfloat16) is pipe
    assert {part.dtype for part in models(pipe).values()} == {torch.bfloat16}
    out = case.draw(pipe)
    assert out.images.isfinite().all()
    pipe.to(device="cpu", dtype=torch.float32)
    assert {part.dtype for part in models(pipe).values()} == {torch.float32}
    with pytest.raises(ValueError, match="first corresponds to `device`"):
        pipe.to(torch.float32, "cpu")


def test_model_offload_reaches_every_component(case, pipe):
    expected = case.draw(pipe, kv_budget=12)
    pipe.enable_model_cpu_offload(device="cpu")
    excluded = set(pipe._exclude_from_cpu_offload)
    assert excluded == ({"vae"} if case is CASES["class"] else set())
    hooked = {name for name, part in models(pipe).items() if isinstance(getattr(part, "_hf_hook", None), CpuOffload)}
    assert hooked == set(models(pipe)) - excluded
    for _ in range(2):
        called = set()
        for name in hooked:
            hook = models(pipe)[name]._hf_hook

            def pre_forward(*args, _name=name, _original=hook.pre_forward, **kwargs):
                called.add(_name)
                return _original(*args, **kwargs)

            hook.pre_forward = pre_forward
        assert same(case.draw(pipe, kv_budget=12), expected)
        assert called == hooked


def test_sequential_offload(case, pipe):
    """Weights wait on the meta device and are fetched module by module, as on a GPU."""
    expected = case.draw(pipe, kv_budget=12)
    for part in models(pipe).values():
        cpu_offload(part, execution_device=CPU, offload_buffers=True)
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    assert pipe._execution_device == CPU
    for _ in range(2):
        assert same(case.draw(pipe, kv_budget=12), expected)


@pytest.mark.parametrize("function", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="here there is an accelerator to offload to")
def test_offloads_say_that_they_need_an_accelerator(pipe, function):
    with pytest.raises(RuntimeError, match="requires accelerator"):
        getattr(pipe, function)()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(case, pipe, offload_type):
    expected = case.draw(pipe, kv_budget=12)
    pipe.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    for _ in range(2):
        assert same(case.draw(pipe, kv_budget=12), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload_to_disk(case, pipe, tmp_path, offload_type):
    """What is not fetched again in time is noise."""
    expected = case.draw(pipe, kv_budget=12)
    options = {"offload_type": offload_type, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    if case is CASES["text"] and offload_type == "leaf_level":
        with pytest.raises(ValueError, match="exclude_modules="):
            pipe.enable_group_offload(CPU, **options)
        options["exclude_modules"] = ["text_encoder"]
    pipe.enable_group_offload(CPU, **options)
    assert list(tmp_path.glob("*.safetensors"))
    for _ in range(2):
        assert same(case.draw(pipe, kv_budget=12), expected)


def test_why_leaves_of_the_text_encoder_cannot_go_to_disk(tmp_path):
    """As soon as this fails, diffusers keeps shared weights, and the refusal can go."""
    pipe = tiny_text_pipeline()
    with torch.no_grad():
        expected = pipe.encode_prompt("a storm").prompt_embeds[0]
        apply_group_offloading(
            pipe.text_encoder,
            onload_device=CPU,
            offload_device=CPU,
            offload_type="leaf_level",
            offload_to_disk_path=str(tmp_path),
        )
        assert not torch.equal(pipe.encode_prompt("a storm").prompt_embeds[0], expected)


def test_layerwise_casting(case, pipe):
    for name in ("transformer", "vae"):
        getattr(pipe, name).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    out = case.draw(pipe, kv_budget=12)
    assert out.images.isfinite().all() and out.images.std() > 0.01
    assert out.cache_report.bytes_full == 30 * 2 * 3 * 4 * 16 * 8, "keys and values are of the computed type"


def test_device_map(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(HackVARPipeline.from_pretrained(tmp_path, device_map="cpu"))
    assert loaded.hf_device_map == "cpu" and same(case.draw(loaded), case.draw(pipe))
    for wrong, error in (("auto", NotImplementedError), ({"": "cpu"}, ValueError)):
        with pytest.raises(error):
            HackVARPipeline.from_pretrained(tmp_path, device_map=wrong)


def test_a_mapped_pipeline_is_not_moved(pipe):
    """The errors are diffusers' own."""
    pipe.hf_device_map = {"transformer": 0, "vae": 1}
    for move in (lambda: pipe.to("cpu"), lambda: pipe.enable_model_cpu_offload(device="cpu")):
        with pytest.raises(ValueError, match="reset_device_map"):
            move()
    pipe.reset_device_map()
    assert pipe.to("cpu").hf_device_map is None


def conditions_without_data(case: PipelineCase) -> dict[str, Any]:
    """A text encoder is code of transformers, and its tokenizer makes real tensors."""
    if case is CASES["class"]:
        return {}
    return {"prompt": None, "prompt_embeds": [torch.ones(5, 32), torch.ones(3, 32)]}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("split", [False, True])
def test_components_on_different_devices(case, split):
    """As `device_map="balanced"` puts them; or the transformer itself over two devices, and the tokenizer moved by hand."""

    def callback(pipeline, step, size, kwargs):
        assert kwargs["latents"].device == torch.device(THIRD)
        assert pipeline.decode_latents(kwargs["latents"].to("cpu")).device == torch.device(THIRD)
        return {"latents": kwargs["latents"].to("cpu") + 1}

    with no_data():
        pipe = case.build(num_layers=2)
        transformer = pipe.transformer
        place(transformer, spread(transformer, len(units(transformer)) // 2 + 1) if split else {"": SECOND})
        place(pipe.vae, {"": THIRD}, hooked=not split)
        out = case.draw(pipe, callback_on_step_end=callback, **conditions_without_data(case))
        assert out.images.shape == (2, 3, 8, 8) and out.images.device == torch.device(THIRD)
        # Classes are made of numbers, and such a tensor forgets the index of a CPU.
        home = CPU if case is CASES["class"] else pipe.device_of(transformer)
        assert {tokens.device for tokens in out.tokens} == {home}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_guidance_inside_the_transformer_on_two_devices():
    with no_data():
        pipe = tiny_text_pipeline(num_layers=2)
        place(pipe.transformer, spread(pipe.transformer, len(units(pipe.transformer)) // 2 + 1))
        condition = InfinityCondition([torch.ones(5, 32)], guided=True)
        settings = pipe.prepare_settings(guidance_layers=(0, -1))
        cache = pipe.prepare_cache()
        latents, tokens = pipe.draw_scales(condition, cache, settings)
        assert latents.shape == (1, 8, 4, 4) and {bits.device for bits in tokens} == {CPU}


def profiled_pipeline() -> HackVARClassPipeline:
    pipe = tiny_pipeline(patch_nums=(1, 2, 3, 4, 5))
    pipe.head_profile = planted_profile(pipe.schedule, 3, 4, 16, 0)
    return pipe


# Of the caches of three layers, the second is on a device without data. The third is never called: then a cache looks whether
# all scores were finite, which only data can tell.
DEVICES = ("cpu", "meta")


@pytest.mark.parametrize("method", ["hack", "hack++", "heatkv", "streaming_llm"])
def test_caches_of_layers_on_two_devices(method):
    pipe = profiled_pipeline()
    split, whole = (pipe.prepare_cache(kv_budget=20, method=method, guided=False) for _ in range(2))
    for step, length in enumerate(pipe.schedule.lengths):
        for layer, device in enumerate(DEVICES):
            parts = torch.randn(3, 2, 4, length, 16, generator=torch.Generator().manual_seed(10 * step + layer))
            expected = whole.attend(layer, *parts)
            output = split.attend(layer, *parts.to(device))
            assert output.device.type == device and output.shape == expected.shape
            assert device == "meta" or torch.equal(output, expected)
            held = list(split._tensors(layer)) + list(split._metadata(layer))
            assert {tensor.device.type for tensor in held} <= {device}


def test_arenas_of_two_devices_are_what_is_accounted_for():
    """Each is as large as what its own layers store at their worst checkpoint."""
    pipe = profiled_pipeline()
    cache = pipe.prepare_cache(kv_budget=20, method="heatkv", guided=False)
    plan = cache.plan
    assert isinstance(cache, SegmentCache)
    where = ("cpu", "meta", "cpu")
    stored, worst = [0] * 3, {"cpu": 0, "meta": 0}
    for step, length in enumerate(pipe.schedule.lengths):
        for layer, device in enumerate(where):
            cache.attend(layer, *torch.zeros(3, 2, 4, length, 16, device=device))
            stored[layer] = sum(plan.layers[layer].store[step])
            for name in worst:
                worst[name] = max(worst[name], sum(own for own, at in zip(stored, where) if at == name))
            sizes = {
                device.type: sum(plane.nbytes for part in arena.parts for plane in part)
                for device, arena in cache.arenas.items()
            }
            if step == len(pipe.schedule) - 2:
                held = sizes
    assert not cache.arenas, "freed after the last layer of the last scale"
    assert held == {name: slots * 2 * 2 * 16 * 4 for name, slots in worst.items()}
    assert sum(worst.values()) >= plan.checkpoint_peak


# -- decoding in pieces ------------------------------------------------------------------------------------------------


def test_slicing_and_tiling(case, pipe):
    expected = case.draw(pipe)
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    torch.testing.assert_close(case.draw(pipe).images, expected.images, atol=1e-5, rtol=0)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    assert same(case.draw(pipe), expected), "no larger than a tile"
    pipe.vae.tile_sample_min_size = 4
    assert not torch.equal(case.draw(pipe).images, expected.images)
    pipe.disable_vae_tiling()
    assert same(case.draw(pipe), expected)


# -- what has no meaning here ------------------------------------------------------------------------------------------


def test_what_needs_a_unet_is_absent(pipe):
    """These belong to other mixins of diffusers; no pipeline here pretends to have them."""
    for name in ("enable_freeu", "fuse_qkv_projections", "load_lora_weights", "load_ip_adapter", "scheduler"):
        assert not hasattr(pipe, name), name


def test_attention_slicing_changes_nothing(case, pipe):
    expected = case.draw(pipe)
    pipe.enable_attention_slicing()
    assert same(case.draw(pipe), expected)
