"""Finding models: the real client of the Hub against a small server on this machine."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hack_pipelines import HackVARPipeline
from hack_pipelines.hub import locate, sources
from hack_pipelines.hub.checks import check_weights

from .components import tiny_pipeline
from .conftest import FIXTURES


VAR = "FoundationVision/var"
PARTS = ["transformer", "vae"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline folder with plain weights and a bfloat16 variant."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    pipe.to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A folder of one's own to damage."""
    folder = tmp_path / "copy"
    for path in saved.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_pth(name: str) -> bytes:
    buffer = io.BytesIO()
    state_dict = load_file(FIXTURES / "var" / name)
    torch.save({key: value if key == "lvl_1L" else value.float() for key, value in state_dict.items()}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original_files() -> dict[str, bytes]:
    """Tiny models under the names of the released ones; two variants that differ."""
    return {
        "README.md": b"original",
        "var_d16.pth": as_pth("tiny_b.safetensors"),
        "var_d36.pth": as_pth("tiny_a.safetensors"),
        "vae_ch160v4096z32.pth": as_pth("vae.safetensors"),
    }


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=1, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_hub_repo_in_diffusers_layout_generates_what_the_folder_does(hub, saved):
    extra = {"transformer/pytorch_model.bin": b"pickle", "pipeline.py": b"code", "transformer/code.py": b"code"}
    hub.commit("org/tiny", {**files_of(saved), **extra})
    images = draw(HackVARPipeline.from_pretrained("org/tiny"))
    assert torch.equal(images, draw(HackVARPipeline.from_pretrained(saved)))
    assert sorted(hub.fetched()) == [
        "README.md",
        "model_index.json",
        "transformer/config.json",
        f"transformer/{WEIGHTS}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
    ]


def test_variant_fetches_its_own_weights_only(hub, saved):
    hub.commit("org/tiny", saved)
    source = locate("org/tiny", variant="bf16")
    assert source.variant == "bf16"
    weights = sorted(path.name for path in source.folder.glob("*/*.safetensors"))
    assert weights == ["diffusion_pytorch_model.bf16.safetensors"] * 2
    pipe = HackVARPipeline.from_pretrained("org/tiny", variant="bf16", dtype=torch.bfloat16)
    assert pipe.transformer.proj_out.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'org/tiny' has no weight files of variant 'fp8'"):
        HackVARPipeline.from_pretrained("org/tiny", variant="fp8")


def test_component_without_the_variant_is_fetched_without_one(hub, saved):
    files = files_of(saved)
    del files["vae/diffusion_pytorch_model.bf16.safetensors"]
    hub.commit("org/tiny", files)
    folder = locate("org/tiny", variant="bf16").folder
    HackVARPipeline.from_pretrained("org/tiny", variant="bf16")
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.safetensors")) == [
        "transformer/diffusion_pytorch_model.bf16.safetensors",
        f"vae/{WEIGHTS}",
    ]


def test_revision_is_a_branch_or_a_commit(hub, saved, copy):
    first = hub.commit("org/tiny", saved)
    weights = load_file(copy / "transformer" / WEIGHTS)
    weights["proj_out.bias"] += torch.linspace(0, 9, 32)
    save_file(weights, copy / "transformer" / WEIGHTS, metadata={"format": "pt"})
    hub.commit("org/tiny", copy, ref="v2")
    bias = HackVARPipeline.from_pretrained("org/tiny", revision="v2").transformer.proj_out.bias
    assert torch.equal(bias, weights["proj_out.bias"])
    assert locate("org/tiny", revision=first).folder.name == first
    with pytest.raises(ValueError, match="'org/tiny' has no revision 'v3'"):
        HackVARPipeline.from_pretrained("org/tiny", revision="v3")


def test_second_call_works_offline(hub, saved, monkeypatch):
    hub.commit("org/tiny", saved)
    online = draw(HackVARPipeline.from_pretrained("org/tiny"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(draw(HackVARPipeline.from_pretrained("org/tiny")), online)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.requests.clear()
    assert torch.equal(draw(HackVARPipeline.from_pretrained("org/tiny", local_files_only=True)), online)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["org/tiny", VAR])
def test_offline_without_a_cache_says_so(hub, name, monkeypatch):
    variant = "d16" if name == VAR else None
    with pytest.raises(ConnectionError, match="not, or not completely, in the cache"):
        locate(name, variant=variant, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="unset HF_HUB_OFFLINE"):
        locate(name, variant=variant)
    assert hub.requests == []


def test_unreachable_hub_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="There is no folder 'org/tiny' here: check the path"):
        locate("org/tiny")


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_missing_repo_names_what_was_looked_for(hub, name):
    with pytest.raises(
        ValueError, match=f"'{name}' is neither a folder here nor a Hub repo that you can see"
    ) as caught:
        HackVARPipeline.from_pretrained(name)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["./absent", "a/b/c", "no such name"])
def test_paths_that_do_not_exist_are_no_repo_names(hub, name):
    with pytest.raises(ValueError, match="neither a folder here nor a name that a Hub repo can have"):
        locate(name)
    assert hub.requests == []


def test_private_and_gated_repos(hub, saved):
    hub.commit("org/private", saved)
    hub.repos["org/private"].token = "hf_right"
    with pytest.raises(ValueError, match="give `token` if it is private"):
        locate("org/private", token="hf_wrong")
    assert (locate("org/private", token="hf_right").folder / "model_index.json").is_file()
    hub.commit("org/gated", saved)
    hub.repos["org/gated"].gated = True
    with pytest.raises(ValueError, match="gated: accept its terms"):
        locate("org/gated")


def test_repo_without_an_index_or_with_pickles_only(hub, saved):
    hub.commit("org/other", {"weights.pth": b"pickle", "README.md": b""})
    with pytest.raises(ValueError, match="'org/other' has no model_index.json"):
        HackVARPipeline.from_pretrained("org/other")
    files = {path: content for path, content in files_of(saved).items() if not path.endswith(".safetensors")}
    hub.commit("org/pickled", {**files, "transformer/diffusion_pytorch_model.bin": b"pickle"})
    with pytest.raises(ValueError, match="pickle files are neither fetched nor read"):
        HackVARPipeline.from_pretrained("org/pickled")
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".pth"))]


def test_odd_variants_are_refused(hub):
    for variant in ("*", "../x", "", "a/b"):
        with pytest.raises(ValueError, match="`variant` must be a name"):
            locate("org/tiny", variant=variant)


def test_original_repo_is_converted_once(hub, original_files, monkeypatch):
    commit = hub.commit(VAR, original_files)
    source = locate(VAR, variant="d16")
    assert source.variant is None and commit in source.folder.parts
    expected = load_file(FIXTURES / "var" / "tiny_b_expected.safetensors")
    pipe = HackVARPipeline.from_pretrained(VAR, variant="d16")
    pipe.set_progress_bar_config(disable=True)
    output = pipe(class_labels=[1, 8], guidance_scale=3.0, top_k=1, top_p=1.0, output_type="pt")
    assert torch.equal(torch.cat(output.tokens, dim=1).int(), expected["greedy.tokens"])
    assert hub.fetched() == ["README.md", "var_d16.pth", "vae_ch160v4096z32.pth"]

    written = (source.folder / "model_index.json").stat().st_mtime_ns
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(VAR.upper(), variant="d16") == source
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate(VAR, variant="d16", local_files_only=True) == source
    assert locate(VAR, variant="d16") == source
    assert hub.fetched() == []
    assert (source.folder / "model_index.json").stat().st_mtime_ns == written

    other = locate(VAR, variant="d36").folder
    assert json.loads((other / "transformer" / "config.json").read_text())["patch_nums"] == list(range(1, 11))
    assert other.parent == source.folder.parent


def test_original_repo_at_another_revision_is_another_model(hub, original_files):
    first = locate_after(hub, original_files, "main")
    second = locate_after(hub, {**original_files, "var_d16.pth": original_files["var_d36.pth"]}, "v2")
    assert first != second
    assert json.loads((second / "transformer" / "config.json").read_text())["shared_aln"] is False
    with pytest.raises(ValueError, match="has no revision 'v3'"):
        locate(VAR, variant="d16", revision="v3")


def locate_after(hub, files, ref) -> Path:
    hub.commit(VAR, files, ref=ref)
    return locate(VAR, variant="d16", revision=ref).folder


@pytest.mark.parametrize("variant", [None, "d18", "fp16"])
def test_original_repo_needs_one_of_its_variants(hub, variant):
    with pytest.raises(ValueError, match="must be one of d16, d20, d24, d30, d36 but is") as caught:
        HackVARPipeline.from_pretrained(VAR, variant=variant)
    assert repr(variant) in str(caught.value)
    assert hub.requests == []


def test_original_repo_that_lacks_a_file(hub, original_files):
    hub.commit(VAR, {name: content for name, content in original_files.items() if not name.startswith("vae")})
    with pytest.raises(ValueError, match="lacks a file that is needed.*vae_ch160v4096z32.pth"):
        locate(VAR, variant="d16")


def test_failed_conversion_leaves_nothing_and_can_be_repeated(hub, original_files):
    cut = original_files["var_d16.pth"][:5000]
    hub.commit(VAR, {**original_files, "var_d16.pth": cut}, ref="broken")
    with pytest.raises(ValueError, match="var_d16.pth is cut short"):
        locate(VAR, variant="d16", revision="broken")
    converted = Path(constants.HF_HOME) / "hack_pipelines"
    assert [path for path in converted.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    hub.commit(VAR, original_files)
    folder = locate(VAR, variant="d16").folder
    check_weights(folder, PARTS)


def test_what_a_killed_conversion_left_is_removed(hub, original_files):
    commit = hub.commit(VAR, original_files)
    unfinished = Path(constants.HF_HOME, "hack_pipelines", "converted-v1", "FoundationVision--var", commit, ".d16.abc")
    (unfinished / "vae").mkdir(parents=True)
    check_weights(locate(VAR, variant="d16").folder, PARTS)
    assert not unfinished.exists()


def test_two_at_once_convert_once(hub, original_files):
    hub.commit(VAR, original_files)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(locate(VAR, variant="d16").folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    check_weights(folders[0], PARTS)
    assert sorted(path.name for path in folders[0].parent.iterdir() if path.suffix != ".lock") == ["d16"]


def test_forced_download_converts_again(hub, original_files):
    hub.commit(VAR, original_files)
    folder = locate(VAR, variant="d16").folder
    (folder / "vae" / WEIGHTS).unlink()
    hub.requests.clear()
    assert locate(VAR, variant="d16", force_download=True).folder == folder
    check_weights(folder, PARTS)
    assert "var_d16.pth" in hub.fetched()


def test_cache_dir_holds_downloads_and_conversions(hub, original_files, tmp_path):
    hub.commit(VAR, original_files)
    folder = locate(VAR, variant="d16", cache_dir=tmp_path / "mine").folder
    assert folder.is_relative_to(tmp_path / "mine")
    assert not Path(constants.HF_HOME).exists()


@pytest.mark.slow
def test_environment_variables_of_the_client(hub, saved, tmp_path):
    hub.commit("org/tiny", saved)
    script = "from hack_pipelines.hub import locate; print(locate('org/tiny').folder)"
    # What this machine says about the client's folders would come before what the test says.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "fresh")}

    def run(**extra):
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, **extra},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    assert "ConnectionError" in run(HF_HUB_OFFLINE="1").stderr
    online = run()
    assert online.stdout.startswith(str(tmp_path / "fresh")), online.stderr
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == online.stdout
    assert hub.requests == []


def test_local_folder_comes_first_and_files_are_refused(hub, saved, tmp_path):
    assert locate(saved) == sources.Source(saved, None)
    assert locate(str(saved), variant="bf16").variant == "bf16"
    path = tmp_path / "var_d16.pth"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file: open original files with `HackVARPipeline.from_original`"):
        locate(path)
    assert hub.requests == []


def test_demo_is_inside_the_package_or_the_installation_is_incomplete(hub, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="installation is incomplete"):
        locate("demo-class")
    (tmp_path / "class").symlink_to(saved)
    assert locate("demo-class") == sources.Source(tmp_path / "class", None)
    assert hub.requests == []


def change_index(folder: Path, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_weights(folder: Path, part: str, change):
    path = folder / part / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def shard(folder: Path):
    tiny_pipeline().save_pretrained(folder, max_shard_size="100KB")
    (folder / "transformer" / WEIGHTS).unlink(missing_ok=True)
    return folder / "transformer" / f"{WEIGHTS}.index.json"


def test_whole_folders_pass(saved, copy):
    check_weights(saved, PARTS)
    check_weights(saved, PARTS, "bf16")
    shard(copy)
    check_weights(copy, PARTS)


def test_only_the_named_components_are_checked(copy):
    (copy / "vae" / WEIGHTS).unlink()
    check_weights(copy, ["transformer", "id2label", "sampling"])
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        check_weights(copy, PARTS)


def test_missing_unexpected_and_misshapen_weights_are_named(copy):
    name = "transformer_blocks.1.attn.to_qkv.weight"
    change_weights(copy, "transformer", lambda weights: weights.update({name: torch.zeros(5, 7)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(5, 7\) but must have \(192, 64\)"):
        check_weights(copy, PARTS)
    change_weights(copy, "transformer", lambda weights: weights.update({name: torch.zeros(192, 64).int()}))
    with pytest.raises(ValueError, match=f"{name} has dtype I32 but must be of a floating dtype"):
        check_weights(copy, PARTS)
    change_weights(copy, "transformer", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=rf"lacks {name}, which must have shape \(192, 64\)"):
        HackVARPipeline.from_pretrained(copy)
    change_weights(
        copy, "transformer", lambda weights: weights.update({name: torch.zeros(192, 64), "x.y": torch.ones(3)})
    )
    with pytest.raises(ValueError, match=r"x\.y, of shape \(3,\), is not part of the VARTransformer2DModel"):
        check_weights(copy, PARTS)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_files_are_refused(copy, keep):
    path = copy / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is cut short or damaged"):
        check_weights(copy, PARTS)


def test_missing_and_escaping_shards_are_refused(copy, tmp_path):
    index_path = shard(copy)
    index = json.loads(index_path.read_text())
    name = next(iter(index["weight_map"]))
    (tmp_path / "evil.safetensors").write_bytes((copy / "transformer" / index["weight_map"][name]).read_bytes())
    for file in (
        "../../evil.safetensors",
        "../evil.safetensors",
        str(tmp_path / "evil.safetensors"),
        "a\\evil.safetensors",
        "..",
    ):
        changed = {**index, "weight_map": {**index["weight_map"], name: file}}
        index_path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="it may only name .safetensors files beside it") as caught:
            HackVARPipeline.from_pretrained(copy)
        assert repr(file) in str(caught.value)
    index_path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: "absent.safetensors"}}))
    with pytest.raises(ValueError, match="has no absent.safetensors"):
        check_weights(copy, PARTS)
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    index_path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(ValueError, match=f"says that {name} is in {other}, but it is not"):
        check_weights(copy, PARTS)
    index_path.write_text(json.dumps({"weight_map": ["x"]}))
    with pytest.raises(ValueError, match="`weight_map` must hold the file of every weight"):
        check_weights(copy, PARTS)


def test_weight_map_of_a_hub_repo_cannot_leave_the_folder(hub, copy):
    index_path = shard(copy)
    index = json.loads(index_path.read_text())
    index["weight_map"]["proj_out.bias"] = "../vae/diffusion_pytorch_model.safetensors"
    index_path.write_text(json.dumps(index))
    hub.commit("org/evil", copy)
    with pytest.raises(ValueError, match="names '../vae/diffusion_pytorch_model.safetensors'"):
        HackVARPipeline.from_pretrained("org/evil")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], "only classes of diffusers, hack_pipelines, transformers are loaded"),
        (["diffusers_modules.local.evil", "Evil"], "could run code"),
        (["hack_pipelines_evil.models", "Evil"], "could run code"),
        (["hack_pipelines.models.transformer_var", "Newer"], "this version of hack_pipelines does not have"),
    ],
)
def test_classes_from_elsewhere_are_refused(copy, entry, message):
    change_index(copy, transformer=entry)
    with pytest.raises(ValueError, match=message) as caught:
        HackVARPipeline.from_pretrained(copy)
    assert entry[0] in str(caught.value)


def test_component_names_are_folders_beside_the_index(copy):
    change_index(copy, **{"../transformer": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ValueError, match="names a component '../transformer'"):
        check_weights(copy, PARTS)


def test_damaged_json_is_named(copy):
    config = copy / "transformer" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "num_attention_heads": "many"}))
    with pytest.raises(ValueError, match="config.json is not the configuration of a VARTransformer2DModel"):
        check_weights(copy, PARTS)
    for text in ("{", "[]", "\x00"):
        config.write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged"):
            check_weights(copy, PARTS)
    config.unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        check_weights(copy, PARTS)


def test_pickles_beside_missing_weights_are_named(copy):
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle files \(there is diffusion_pytorch_model.bin\) are neither"):
        HackVARPipeline.from_pretrained(copy)


def test_unknown_variant_lists_the_known_ones(copy):
    with pytest.raises(ValueError, match="no weight files of variant 'fp16': it has bf16"):
        HackVARPipeline.from_pretrained(copy, variant="fp16")
