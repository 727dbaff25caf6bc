"""Original files: what is recognised, what is refused, and that what comes out is what went in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hack_pipelines import HackVARPipeline
from hack_pipelines.convert import convert_original, load_original
from hack_pipelines.convert.msvq import tokenizer_conversion
from hack_pipelines.convert.var import transformer_conversion
from hack_pipelines.hub.checks import check_weights

from .conftest import FIXTURES
from .released import RELEASED, SIDES_256, outlined, released_tokenizer, released_transformer


VAR = FIXTURES / "var"
MANIFEST = json.loads((VAR / "manifest.json").read_text())
TOKENIZER = VAR / "vae.safetensors"
TINY_A, TINY_B = VAR / "tiny_a.safetensors", VAR / "tiny_b.safetensors"


@pytest.mark.parametrize("name", RELEASED)
def test_released_transformers_are_recognised_from_their_shapes(name):
    depth, sides, shared, num_keys, num_parameters = RELEASED[name]
    shapes = released_transformer(depth, sides, shared)
    assert len(shapes) == num_keys
    conversion = transformer_conversion(name, outlined(shapes, sides), {})
    assert conversion.expected == shapes
    config = conversion.model.config
    assert (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]) == (depth, depth, 64)
    assert (config["patch_nums"], config["shared_aln"], config["attn_l2_norm"]) == (sides, shared, True)
    assert (config["num_classes"], config["vocab_size"], config["latent_channels"]) == (1000, 4096, 32)
    # The zeros that stand for the bias of keys are part of a parameter here, and of none there.
    assert conversion.model.num_parameters() - depth * 64 * depth == num_parameters


def test_released_tokenizer_is_recognised_from_its_shapes():
    shapes = released_tokenizer()
    assert len(shapes) == 324
    conversion = tokenizer_conversion("vae", outlined(shapes), {})
    assert {**conversion.expected, "quantize.ema_vocab_hit_SV": (10, 4096)} == shapes
    assert conversion.model.num_parameters() == 108_948_355
    assert conversion.model.config["block_out_channels"] == (160, 160, 320, 320, 640)
    assert conversion.model.config["num_residual_convs"] == 4


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("configured", [False, True])
def test_fixtures_load_and_draw_the_original_tokens(name, configured):
    entry = MANIFEST["models"][name]
    config = {"transformer": entry["config"], "tokenizer": MANIFEST["vae"]["config"]} if configured else None
    pipe = HackVARPipeline.from_original(VAR / f"{name}.safetensors", TOKENIZER, config=config)
    pipe.set_progress_bar_config(disable=True)
    case = entry["cases"]["greedy"]
    output = pipe(case["labels"], guidance_scale=case["cfg"] + 1, top_k=1, top_p=1.0, output_type="pt")
    expected = load_file(VAR / f"{name}_expected.safetensors")
    assert torch.equal(torch.cat(output.tokens, dim=1).int(), expected["greedy.tokens"])
    assert (output.images[:1] - expected["greedy.image"][:1]).abs().max() < MANIFEST["tolerances"]["image"]


def test_loaded_models_are_ready_and_keep_what_needs_float32():
    original = load_original(TINY_A, TOKENIZER, dtype=torch.bfloat16)
    assert original.family == "var" and original.pipeline_config == {}
    source = load_file(TINY_A)
    for model in (original.transformer, original.vae):
        assert not model.training
        for name, parameter in model.named_parameters():
            kept = any(part in model._keep_in_fp32_modules for part in name.split("."))
            assert parameter.device.type == "cpu"
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert torch.equal(original.transformer.pos_embed, source["pos_1LC"])
    assert torch.equal(original.transformer.proj_out.weight, source["head.weight"].bfloat16())
    attention = original.transformer.transformer_blocks[1].attn
    assert torch.equal(attention.to_qkv.bias[:48], source["blocks.1.attn.q_bias"].bfloat16())
    assert not attention.to_qkv.bias[48:96].any()
    assert torch.equal(attention.to_qkv.bias[96:], source["blocks.1.attn.v_bias"].bfloat16())
    codes = original.vae.quantizer.embedding.weight
    assert codes.dtype == torch.float32 and torch.equal(codes, load_file(TOKENIZER)["quantize.embedding.weight"])


def test_every_tensor_of_the_tokenizer_arrives():
    vae = load_original(TINY_A, TOKENIZER).vae
    source = {key: value.float() for key, value in load_file(TOKENIZER).items()}
    total = sum(value.numel() for key, value in source.items() if key != "quantize.ema_vocab_hit_SV")
    assert total == vae.num_parameters()
    query, key, value = source["decoder.up.4.attn.2.qkv.weight"][:, :, 0, 0].chunk(3)
    attention = vae.decoder.up_blocks[0].attentions[2]
    assert torch.equal(attention.to_q.weight, query)
    assert torch.equal(attention.to_k.weight, key)
    assert torch.equal(attention.to_v.weight, value)
    assert torch.equal(vae.decoder.up_blocks[4].resnets[2].conv1.weight, source["decoder.up.0.block.2.conv1.weight"])
    assert torch.equal(vae.quantizer.residual_convs[3].bias, source["quantize.quant_resi.qresi_ls.3.bias"])


def test_imagenet_models_get_class_names(tmp_path):
    state_dict = load_file(TINY_A)
    state_dict["class_emb.weight"] = torch.zeros(1001, 48)
    save_file(state_dict, tmp_path / "imagenet.safetensors")
    names = load_original(tmp_path / "imagenet.safetensors", TOKENIZER).pipeline_config["id2label"]
    assert len(names) == 1000 and names["207"] == "golden retriever"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_read(dtype, tmp_path):
    source = load_file(TINY_B)
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in source.items()}
    save_file(stored, tmp_path / "model.safetensors")
    transformer = load_original(tmp_path / "model.safetensors", TOKENIZER).transformer
    assert transformer.proj_out.weight.dtype == torch.float32
    assert torch.equal(transformer.proj_out.weight, source["head.weight"].to(dtype).float())


def changed(tmp_path: Path, source: Path, **entries: torch.Tensor | None) -> Path:
    """A copy of a file with some tensors replaced, or taken out; `__` stands for a dot."""
    state_dict = load_file(source)
    for name, tensor in entries.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state_dict[key]
        else:
            state_dict[key] = tensor
    path = tmp_path / f"changed_{source.name}"
    save_file(state_dict, path)
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"blocks__1__ffn__fc2__bias": None}, "it lacks blocks.1.ffn.fc2.bias"),
        ({"class_emb__weight": None}, "lacks class_emb.weight, from which the configuration is read"),
        ({"lvl_1L": None}, "lacks lvl_1L"),
        ({"blocks__0__attn__zero_k_bias": None}, "it lacks blocks.0.attn.zero_k_bias"),
        ({"extra__weight": torch.ones(2)}, "it holds extra.weight, which this model does not have"),
        ({"blocks__1__attn__scale_mul_1H11": None}, "it lacks blocks.1.attn.scale_mul_1H11"),
        ({"head__bias": torch.ones(3)}, r"head.bias has shape \(3,\) but must have \(64,\)"),
        ({"pos_start": torch.ones(48)}, r"pos_start has shape \(48,\) but must have 3 axes"),
        ({"head__bias": torch.ones(64).int()}, "head.bias has dtype torch.int32 but must be of a floating dtype"),
        ({"blocks__0__attn__zero_k_bias": torch.ones(48)}, "blocks.0.attn.zero_k_bias must be all zeros"),
        ({"attn_bias_for_masking": torch.zeros(1, 1, 385, 385)}, "must hide later scales and nothing else"),
        ({"lvl_1L": torch.zeros(1, 385).long()}, "lvl_1L must hold 0, 1, 2, ..., each as often as a square"),
        ({"lvl_1L": torch.arange(385)[None].flip(1)}, "lvl_1L must hold 0, 1, 2"),
        ({"lvl_1L": torch.zeros(1, 1).long()}, "lvl_1L has shape|has shape .* but must have"),
    ],
)
def test_incomplete_and_inconsistent_transformers_are_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_original(changed(tmp_path, TINY_A, **entries), TOKENIZER)
    assert "changed_tiny_a" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quant_conv__bias": None}, "it lacks quant_conv.bias"),
        ({"quantize__quant_resi__qresi_ls__2__weight": None}, "it lacks quantize.quant_resi.qresi_ls.2.weight"),
        ({"decoder__conv_in__bias": torch.ones(3)}, r"decoder.conv_in.bias has shape \(3,\) but must have \(128,\)"),
        ({"loss__weight": torch.ones(3)}, "it holds loss.weight"),
        ({"encoder__conv_in__weight": torch.ones(48, 3, 3, 3)}, "must be multiples of its first, 48"),
    ],
)
def test_incomplete_and_inconsistent_tokenizers_are_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_original(TINY_A, changed(tmp_path, TOKENIZER, **entries))
    assert "changed_vae" in str(caught.value)


def test_usage_counts_of_the_codebook_are_ignored(tmp_path):
    expected = load_original(TINY_A, TOKENIZER).vae.state_dict()
    for usage in (None, torch.ones(3, 5)):
        path = changed(tmp_path, TOKENIZER, quantize__ema_vocab_hit_SV=usage)
        vae = load_original(TINY_A, path).vae.state_dict()
        assert all(torch.equal(vae[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("part", "field", "value", "shown"),
    [
        ("transformer", "depth", 3, "2"),
        ("transformer", "embed_dim", 64, "48"),
        ("transformer", "num_heads", 4, "3"),
        ("transformer", "head_dim", 64, "16"),
        ("transformer", "mlp_ratio", 2.0, r"4\.0"),
        ("transformer", "shared_aln", True, "False"),
        ("transformer", "attn_l2_norm", False, "True"),
        ("transformer", "patch_nums", [1, 2, 3], r"\(1, 2, 3, 4, 5, 6, 7, 8, 9, 10\)"),
        ("transformer", "num_classes", 1000, "10"),
        ("tokenizer", "vocab_size", 4096, "64"),
        ("tokenizer", "z_channels", 32, "16"),
        ("tokenizer", "ch", 160, "32"),
        ("tokenizer", "ch_mult", [1, 2, 4], r"\(1, 1, 2, 2, 4\)"),
        ("tokenizer", "num_res_blocks", 3, "2"),
        ("tokenizer", "share_quant_resi", 1, "4"),
        ("tokenizer", "using_znorm", True, "False"),
    ],
)
def test_conflicts_between_config_and_file_name_both_values(part, field, value, shown):
    given_value = repr(tuple(value) if isinstance(value, list) else value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError, match=rf"`config\['{part}'\]\['{field}'\]` is {given_value}, but .* shows {shown}:"
    ):
        load_original(TINY_A, TOKENIZER, config={part: {field: value}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"transformer": {"layers": 2}},
            r"`config\['transformer'\]` has no field 'layers': it has attn_l2_norm, depth",
        ),
        ({"vae": {}}, "`config` must be a dict"),
        ({"transformer": 3}, "`config` must be a dict"),
        ([], "`config` must be a dict"),
        ({"transformer": {"norm_eps": 0}}, r"\['norm_eps'\]` must be a positive number but is 0"),
        ({"tokenizer": {"quant_resi": "half"}}, r"\['quant_resi'\]` must be a positive number but is 'half'"),
        ({"tokenizer": {"quant_resi": 0.0}}, r"\['quant_resi'\]` must be a positive number but is 0.0"),
        ({"tokenizer": {"num_groups": 5}}, "gives no MultiScaleVQModel"),
    ],
)
def test_malformed_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_original(TINY_A, TOKENIZER, config=config)


def test_fields_that_no_file_shows_are_taken_over():
    config = {"transformer": {"norm_eps": 1e-5}, "tokenizer": {"quant_resi": -0.25, "num_groups": 16}}
    original = load_original(TINY_A, TOKENIZER, config=config)
    assert original.transformer.config["norm_eps"] == 1e-5
    assert original.vae.quantizer.residual_convs[0].ratio == 0.25
    assert original.vae.config["norm_num_groups"] == 16


def test_heads_of_models_without_normalised_attention_come_from_config_or_the_width(tmp_path):
    scales = {f"blocks__{index}__attn__scale_mul_1H11": None for index in range(2)}
    narrow = changed(tmp_path, TINY_A, **scales)
    with pytest.raises(ValueError, match="does not show its number of heads, and its width 48 is no multiple of 64"):
        load_original(narrow, TOKENIZER)
    with pytest.raises(ValueError, match="5 heads do not divide the width 48"):
        load_original(narrow, TOKENIZER, config={"transformer": {"num_heads": 5}})
    with pytest.raises(ValueError, match=r"\['num_heads'\]` must be a positive whole number but is 0"):
        load_original(narrow, TOKENIZER, config={"transformer": {"num_heads": 0}})
    transformer = load_original(narrow, TOKENIZER, config={"transformer": {"num_heads": 4}}).transformer
    assert (transformer.config["num_attention_heads"], transformer.config["attention_head_dim"]) == (4, 12)
    assert transformer.config["attn_l2_norm"] is False
    assert transformer.transformer_blocks[0].attn.logit_scale == 0.25 / 12**0.5
    wide = load_original(changed(tmp_path, TINY_B, **scales), TOKENIZER).transformer
    assert (wide.config["num_attention_heads"], wide.config["attention_head_dim"]) == (1, 64)


@pytest.mark.parametrize(("share", "name", "count"), [(1, "qresi", 1), (0, "{}", 5)])
def test_other_banks_of_residual_convolutions(share, name, count, tmp_path):
    state_dict = load_file(TOKENIZER)
    old = [key for key in state_dict if key.startswith("quantize.quant_resi.")]
    weight, bias = (
        state_dict["quantize.quant_resi.qresi_ls.1.weight"],
        state_dict["quantize.quant_resi.qresi_ls.1.bias"],
    )
    for key in old:
        del state_dict[key]
    for index in range(count):
        state_dict[f"quantize.quant_resi.{name.format(index)}.weight"] = weight + index
        state_dict[f"quantize.quant_resi.{name.format(index)}.bias"] = bias.clone()
    save_file(state_dict, tmp_path / "bank.safetensors")
    config = {"tokenizer": {"share_quant_resi": share}}
    vae = load_original(TINY_A, tmp_path / "bank.safetensors", config=config).vae
    assert vae.config["num_residual_convs"] == count
    for index in range(count):
        assert torch.equal(vae.quantizer.residual_convs[index].weight, weight + index)


FOREIGN = {
    "an image tokenizer of Infinity": ["encoder.down.0.block.0.conv1.conv.weight", "quantizer.lfq.mask"],
    "an autoencoder of diffusers": ["encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"],
    "a Stable Diffusion VAE": ["encoder.down.0.block.0.conv1.weight", "quant_conv.weight"],
    "a VQGAN, without the residual convolutions of VAR": ["encoder.down.0.block.0.x", "quantize.embedding.weight"],
    "a whole Stable Diffusion checkpoint": ["model.diffusion_model.time_embed.0.weight"],
    "a diffusion transformer of diffusers": ["transformer_blocks.0.attn1.to_q.weight"],
    "a transformer that this package has converted already": ["transformer_blocks.0.attn.to_qkv.weight"],
    "an image tokenizer that this package has converted already": ["quantizer.residual_convs.0.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("transformer", "a VAR transformer or an Infinity transformer"),
        ("tokenizer", "the image tokenizer of VAR"),
    ],
)
def test_foreign_files_are_named(kind, argument, wanted, tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.ones(1) for key in FOREIGN[kind]}, path)
    arguments = {"transformer": TINY_A, "tokenizer": TOKENIZER, argument: path}
    with pytest.raises(ValueError, match=f"`{argument}` must be {wanted}, but .*foreign.safetensors is {kind}"):
        load_original(**arguments)


def test_unknown_files_show_their_keys(tmp_path):
    save_file({"layer.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is of no known kind; its keys are layer.weight"):
        load_original(tmp_path / "other.safetensors", TOKENIZER)


def test_swapped_arguments_are_noticed():
    with pytest.raises(ValueError, match="is the image tokenizer of VAR. Are `transformer` and `tokenizer` swapped"):
        load_original(TOKENIZER, TINY_A)
    with pytest.raises(
        ValueError, match="`tokenizer` must be the image tokenizer of VAR, but .* is a VAR transformer"
    ):
        load_original(TINY_A, TINY_B)


def test_files_of_different_models_are_noticed(tmp_path):
    wider = changed(tmp_path, TINY_A, head__weight=torch.ones(65, 48), head__bias=torch.ones(65))
    with pytest.raises(ValueError, match="do not belong together: `vocab_size` is 65 in the transformer but 64"):
        load_original(wider, TOKENIZER)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float64])
def test_dtypes_that_weights_cannot_have_are_refused(dtype, tmp_path):
    for call in (load_original, lambda *files, dtype: convert_original(*files, tmp_path / "out", dtype=dtype)):
        with pytest.raises(ValueError, match="`dtype` must be one of torch.float32, torch.float16, torch.bfloat16"):
            call(TINY_A, TOKENIZER, dtype=dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_converted_folder_is_what_save_pretrained_writes(dtype, max_shard_size, tmp_path):
    pipe = HackVARPipeline.from_original(TINY_A, TOKENIZER, dtype=dtype)
    pipe.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    # A converter knows nothing to say on a card.
    (tmp_path / "saved" / "README.md").unlink()
    folder = convert_original(
        TINY_A, TOKENIZER, tmp_path / "converted", dtype=dtype, max_shard_size=max_shard_size, progress=False
    )
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert names == sorted(str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*"))
    for name in names:
        ours, theirs = folder / name, tmp_path / "saved" / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), name
        elif name.endswith(".safetensors"):
            got, expected = load_file(ours), load_file(theirs)
            assert got.keys() == expected.keys()
            for key in expected:
                assert got[key].dtype == expected[key].dtype and torch.equal(got[key], expected[key]), key
    check_weights(folder, ["transformer", "vae"])
    again = HackVARPipeline.from_pretrained(folder, dtype=dtype)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor), name


def test_conversion_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for output in (tmp_path / "used", tmp_path / "used" / "notes.txt"):
        with pytest.raises(ValueError, match="exists already: name a new folder"):
            convert_original(TINY_A, TOKENIZER, output)
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert convert_original(TINY_A, TOKENIZER, tmp_path / "empty", progress=False) == tmp_path / "empty"
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_failed_conversion_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="Got 'much'"):
        convert_original(TINY_A, TOKENIZER, tmp_path / "deep" / "out", max_shard_size="much", progress=False)
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(ValueError, match="is a VAR transformer"):
        convert_original(TINY_A, TINY_B, tmp_path / "other" / "out")
    assert not (tmp_path / "other").exists()


PEAK_SCRIPT = """
import sys, torch
from hack_pipelines import HackVARPipeline
from hack_pipelines.convert import convert_original

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
convert_original(sys.argv[1], sys.argv[2], sys.argv[3], dtype=getattr(torch, sys.argv[4]), progress=False)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("style", ["zip", "old"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_conversion_stays_near_the_size_of_the_file(style, dtype, tmp_path):
    shapes = released_transformer(11, SIDES_256, False, codes=64, channels=16)
    real = outlined(shapes, SIDES_256)
    state_dict = {key: torch.full(value.shape, 0.5) if value.is_meta else value for key, value in real.items()}
    path = tmp_path / "large.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=style == "zip")
    size = path.stat().st_size
    assert size > 380e6
    command = [sys.executable, "-c", PEAK_SCRIPT, path, TOKENIZER, tmp_path / "out", dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1.3 * size
