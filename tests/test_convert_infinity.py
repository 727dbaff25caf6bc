"""Original files of Infinity: what is recognised, what is refused, and that what comes out is what went in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from hack_pipelines.cache.cache import FullCache
from hack_pipelines.cli import main
from hack_pipelines.convert import load_original
from hack_pipelines.convert.bsq import tokenizer_conversion
from hack_pipelines.convert.infinity import transformer_conversion
from hack_pipelines.convert.pipeline import Original
from hack_pipelines.models.transformer_infinity import InfinityCondition
from hack_pipelines.schedule import Schedule

from .components import tiny_t5
from .conftest import FIXTURES
from .released import RELEASED_BSQ, RELEASED_INFINITY, outlined, released_bsq, released_infinity, wrapped


INFINITY = FIXTURES / "infinity"
MANIFEST = json.loads((INFINITY / "config.json").read_text())
CONFIG = {"transformer": MANIFEST["transformer"], "tokenizer": MANIFEST["vae"]}
TRANSFORMER, TOKENIZER = INFINITY / "transformer.safetensors", INFINITY / "vae.safetensors"
VAR_TRANSFORMER, VAR_TOKENIZER = FIXTURES / "var" / "tiny_a.safetensors", FIXTURES / "var" / "vae.safetensors"
SIDES = (1, 2, 4, 6, 8, 12, 16)


@pytest.mark.parametrize("name", RELEASED_INFINITY)
def test_released_transformers_are_recognised_from_their_shapes(name):
    depth, dim, heads, hidden_dim, pool_heads, bits, chunk, num_keys, num_parameters = RELEASED_INFINITY[name]
    shapes = released_infinity(depth, dim, heads, hidden_dim, pool_heads, bits, chunk)
    assert len(shapes) == num_keys
    conversion = transformer_conversion(name, outlined(shapes), {})
    assert conversion.expected == shapes
    assert {key: value for key, value in conversion.model.config.items() if not key.startswith("_")} == {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "bits_per_token": bits,
        "ff_hidden_dim": hidden_dim,
        "text_channels": 2048,
        "text_max_length": 512,
        "num_pooling_heads": pool_heads,
        "num_levels": 15,
        "norm_eps": 1e-6,
        "text_attention_in_bfloat16": False,
    }
    # The zeros that stand for the bias of keys are part of a parameter here, and of none there.
    assert conversion.model.num_parameters() - (2 * depth + 1) * dim == num_parameters


@pytest.mark.parametrize("name", RELEASED_BSQ)
@pytest.mark.parametrize("wrap", [wrapped, dict])
def test_released_tokenizers_are_recognised_from_their_shapes(name, wrap):
    channels, widths, num_keys, num_parameters = RELEASED_BSQ[name]
    shapes = wrap(released_bsq(channels, widths))
    assert len(shapes) + 2 == num_keys
    masks = {f"{name}.lfq.mask": (channels,) for name in ("quantize", "quantizer")}
    conversion = tokenizer_conversion(name, outlined({**shapes, **masks}), {})
    assert conversion.expected == shapes
    assert conversion.model.num_parameters() == num_parameters
    assert conversion.model.config["latent_channels"] == channels
    assert conversion.model.config["block_out_channels"] == widths
    assert conversion.model.config["norm_num_groups"] == 32


@torch.no_grad()
def greedy_bits(original: Original, steps: int = 4) -> list[torch.Tensor]:
    """Bits of the first scales for both prompts of the fixture."""
    text = load_file(INFINITY / "text.safetensors")
    condition = InfinityCondition(text["kv_compact"].split(text["lens"].tolist()))
    schedule = Schedule.from_sides(SIDES)
    cache, inputs, bits = FullCache(schedule, 4, True), None, []
    latents = torch.zeros(2, 16, 16, 16)
    for step in range(steps):
        logits = original.transformer(inputs, condition, schedule, step, cache).logits
        guided = 3 * logits[:2] - 2 * logits[2:]
        bits.append(guided.unflatten(-1, (-1, 2)).argmax(-1).to(torch.uint8))
        latents, inputs = original.vae.accumulate(latents, bits[-1], step, schedule)
    return bits


def assert_greedy(original: Original):
    expected = load_file(INFINITY / "greedy.safetensors")
    for step, bits in enumerate(greedy_bits(original)):
        assert torch.equal(bits, expected[f"token_bits.{step}"]), step


@pytest.mark.parametrize("config", [None, CONFIG])
def test_fixtures_load_and_draw_the_original_bits(config):
    original = load_original(TRANSFORMER, TOKENIZER, config=config)
    assert original.family == "infinity" and original.text_components == {}
    assert original.vae.config["patchify"] is False
    assert_greedy(original)


def test_every_tensor_arrives():
    original = load_original(TRANSFORMER, TOKENIZER)
    for model, path in ((original.transformer, TRANSFORMER), (original.vae, TOKENIZER)):
        assert not model.training
        stored = [value for key, value in load_file(path).items() if not key.endswith("lfq.mask")]
        # Zeros that the file holds are joined to biases, so that both have as many numbers, and the same ones.
        assert sum(value.numel() for value in stored) == model.num_parameters()
        ours = torch.cat([value.flatten() for value in model.state_dict().values()]).sort().values
        assert torch.equal(ours, torch.cat([value.flatten() for value in stored]).sort().values)
    source = load_file(TRANSFORMER)
    block, prefix = original.transformer.transformer_blocks[3], "block_chunks.1.module.1"
    assert torch.equal(block.attn.to_qkv.bias[:64], source[f"{prefix}.sa.q_bias"])
    assert not block.attn.to_qkv.bias[64:128].any()
    assert torch.equal(block.attn.to_qkv.bias[128:], source[f"{prefix}.sa.v_bias"])
    assert not block.cross_attn.to_kv.bias[:64].any()
    assert torch.equal(block.cross_attn.to_kv.bias[64:], source[f"{prefix}.ca.v_bias"])


def test_half_precision_keeps_what_needs_float32():
    transformer = load_original(TRANSFORMER, TOKENIZER, dtype=torch.bfloat16).transformer
    for name, parameter in transformer.named_parameters():
        kept = any(part in transformer._keep_in_fp32_modules for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def changed(tmp_path: Path, source: Path, rename=None, **entries: torch.Tensor | None) -> Path:
    """A copy of a file with some tensors renamed, replaced, or taken out; `__` stands for a dot."""
    state_dict = {rename(key) if rename else key: value for key, value in load_file(source).items()}
    for name, tensor in entries.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state_dict[key]
        else:
            state_dict[key] = tensor
    path = tmp_path / f"changed_{source.name}"
    save_file(state_dict, path)
    return path


def unchunked(key: str) -> str:
    if not key.startswith("block_chunks."):
        return key
    _, chunk, _, block, rest = key.split(".", 4)
    return f"blocks.{2 * int(chunk) + int(block)}.{rest}"


def test_other_forms_of_the_same_model_give_the_same_bits(tmp_path):
    zeros = {key.replace(".", "__"): None for key in load_file(TRANSFORMER) if key.endswith("zero_k_bias")}
    legacy = {
        name: torch.ones(3)
        for name in ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
    }
    transformer = changed(tmp_path, TRANSFORMER, **zeros, **legacy)
    masks = {"quantize__lfq__mask": None, "quantizer__lfq__mask": None}
    assert_greedy(load_original(transformer, changed(tmp_path, TOKENIZER, **masks)))

    scales = {}
    for key, value in load_file(TRANSFORMER).items():
        if key.endswith("scale_mul_1H11"):
            scales[unchunked(key).replace(".", "__")] = value.reshape(1, 1, 4, 1)
    transformer = changed(tmp_path, TRANSFORMER, unchunked, **scales)
    torch.save({"trainer": {"gpt_fsdp": load_file(transformer)}, "epoch": 3}, tmp_path / "training.pth")
    torch.save({"vae": load_file(TOKENIZER), "epoch": 3}, tmp_path / "vae.pth")
    original = load_original(tmp_path / "training.pth", tmp_path / "vae.pth")
    assert_greedy(original)
    with pytest.raises(ValueError, match=r"\['num_block_chunks'\]` is 2, but .* shows 1"):
        load_original(tmp_path / "training.pth", tmp_path / "vae.pth", config=CONFIG)


def sharded(tmp_path: Path) -> Path:
    """The transformer in three shards with an index, and a file that does not belong to them."""
    state_dict, folder = load_file(TRANSFORMER), tmp_path / "shards"
    folder.mkdir()
    weight_map = {}
    for index in range(3):
        part = {key: state_dict[key] for key in sorted(state_dict)[index::3]}
        name = f"model-{index + 1:05}-of-00003.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": torch.ones(1)}, folder / "other.safetensors")
    return folder


def test_sharded_transformers_are_read_by_their_index(tmp_path):
    folder = sharded(tmp_path)
    assert_greedy(load_original(folder, TOKENIZER))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match="has no model-00002-of-00003.safetensors, which model.safetensors.index.json"
    ):
        load_original(folder, TOKENIZER)


BLOCK = "block_chunks__1__module__0__"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({f"{BLOCK}ffn__fc2__bias": None}, "it lacks block_chunks.1.module.0.ffn.fc2.bias"),
        ({"cfg_uncond": None}, "lacks cfg_uncond, from which the configuration is read"),
        ({"text_proj_for_sos__ca__v_bias": None}, "it lacks text_proj_for_sos.ca.v_bias"),
        ({"extra__weight": torch.ones(2)}, "it holds extra.weight, which this model does not have"),
        ({"block_chunks__2__module__0__ada_gss": torch.ones(1)}, "it lacks block_chunks.2.module.0.sa.scale_mul_1H11"),
        ({"blocks__0__ada_gss": torch.ones(1)}, "it holds blocks.0.ada_gss, which this model does not have"),
        ({"head__bias": torch.ones(3)}, r"head.bias has shape \(3,\) but must have \(32,\)"),
        ({"pos_start": torch.ones(64)}, r"pos_start has shape \(64,\) but must have 3 axes"),
        ({"head__bias": torch.ones(32).int()}, "head.bias has dtype torch.int32 but must be of a floating dtype"),
        ({f"{BLOCK}sa__zero_k_bias": torch.ones(64)}, "block_chunks.1.module.0.sa.zero_k_bias must be all zeros"),
        ({f"{BLOCK}ca__zero_k_bias": torch.zeros(3)}, r"ca.zero_k_bias has shape \(3,\) but must have \(64,\)"),
        (
            {"block_chunks__0__module__0__sa__scale_mul_1H11": torch.ones(2, 2, 1, 1)},
            r"has shape \(2, 2, 1, 1\) but must have \(1, heads, 1, 1\) or \(1, 1, heads, 1\)",
        ),
        ({f"{BLOCK}sa__scale_mul_1H11": torch.ones(1, 1, 4, 1)}, r"has shape \(1, 1, 4, 1\) but must have \(1, 4, 1"),
        (
            {"block_chunks__0__module__0__sa__scale_mul_1H11": torch.ones(1, 5, 1, 1)},
            "5 heads do not divide the width",
        ),
    ],
)
def test_incomplete_and_inconsistent_transformers_are_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_original(changed(tmp_path, TRANSFORMER, **entries), TOKENIZER)
    assert "changed_transformer" in str(caught.value)


def test_files_with_no_block_are_refused(tmp_path):
    blocks = {key.replace(".", "__"): None for key in load_file(TRANSFORMER) if key.startswith("block_chunks.")}
    with pytest.raises(ValueError, match=r"lacks block_chunks.0.module.0.\*, from which the configuration is read"):
        load_original(changed(tmp_path, TRANSFORMER, **blocks), TOKENIZER)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"encoder__mid__block_1__norm1__norm__bias": None}, "it lacks encoder.mid.block_1.norm1.norm.bias"),
        ({"encoder__down__1__downsample__conv__conv__bias": None}, "it lacks .*down.1.downsample.conv.conv.bias"),
        ({"decoder__conv_in__conv__bias": torch.ones(3)}, r"decoder.conv_in.conv.bias has shape \(3,\) but must"),
        ({"loss__weight": torch.ones(3)}, "it holds loss.weight"),
        ({"encoder__conv_in__conv__weight": torch.ones(48, 3, 3, 3)}, "must be multiples of its first, 48"),
        ({"encoder__conv_in__conv__weight": torch.ones(32, 4, 3, 3)}, r"has shape \(32, 4, 3, 3\) but must have"),
    ],
)
def test_incomplete_and_inconsistent_tokenizers_are_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_original(TRANSFORMER, changed(tmp_path, TOKENIZER, **entries))
    assert "changed_vae" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field", "value", "shown"),
    [
        ("transformer", "embed_dim", 128, "64"),
        ("transformer", "depth", 5, "4"),
        ("transformer", "num_heads", 8, "4"),
        ("transformer", "head_dim", 32, "16"),
        ("transformer", "num_block_chunks", 1, "2"),
        ("transformer", "blocks_per_chunk", 4, "2"),
        ("transformer", "ffn_hidden", 128, "256"),
        ("transformer", "text_channels", 2048, "256"),
        ("transformer", "pool_heads", 16, "2"),
        ("transformer", "bits_per_token", 64, "16"),
        ("transformer", "head_outputs", 64, "32"),
        ("transformer", "lvl_embeddings", 13, "15"),
        ("tokenizer", "codebook_dim", 32, "16"),
        ("tokenizer", "base_channels", 128, "32"),
        ("tokenizer", "ch_mult", [1, 2, 4], r"\(1, 1, 2\)"),
        ("tokenizer", "num_res_blocks", 3, "2"),
        ("tokenizer", "patch_size", 16, "4"),
        ("tokenizer", "in_channels", 4, "3"),
    ],
)
def test_conflicts_between_config_and_file_name_both_values(part, field, value, shown):
    value_shown = repr(tuple(value) if isinstance(value, list) else value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError, match=rf"`config\['{part}'\]\['{field}'\]` is {value_shown}, but .* shows {shown}:"
    ):
        load_original(TRANSFORMER, TOKENIZER, config={part: {field: value}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"transformer": {"rope2d_normalized_by_hw": 1}},
            r"\['rope2d_normalized_by_hw'\]` is 1, but only 2, the value",
        ),
        ({"transformer": {"add_lvl_embeding_only_first_block": 0}}, "is 0, but only 1, the value of every released"),
        (
            {"transformer": {"text_maxlen": 512}},
            r"`config\['transformer'\]\['text_maxlen'\]` is 512, but cfg_uncond in",
        ),
        (
            {"transformer": {"apply_spatial_patchify": True}},
            r"\['apply_spatial_patchify'\]` is True, but .* show False",
        ),
        ({"transformer": {"norm_eps": 0}}, r"\['norm_eps'\]` must be a positive number but is 0"),
        ({"transformer": {"layers": 2}}, r"`config\['transformer'\]` has no field 'layers'"),
        ({"tokenizer": {"num_groups": 5}}, "gives no MultiScaleBSQModel"),
        ({"tokenizer": {"num_groups": 1.5}}, r"\['num_groups'\]` must be a positive whole number but is 1.5"),
    ],
)
def test_what_is_not_supported_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_original(TRANSFORMER, TOKENIZER, config=config)


def test_fields_that_no_file_shows_are_taken_over():
    config = {"transformer": {"norm_eps": 1e-5, "pad_to_multiplier": 1}, "tokenizer": {"num_groups": 16}}
    original = load_original(TRANSFORMER, TOKENIZER, config=config)
    assert original.transformer.config["norm_eps"] == 1e-5
    assert original.vae.config["norm_num_groups"] == 16


@pytest.mark.parametrize(("widths", "groups"), [((32, 96), 32), ((24, 48), 24), ((20, 40), None), ((24, 96), None)])
def test_groups_of_normalisations_follow_from_the_widths(widths, groups):
    state_dict = outlined(wrapped(released_bsq(8, widths)))
    if groups is not None:
        assert tokenizer_conversion("vae", state_dict, {}).model.config["norm_num_groups"] == groups
        return
    with pytest.raises(ValueError, match=r"vae does not show how many groups .* widths \[2"):
        tokenizer_conversion("vae", state_dict, {})
    assert tokenizer_conversion("vae", state_dict, {"num_groups": 4}).model.config["norm_num_groups"] == 4


def tokenizer_file(tmp_path: Path, channels: int) -> Path:
    """A tokenizer with other latent channels than the fixture's."""
    path = tmp_path / f"vae_{channels}.safetensors"
    shapes = wrapped(released_bsq(channels, (32, 64)))
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


def test_pair_of_files_shows_whether_the_latent_is_patchified(tmp_path):
    original = load_original(TRANSFORMER, tokenizer_file(tmp_path, 4))
    assert original.vae.config["patchify"] is True and original.vae.bits_per_token == 16
    assert original.pipeline_config["sampling"]["temperature"] == 1.0
    assert load_original(TRANSFORMER, TOKENIZER).pipeline_config["sampling"] == {
        "guidance_scale": 3.0,
        "temperature": 0.5,
        "top_k": 900,
        "top_p": 0.97,
    }
    with pytest.raises(ValueError, match=r"\['apply_spatial_patchify'\]` is False, but .* show True"):
        load_original(TRANSFORMER, tmp_path / "vae_4.safetensors", config={"transformer": CONFIG["transformer"]})
    with pytest.raises(ValueError, match="do not belong together: a token has 16 bits in the transformer, but 8 in"):
        load_original(TRANSFORMER, tokenizer_file(tmp_path, 8))


def test_files_of_two_families_and_swapped_ones_are_named():
    with pytest.raises(
        ValueError, match="is an image tokenizer of Infinity. Are `transformer` and `tokenizer` swapped"
    ):
        load_original(TOKENIZER, TRANSFORMER)
    wanted = "`tokenizer` must be an image tokenizer of Infinity, but .*"
    with pytest.raises(
        ValueError, match=f"{wanted} is the image tokenizer of VAR. Give the one that belongs to the tra"
    ):
        load_original(TRANSFORMER, VAR_TOKENIZER)
    with pytest.raises(ValueError, match=f"{wanted} is an Infinity transformer. Give the one"):
        load_original(TRANSFORMER, TRANSFORMER)
    with pytest.raises(
        ValueError, match="must be the image tokenizer of VAR, but .* is an image tokenizer of Infinity"
    ):
        load_original(VAR_TRANSFORMER, TOKENIZER)


def test_schedule_is_that_of_a_megapixel_or_the_given_one():
    sizes = load_original(TRANSFORMER, TOKENIZER).pipeline_config["scale_schedule"]
    assert len(sizes) == 13 and sizes[-1] == [64, 64]
    given = load_original(TRANSFORMER, TOKENIZER, scale_schedule=((1, 1), (2, 3))).pipeline_config["scale_schedule"]
    assert given == [[1, 1], [2, 3]]
    for schedule in ([], [1, 2], [(0, 1)], [(1, 1.5)], 3):
        with pytest.raises(ValueError, match="`scale_schedule` must hold height and width of every token map"):
            load_original(TRANSFORMER, TOKENIZER, scale_schedule=schedule)


def test_class_conditional_models_take_no_text():
    with pytest.raises(
        ValueError, match="`text_encoder` is 'org/t5' but class-conditional models have no text encoder"
    ):
        load_original(VAR_TRANSFORMER, VAR_TOKENIZER, text_encoder="org/t5")
    with pytest.raises(ValueError, match="class-conditional models draw one schedule only"):
        load_original(VAR_TRANSFORMER, VAR_TOKENIZER, scale_schedule=[(1, 1)])


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """A folder with a text encoder and its tokenizer."""
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_text_encoder_is_float16_where_the_model_is_of_half_precision(dtype, t5):
    components = load_original(TRANSFORMER, TOKENIZER, dtype=dtype, text_encoder=t5).text_components
    text_encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    expected = torch.float32 if dtype in (None, torch.float32) else torch.float16
    assert isinstance(text_encoder, T5EncoderModel) and not text_encoder.training
    stored = load_file(t5 / "model.safetensors")
    for name, parameter in text_encoder.named_parameters():
        assert parameter.dtype == (torch.float32 if ".wo." in name else expected), name
        assert torch.equal(parameter, stored[name].to(parameter.dtype)), name
    assert tokenizer("a storm").input_ids == [3, 5, 1]


def test_text_encoder_is_taken_out_of_a_sharded_whole_model(t5, tmp_path):
    config = T5Config.from_pretrained(t5)
    config.num_decoder_layers = 1
    whole = T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path, max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((t5 / name).read_bytes())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    text_encoder = load_original(TRANSFORMER, TOKENIZER, text_encoder=tmp_path).text_components["text_encoder"]
    expected = whole.encoder.state_dict()
    got = text_encoder.encoder.state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"has no {shards[0].name}, which model.safetensors.index.json names"):
        load_original(TRANSFORMER, TOKENIZER, text_encoder=tmp_path)


@pytest.mark.parametrize(("with_text", "dtype"), [(False, None), (True, None), (True, "bf16")])
def test_convert_command_takes_a_text_encoder(with_text, dtype, t5, tmp_path, capsys):
    folder = tmp_path / "converted"
    options = ["--text-encoder", str(t5)] if with_text else []
    options += ["--dtype", dtype] if dtype else []
    assert main(["convert", str(TRANSFORMER), str(TOKENIZER), str(folder), *options]) == 0
    assert (folder / "text_encoder").is_dir() is (folder / "tokenizer").is_dir() is with_text
    advice = "it draws from text features only: convert with --text-encoder to draw from prompts"
    if with_text:
        # Without the dtype the weights would be opened in float32, in twice the memory.
        precision = " --dtype bf16" if dtype else ""
        advice = f'draw with it: hack-pipelines generate --model {folder}{precision} "a lighthouse in a storm"'
    assert capsys.readouterr().out.splitlines()[1] == advice


def damaged_t5(folder: Path, kind: str):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "incomplete":
        state_dict = load_file(weights)
        del state_dict["encoder.final_layer_norm.weight"]
        save_file(state_dict, weights, metadata={"format": "pt"})
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "no config":
        config.unlink()
    else:
        name, value = kind.split("=")
        config.write_text(json.dumps({**json.loads(config.read_text()), name: json.loads(value)}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "pickle",
            r"has no model.safetensors; pickle files \(there is pytorch_model.bin\) are neither fetched nor read",
        ),
        ("cut", "model.safetensors is cut short or damaged"),
        ("incomplete", "is no complete T5EncoderModel: it lacks encoder.final_layer_norm.weight"),
        ("no tokenizer", "has no tokenizer: expected tokenizer.json or spiece.model beside"),
        ("damaged tokenizer", "has a tokenizer that cannot be read"),
        ("no config", "has no config.json"),
        ('model_type="mt5"', "`text_encoder` must be a T5 but .* holds a model of type 'mt5'"),
        ("d_model=2048", "whose features have 2048 channels, but the transformer reads 256"),
    ],
)
def test_unfit_text_encoders_are_refused(kind, message, tmp_path):
    damaged_t5(tiny_t5(tmp_path), kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_original(TRANSFORMER, TOKENIZER, text_encoder=tmp_path)
    assert str(tmp_path) in str(caught.value)
