"""What diffusers' own testers ask of a model, of all four; docs/diffusers.md has the list."""

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils.modeling import compute_module_sizes
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from hack_pipelines import MultiScaleVQModel, VARTransformer2DModel
from hack_pipelines.cache import FullCache
from hack_pipelines.models.autoencoder_bsq import MultiScaleBSQModel
from hack_pipelines.models.transformer_infinity import (
    InfinityCondition,
    InfinityTransformer2DModel,
    InfinityTransformer2DModelOutput,
)
from hack_pipelines.models.transformer_var import VARTransformer2DModelOutput
from hack_pipelines.schedule import Schedule

from ..components import SIDES, tiny_bsq, tiny_text_transformer, tiny_transformer, tiny_vae
from .devices import FIRST, SECOND, THIRD, no_data, place, spread, units


CPU = torch.device("cpu")
SCHEDULE = Schedule.from_sides(SIDES)
FLOAT8 = torch.float8_e4m3fn


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def var_inputs() -> dict[str, Any]:
    return {"hidden_states": random(2, 29, 8), "class_labels": torch.tensor([3, 10])}


def infinity_inputs() -> dict[str, Any]:
    condition = InfinityCondition([random(5, 32), random(3, 32)], guided=False)
    return {"hidden_states": random(2, 29, 8), "condition": condition, "schedule": SCHEDULE}


def tokenizer_inputs() -> dict[str, Any]:
    return {"images": random(2, 3, 8, 8).clamp(-1, 1), "schedule": SCHEDULE}


@dataclass(frozen=True)
class ModelCase:
    """One model: how it is built at a tiny size, what it is called with, and what comes out."""

    model_class: type
    build: Callable[..., Any]
    get_dummy_inputs: Callable[[], dict[str, Any]]
    output_class: type
    output_shape: tuple[int, ...]
    stored_in_float8: str
    checkpointed: str

    def get_init_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.build().config.items() if not name.startswith("_")}

    def run(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.get_dummy_inputs(), return_dict=False)[0]


CASES = {
    "var": ModelCase(
        VARTransformer2DModel,
        tiny_transformer,
        var_inputs,
        VARTransformer2DModelOutput,
        (2, 30, 32),
        "transformer_blocks.0.ff.proj_in",
        "transformer_blocks.1",
    ),
    "infinity": ModelCase(
        InfinityTransformer2DModel,
        tiny_text_transformer,
        infinity_inputs,
        InfinityTransformer2DModelOutput,
        (2, 30, 16),
        "transformer_blocks.0.ff.proj_in",
        "transformer_blocks.1",
    ),
    "vq": ModelCase(
        MultiScaleVQModel,
        tiny_vae,
        tokenizer_inputs,
        DecoderOutput,
        (2, 3, 8, 8),
        "decoder.up_blocks.0.resnets.0.conv1",
        "decoder.up_blocks.1",
    ),
    "bsq": ModelCase(
        MultiScaleBSQModel,
        tiny_bsq,
        tokenizer_inputs,
        DecoderOutput,
        (2, 3, 8, 8),
        "decoder.up_blocks.0.resnets.0.conv1",
        "decoder.up_blocks.1",
    ),
}


@pytest.fixture(params=CASES, name="case")
def _case(request) -> ModelCase:
    return CASES[request.param]


@pytest.fixture(params=["vq", "bsq"], name="tokenizer")
def _tokenizer(request):
    return CASES[request.param].build()


# -- saving and loading ------------------------------------------------------------------------------------------------


def test_save_and_load(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(case.run(loaded), case.run(model))


def test_loading_info_names_what_is_missing(case, tmp_path):
    from safetensors.torch import load_file, save_file

    case.build().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = next(iter(weights))
    save_file({**{name: value for name, value in weights.items() if name != lost}, "extra": torch.zeros(1)}, file)
    _, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["missing_keys"]) == [lost] and list(info["unexpected_keys"]) == ["extra"]


def test_config_round_trip(case, tmp_path):
    model = case.build()
    rebuilt = case.model_class.from_config(case.get_init_dict())
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert dict(case.model_class(**case.get_init_dict()).config) == dict(rebuilt.config)
    model.save_config(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("_class_name") == case.model_class.__name__ and stored.pop("_diffusers_version")
    assert stored == json.loads(json.dumps(case.get_init_dict()))
    for again in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert dict(again) == dict(model.config)


def test_copies_are_models(case):
    model = case.build()
    expected = case.run(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(again), expected)
        with torch.no_grad():
            next(again.parameters()).add_(1)
    assert torch.equal(case.run(model), expected)


def test_variant(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path, variant="fp16")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    loaded = case.model_class.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(case.run(loaded), case.run(model))
    for wrong in (None, "bf16"):
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            case.model_class.from_pretrained(tmp_path, variant=wrong, use_safetensors=True)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(case, tmp_path, variant):
    model = case.build()
    model.save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
    index = "diffusion_pytorch_model.safetensors.index" + (f".{variant}" if variant else "") + ".json"
    shards = set(json.loads((tmp_path / index).read_text())["weight_map"].values())
    assert len(shards) > 2 and {file.name for file in tmp_path.glob("*.safetensors")} == shards
    loaded = case.model_class.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(case.run(loaded), case.run(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(case, tmp_path, dtype):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    kept = set(case.model_class._keep_in_fp32_modules or ())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(name.split(".")) else dtype), name
    output, full = case.run(loaded).float(), case.run(model)
    assert output.isfinite().all()
    # Tokens on the edge fall on the other side, so that an image differs in some places.
    assert (output - full).abs().mean() < 0.3 * full.std()


# -- the forward pass --------------------------------------------------------------------------------------------------


def test_output(case):
    model = case.build()
    with torch.no_grad():
        output = model(**case.get_dummy_inputs())
    assert type(output) is case.output_class
    as_tuple = case.run(model)
    assert torch.equal(output[0], as_tuple) and torch.equal(as_tuple, case.run(model))
    assert as_tuple.shape == case.output_shape and as_tuple.dtype == torch.float32


def test_attributes(case):
    model = case.build()
    name = next(iter(case.get_init_dict()))
    with pytest.warns(FutureWarning, match=name):
        getattr(model, name)
    with pytest.raises(AttributeError, match=f"'{case.model_class.__name__}' object has no attribute 'nothing'"):
        model.nothing


def test_docstrings_list_every_argument(case):
    documented = {
        function: set(re.findall(r"^\s+(\w+) \([\[`]", text, flags=re.MULTILINE))
        for function, text in (
            (case.model_class.__init__, case.model_class.__doc__),
            (case.model_class.forward, case.model_class.forward.__doc__),
        )
    }
    for function, names in documented.items():
        assert names | {"self"} >= set(inspect.signature(function).parameters), function
    assert documented[case.model_class.forward] | {"self"} == set(
        inspect.signature(case.model_class.forward).parameters
    )


@pytest.mark.slow
def test_a_tokenizer_compiles_without_a_break(tokenizer):
    compiled = torch.compile(tokenizer, fullgraph=True, backend="eager")
    with torch.no_grad():
        drawn = compiled(**tokenizer_inputs(), return_dict=False)[0]
        assert torch.equal(drawn, tokenizer(**tokenizer_inputs(), return_dict=False)[0])


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(case: ModelCase, model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = case.get_dummy_inputs()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing(case):
    plain, checkpointed = case.build().train(), case.build().train()
    assert not plain.is_gradient_checkpointing
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    calls = []
    checkpointed.get_submodule(case.checkpointed).register_forward_pre_hook(lambda *args: calls.append(1))
    expected, ours = gradients(case, plain), gradients(case, checkpointed)
    assert len(calls) == 2, "once forward, once more on the way back"
    assert len(expected) > 10 and expected.keys() == ours.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5)
    checkpointed.disable_gradient_checkpointing()
    case.run(checkpointed)
    assert not checkpointed.is_gradient_checkpointing and len(calls) == 3


@pytest.mark.parametrize("name", ["var", "infinity"])
def test_gradients_reach_every_weight(name):
    case = CASES[name]
    model = case.build(**({"shared_aln": True} if name == "var" else {})).train()
    if name == "infinity":
        # The second row is guided by the learned features.
        condition = InfinityCondition([random(5, 32)], guided=True)
        logits = model(random(2, 29, 8), condition, SCHEDULE).logits
    else:
        logits = model(**case.get_dummy_inputs()).logits
    weights = random(*logits.shape)
    (logits * weights).sum().backward()
    parameters = dict(model.named_parameters())
    assert [name for name, own in parameters.items() if own.grad is None or not own.grad.abs().sum()] == []


def test_a_cache_takes_a_scale_once():
    """Drawn with gradients switched on, a block is not computed again, so its cache is not written again."""
    model = tiny_transformer().train()
    model.enable_gradient_checkpointing()
    cache = FullCache(model.schedule, 3)
    logits = model(None, torch.tensor([3]), step=0, kv_cache=cache).logits
    logits.sum().backward()
    assert cache.seen_tokens == [1] * 3 and model.proj_out.weight.grad is not None


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential", {"": "cpu"}])
def test_device_map(case, tmp_path, device_map):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, device_map=device_map)
    assert loaded.hf_device_map == {"": "cpu"}
    assert torch.equal(case.run(loaded), case.run(model))


def test_device_map_with_a_part_on_disk(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    fits = {"cpu": int(0.75 * compute_module_sizes(model)[""])}
    loaded = case.model_class.from_pretrained(
        tmp_path, device_map="auto", max_memory=fits, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    waiting = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert 0 < len(waiting) < len(list(model.named_parameters()))
    assert torch.equal(case.run(loaded), case.run(model))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_sequential_offload(case, tmp_path, where):
    """All weights wait on the meta device, parameters of the model itself too, and are fetched module by module."""
    expected, model = case.run(case.build()), case.build()
    if where == "disk":
        disk_offload(model, tmp_path, execution_device=CPU, offload_buffers=True)
    else:
        cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(case.run(model), expected)
    assert torch.equal(case.run(model), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_group_offload(case, tmp_path, offload_type, where):
    """On disk, what is not fetched again in time is noise: no weight is read outside of a module that fetches it."""
    expected, model = case.run(case.build()), case.build()
    model.enable_group_offload(
        CPU,
        offload_type=offload_type,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path) if where == "disk" else None,
    )
    assert torch.equal(case.run(model), expected)
    assert torch.equal(case.run(model), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload_of_methods_that_pipelines_call(tokenizer, tmp_path, offload_type):
    """`encode`, `tokenize`, `accumulate` and `decode` fetch what they need, although the model itself is not called."""

    def round_trip(model):
        with torch.no_grad():
            tokens = model.tokenize(model.encode(tokenizer_inputs()["images"]), SCHEDULE)
            latents = torch.zeros(2, 8, 4, 4)
            for step, ids in enumerate(tokens):
                latents, _ = model.accumulate(latents, ids, step, SCHEDULE)
            return model.decode(latents)

    expected = round_trip(tokenizer)
    tokenizer.enable_group_offload(
        CPU, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(round_trip(tokenizer), expected)


def test_soft_codes_survive_sequential_offload():
    vae, weights = tiny_vae(), random(2, 4, 32).softmax(-1)
    latents = torch.zeros(2, 8, 4, 4)
    with torch.no_grad():
        expected, _ = vae.accumulate(latents, weights, 1, SCHEDULE)
        cpu_offload(vae, execution_device=CPU, offload_buffers=True)
        assert torch.equal(vae.accumulate(latents, weights, 1, SCHEDULE)[0], expected)


def test_streams_are_refused_on_the_cpu(case):
    with pytest.raises(ValueError, match="use_stream=False"):
        case.build().enable_group_offload(CPU, offload_type="leaf_level", use_stream=True)


@pytest.mark.parametrize("storage", [FLOAT8, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting(case, storage, compute, tmp_path):
    case.build().save_pretrained(tmp_path)
    model, plain = (case.model_class.from_pretrained(tmp_path, dtype=compute) for _ in range(2))
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    assert model.get_submodule(case.stored_in_float8).weight.dtype == storage and model.dtype == compute
    before = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        own = getattr(model, name, None)
        if own is not None or re.search("norm|embed|quantizer", name):
            assert parameter.dtype == before[name], "tables and norms are as they were"
    sizes = model.get_memory_footprint(), plain.get_memory_footprint()
    assert sizes[0] < sizes[1] if storage.itemsize < compute.itemsize else sizes[0] == sizes[1]
    output, full = case.run(model).float(), case.run(plain).float()
    assert output.isfinite().all()
    if storage == torch.float16 and compute == torch.float32:
        assert (output - full).abs().mean() < 0.05 * full.std()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_layerwise_casting_with_group_offload(case, offload_type):
    model, expected = case.build(), case.build()
    for own in (model, expected):
        own.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
    model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(case.run(model), case.run(expected))


# -- several devices ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_one_model_on_two_devices(case):
    """Wherever the cut is, between blocks or before and after them."""
    total = len(units(case.build()))
    assert total >= 8
    with no_data():
        for count in (1, 3 * total // 4, total - 2):
            model = case.build()
            place(model, spread(model, count))
            assert case.run(model).shape == case.output_shape


def test_two_devices_are_told_apart():
    """The devices of the test above do refuse to be mixed."""
    with no_data(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device=FIRST) + torch.zeros(3, device=SECOND)


def test_the_transformer_may_be_elsewhere(tokenizer):
    """Codes come from the transformer's device, and its input goes back there; the running latent stays."""
    with no_data():
        build = tiny_vae if isinstance(tokenizer, MultiScaleVQModel) else tiny_bsq
        model = build()
        place(model, {"": THIRD, **{name: THIRD for name, _ in model.named_children()}})
        latents = torch.zeros(2, 8, 4, 4, device=THIRD)
        codes = torch.zeros((2, 4) if build is tiny_vae else (2, 4, 8), dtype=torch.int64, device=FIRST)
        latents, scale_input = model.accumulate(latents, codes, 1, SCHEDULE)
        assert (latents.device, scale_input.device) == (torch.device(THIRD), torch.device(FIRST))
        assert model.next_input(latents, 1, SCHEDULE).device == torch.device(THIRD)


# -- decoding in pieces ------------------------------------------------------------------------------------------------


def test_slicing_gives_the_same_and_tiling_nearly(tokenizer):
    latents = random(3, 8, 24, 40)
    with torch.no_grad():
        whole = tokenizer.decode(latents)
        tokenizer.enable_slicing()
        torch.testing.assert_close(tokenizer.decode(latents), whole, atol=1e-5, rtol=0)
        tokenizer.disable_slicing()
        tokenizer.enable_tiling()
        assert torch.equal(tokenizer.decode(latents), whole), "no larger than a tile"
        tokenizer.tile_sample_min_size = 32
        tiled = tokenizer.decode(latents)
        tokenizer.disable_tiling()
        assert torch.equal(tokenizer.decode(latents), whole)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    # Noise has the same statistics everywhere, so normalising tiles of 16 positions on their own changes little.
    assert (tiled - whole).abs().mean() < 0.3 * whole.std()
