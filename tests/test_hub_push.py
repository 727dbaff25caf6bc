"""The way to the Hub and back: the real client of the Hub against a small server on this machine."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hack_pipelines import HackVARPipeline, HeadProfile
from hack_pipelines.cli import main
from hack_pipelines.hub.cards import is_unedited
from hack_pipelines.hub.registry import RELEASED_PROFILES, split_reference

from .components import planted_profile, tiny_pipeline, tiny_text_pipeline
from .test_hub import VAR, WEIGHTS, draw, files_of, original_files, saved


__all__ = ["original_files", "saved"]

TOKEN = {"token": "hf_write"}
PIPELINE_FILES = [
    ".gitattributes",
    "README.md",
    "head_profile/README.md",
    "head_profile/config.json",
    "head_profile/head_map.png",
    "head_profile/profile.safetensors",
    "model_index.json",
    "transformer/config.json",
    f"transformer/{WEIGHTS}",
    "vae/config.json",
    f"vae/{WEIGHTS}",
]


def profile_for(pipe, seed: int = 0) -> HeadProfile:
    geometry = pipe.geometry()
    return planted_profile(geometry.schedule, geometry.num_layers, geometry.num_heads, geometry.head_dim, seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.load_head_profile(profile_for(pipe))
    return pipe


def card_of(hub, repo: str, path: str = "README.md", revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo].files(revision)[path].decode())


# Pipelines


def test_pushed_pipeline_comes_back_with_its_profile(hub, pipe):
    info = pipe.push_to_hub("org/tiny", license="mit", tag="v1", commit_message="First", **TOKEN)
    repo = hub.repos["org/tiny"]
    assert sorted(repo.files()) == PIPELINE_FILES
    # One for the empty repo, one for everything: nobody can read half a model.
    assert len(repo.commits) == 2 and repo.messages == ["First"]
    assert repo.refs == {"main": info.oid, "v1": info.oid} and repo.tags == {"v1"}
    assert info.commit_url == f"{hub.url}/org/tiny/commit/{info.oid}"
    back = HackVARPipeline.from_pretrained("org/tiny", revision="v1")
    assert back.head_profile == pipe.head_profile
    arguments = {"class_labels": 1, "kv_budget": 0.5, "method": "hack", "output_type": "pt"}
    images = []
    for each in (pipe, back):
        each.set_progress_bar_config(disable=True)
        images.append(each(generator=torch.Generator().manual_seed(0), **arguments).images)
    assert torch.equal(*images)


def test_card_of_a_pipeline(hub, pipe):
    pipe.push_to_hub("org/tiny", license="mit", base_model="FoundationVision/var", tag="v1", **TOKEN)
    card = card_of(hub, "org/tiny")
    assert card.data.to_dict() == {
        "library_name": "hack_pipelines",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["visual-autoregressive", "kv-cache-compression", "diffusers"],
        "license": "mit",
        "base_model": "FoundationVision/var",
    }
    for text in (
        "# tiny\n",
        'HackVARPipeline.from_pretrained("org/tiny", revision="v1")',
        "kv_budget=0.3",
        "| sides of the token maps | 1 2 3 4 (30 tokens) |",
        "| layers, heads a layer, channels a head | 3, 4, 16 |",
        "| transformer | VARTransformer2DModel, 0.2 M parameters, float32 |",
        "![Head types by layer and head](head_profile/head_map.png)",
        "was recorded over one image in float32",
    ):
        assert text in card.text, text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_card_of_a_text_pipeline_and_of_an_unknown_licence(hub, caplog):
    pipe = tiny_text_pipeline(with_text_encoder=False)
    pipe.register_to_config(default_head_profile="org/profile@v1")
    with caplog.at_level(logging.WARNING):
        pipe.push_to_hub("org/text", **TOKEN)
    assert "The card names no licence of the weights" in caplog.text
    card = card_of(hub, "org/text")
    assert card.data.license is None and card.data.pipeline_tag == "text-to-image"
    assert "Its head profile is [org/profile@v1](https://huggingface.co/org/profile)." in card.text


def test_card_of_an_original_model_names_origin_and_licence(hub, original_files, tmp_path):
    hub.commit(VAR, original_files)
    HackVARPipeline.from_pretrained(VAR, variant="d16").save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "mit" and card.data.base_model == VAR


def test_save_pretrained_keeps_a_card_and_pushes_the_folder(hub, pipe, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "README.md").write_text("mine\n")
    pipe.save_pretrained(tmp_path / "tiny", push_to_hub=True, private=True, **TOKEN)
    assert {**files_of(tmp_path / "tiny"), ".gitattributes": b"*.safetensors filter=lfs"} == hub.repos[
        "user/tiny"
    ].files()
    assert hub.repos["user/tiny"].files()["README.md"] == b"mine\n"
    assert hub.repos["user/tiny"].private
    with pytest.raises(TypeError, match="takes private with `push_to_hub=True` only"):
        pipe.save_pretrained(tmp_path / "other", private=True)
    with pytest.raises(ValueError, match="pickle files can run code"):
        pipe.save_pretrained(tmp_path / "other", safe_serialization=False, push_to_hub=True)
    assert not (tmp_path / "other").exists()


def test_edited_card_is_kept_and_an_unedited_one_renewed(hub, pipe, caplog):
    pipe.push_to_hub("org/tiny", license="mit", **TOKEN)
    pipe.push_to_hub("org/tiny", license="apache-2.0", **TOKEN)
    assert card_of(hub, "org/tiny").data.license == "apache-2.0"
    files = hub.repos["org/tiny"].files()
    edited = files["README.md"].replace(b"# tiny", b"# My tiny model")
    hub.commit("org/tiny", {**files, "README.md": edited})
    with caplog.at_level(logging.WARNING):
        pipe.push_to_hub("org/tiny", license="mit", **TOKEN)
    assert hub.repos["org/tiny"].files()["README.md"] == edited
    assert "'org/tiny' keeps its README.md, which somebody edited: `replace_card` writes over it" in caplog.text
    pipe.push_to_hub("org/tiny", license="mit", replace_card=True, **TOKEN)
    assert card_of(hub, "org/tiny").data.license == "mit"


def test_weights_in_other_shards_leave_no_old_ones_behind(hub, pipe):
    pipe.push_to_hub("org/tiny", license="mit", max_shard_size="100KB", **TOKEN)
    sharded = hub.repos["org/tiny"].files()
    assert f"transformer/{WEIGHTS}.index.json" in sharded and f"transformer/{WEIGHTS}" not in sharded
    HackVARPipeline.from_pretrained("org/tiny")
    hub.commit("org/tiny", {**sharded, "transformer/diffusion_pytorch_model.bf16.safetensors": b"", "notes.txt": b""})
    pipe.push_to_hub("org/tiny", license="mit", **TOKEN)
    kept = ["notes.txt", "transformer/diffusion_pytorch_model.bf16.safetensors"]
    assert sorted(hub.repos["org/tiny"].files()) == sorted([*PIPELINE_FILES, *kept])


def test_branch_and_pull_request(hub, pipe):
    pipe.push_to_hub("org/tiny", license="mit", revision="experiment", **TOKEN)
    repo = hub.repos["org/tiny"]
    assert sorted(repo.files()) == [".gitattributes"] and sorted(repo.files("experiment")) == PIPELINE_FILES
    info = pipe.push_to_hub("org/tiny", license="mit", create_pr=True, **TOKEN)
    assert sorted(repo.files()) == [".gitattributes"] and info.pr_url.startswith(f"{hub.url}/org/tiny/discussions/")


@pytest.mark.parametrize(
    ("repo", "arguments", "message"),
    [
        ("a/b/c", TOKEN, "'a/b/c' is neither a folder here nor a name that a Hub repo can have"),
        ("org/tiny", {**TOKEN, "create_pr": True, "tag": "v1"}, "leave `tag` and `revision` out"),
        ("org/tiny", {**TOKEN, "results": "."}, "`results` must be the folder of a `hack-pipelines compare`"),
        ("org/tiny", {}, "does not let you write to 'org/tiny' .*: log in with `hf auth login`"),
        ("org/tiny", {"token": "hf_read"}, "does not let you write to 'org/tiny' .* a `token` that may"),
    ],
)
def test_refused_pushes_make_nothing(hub, pipe, repo, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub(repo, license="mit", **arguments)
    assert hub.repos == {} and not any("commit" in path for path in hub.written())


def test_tag_that_is_taken_is_refused_before_the_upload(hub, pipe):
    first = pipe.push_to_hub("org/tiny", license="mit", tag="v1", **TOKEN)
    hub.requests.clear()
    with pytest.raises(ValueError, match="'org/tiny' has a revision 'v1' already"):
        pipe.push_to_hub("org/tiny", license="mit", tag="v1", **TOKEN)
    assert hub.written() == ["/api/repos/create"] and hub.repos["org/tiny"].refs["v1"] == first.oid


def test_push_outlasts_a_busy_hub(hub, pipe):
    for request in ("POST /api/repos/create", "POST .*/commit/main", "POST .*/tag/"):
        hub.fault(request, status=503, headers={"Retry-After": "0"})
    pipe.push_to_hub("org/tiny", license="mit", tag="v1", **TOKEN)
    assert hub.faults == [] and len(hub.repos["org/tiny"].commits) == 2
    assert hub.repos["org/tiny"].tags == {"v1"}


# Profiles


def test_pushed_profile_comes_back(hub, pipe):
    profile = pipe.head_profile
    profile.push_to_hub("org/profile", tag="v1", **TOKEN)
    other = profile_for(pipe, seed=1)
    other.push_to_hub("org/profile", commit_message="Another", **TOKEN)
    assert sorted(hub.repos["org/profile"].files()) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "head_map.png",
        "profile.safetensors",
    ]
    assert hub.repos["org/profile"].messages == ["Upload head profile", "Another"]
    assert HeadProfile.from_pretrained("org/profile") == other
    assert HeadProfile.from_pretrained("org/profile", revision="v1") == profile
    assert HeadProfile.from_pretrained("org/profile@v1") == profile
    with pytest.raises(ValueError, match="names another revision than `revision`, which is 'main'"):
        HeadProfile.from_pretrained("org/profile@v1", revision="main")
    card = card_of(hub, "org/profile", revision="v1")
    assert card.data.license == "apache-2.0" and card.data.library_name == "hack_pipelines"
    assert 'pipe.load_head_profile("org/profile", revision="v1")' in card.text
    assert "![Head types by layer and head](head_map.png)" in card.text


def test_edited_card_of_a_profile_is_kept(hub, pipe):
    pipe.head_profile.push_to_hub("org/profile", license="mit", **TOKEN)
    files = hub.repos["org/profile"].files()
    assert card_of(hub, "org/profile").data.license == "mit"
    hub.commit("org/profile", {**files, "README.md": files["README.md"] + b"\nMine."})
    pipe.head_profile.push_to_hub("org/profile", **TOKEN)
    assert hub.repos["org/profile"].files()["README.md"].endswith(b"\nMine.")
    pipe.head_profile.push_to_hub("org/profile", replace_card=True, **TOKEN)
    assert card_of(hub, "org/profile").data.license == "apache-2.0"


def test_cards_tell_whether_they_were_edited(pipe):
    text = str(pipe.head_profile.generate_model_card())
    assert is_unedited(text) and is_unedited(text.replace("\n", "\r\n"))
    assert not is_unedited(text.replace("kv_budget=0.3", "kv_budget=0.1"))
    assert not is_unedited(f"{text}\nmore") and not is_unedited("") and not is_unedited("# mine")


def test_results_of_a_comparison_are_in_the_card(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    folder = tmp_path / "compared"
    argv = ["compare", "1", "--model", str(tmp_path / "model"), "--methods", "hack", "random", "--budgets", "0.5"]
    assert main([*argv, "--images", "2", "-o", str(folder)]) == 0
    pipe.push_to_hub("org/tiny", license="mit", results=folder, **TOKEN)
    text = card_of(hub, "org/tiny").text
    assert "## Results" in text and "| method | 0.5 |" in text
    assert "| hack |" in text and "| random |" in text
    pipe.head_profile.push_to_hub("org/profile", results=folder, **TOKEN)
    assert "| random |" in card_of(hub, "org/profile").text


# Which profile a pipeline gets


@pytest.fixture
def profiles(hub, pipe) -> dict[str, HeadProfile]:
    """Profiles that differ, by how they come to a pipeline; that of the registry lies under its tag."""
    found = {name: profile_for(pipe, seed) for seed, name in enumerate(("asked", "named", "folder"))}
    for name in ("asked", "named"):
        found[name].push_to_hub(f"org/{name}", tag="v1", **TOKEN)
    return found


def test_order_of_profiles(hub, saved, profiles, tmp_path):
    files = files_of(saved)
    index = json.loads(files["model_index.json"])
    assert index["default_head_profile"] is None
    named = {**files, "model_index.json": json.dumps({**index, "default_head_profile": "org/named@v1"}).encode()}
    hub.commit("org/plain", files)
    hub.commit("org/names", named)
    profiles["folder"].save_pretrained(tmp_path / "profile")
    own = {f"head_profile/{name}": content for name, content in files_of(tmp_path / "profile").items()}
    hub.commit("org/carries", {**named, **own})

    def got(repo: str, **kwargs):
        return HackVARPipeline.from_pretrained(repo, **kwargs).head_profile

    assert got("org/plain") is None
    assert got("org/names") == profiles["named"]
    assert got("org/plain", default_head_profile="org/named") == profiles["named"]
    assert got("org/carries") == profiles["folder"]
    assert got("org/carries", head_profile="org/asked@v1") == profiles["asked"]
    assert got("org/carries", head_profile=profiles["asked"]) is profiles["asked"]
    assert got("org/names", head_profile=False) is None
    with pytest.raises(ValueError, match="`head_profile` must be a folder, a Hub repo, a `HeadProfile` or `False`"):
        got("org/plain", head_profile=True)


def test_model_index_without_a_named_profile_still_loads(copy_of_saved):
    path = copy_of_saved / "model_index.json"
    index = json.loads(path.read_text())
    del index["default_head_profile"]
    path.write_text(json.dumps(index))
    pipe = HackVARPipeline.from_pretrained(copy_of_saved)
    assert pipe.config["default_head_profile"] is None and pipe.head_profile is None


@pytest.fixture
def copy_of_saved(saved, tmp_path) -> Path:
    for name, content in files_of(saved).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


def test_named_profile_that_is_missing_is_an_error_before_weights_are_read(hub, copy_of_saved):
    pipe = tiny_pipeline()
    pipe.register_to_config(default_head_profile="org/absent@v1")
    pipe.save_config(copy_of_saved)
    hub.commit("org/tiny", copy_of_saved)
    with pytest.raises(ValueError, match="'org/absent' is neither .* give another as `head_profile`, or `False`"):
        HackVARPipeline.from_pretrained("org/tiny")
    with pytest.raises(
        ConnectionError, match="'org/absent' at revision 'v1' .* names 'org/absent@v1' as its head prof"
    ):
        HackVARPipeline.from_pretrained("org/tiny", local_files_only=True)
    assert HackVARPipeline.from_pretrained("org/tiny", head_profile=False).head_profile is None


@pytest.mark.parametrize("reference", ["../profile", "/etc/profile", "profile", "org/a@", 3])
def test_named_profile_is_a_hub_repo(copy_of_saved, reference):
    path = copy_of_saved / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "default_head_profile": reference}))
    with pytest.raises(ValueError, match="model_index.json is damaged: `default_head_profile` must be 'owner/name'"):
        HackVARPipeline.from_pretrained(copy_of_saved)


def test_token_and_cache_count_for_the_profile_and_the_revision_does_not(hub, saved, profiles, tmp_path):
    index = {**json.loads(files_of(saved)["model_index.json"]), "default_head_profile": "org/named"}
    hub.commit("org/tiny", {**files_of(saved), "model_index.json": json.dumps(index).encode()}, ref="v7")
    for name in ("org/tiny", "org/named"):
        hub.repos[name].token = "hf_read"
    options = {"revision": "v7", "token": "hf_read", "cache_dir": tmp_path / "mine"}
    assert HackVARPipeline.from_pretrained("org/tiny", **options).head_profile == profiles["named"]
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {"models--org--tiny", "models--org--named"}


def test_registered_profile_is_attached_or_a_warning(hub, original_files, caplog):
    hub.commit(VAR, original_files)
    with caplog.at_level(logging.WARNING):
        pipe = HackVARPipeline.from_pretrained(VAR, variant="d16")
    assert pipe.head_profile is None
    assert "The head profile of FoundationVision/var d16 cannot be had" in caplog.text
    name, revision = split_reference(RELEASED_PROFILES[(VAR, "d16")])
    profile = profile_for(pipe)
    profile.push_to_hub(name, tag=revision, **TOKEN)
    assert HackVARPipeline.from_pretrained(VAR, variant="d16").head_profile == profile


def test_every_released_model_has_a_pinned_profile():
    from hack_pipelines.hub.originals import ORIGINAL_REPOS

    models = {(repo.name, variant) for repo in ORIGINAL_REPOS for variant in repo.models}
    assert RELEASED_PROFILES.keys() == models
    assert all(split_reference(reference)[1] for reference in RELEASED_PROFILES.values())
    assert len(set(RELEASED_PROFILES.values())) == len(models)


# Whole ways


def test_download_fetches_all_that_a_later_call_needs(hub, saved, profiles, monkeypatch):
    from huggingface_hub import constants

    index = {**json.loads(files_of(saved)["model_index.json"]), "default_head_profile": "org/named@v1"}
    hub.commit("org/tiny", {**files_of(saved), "model_index.json": json.dumps(index).encode()})
    folder = HackVARPipeline.download("org/tiny")
    assert (Path(folder) / "vae" / WEIGHTS).is_file()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert HackVARPipeline.from_pretrained("org/tiny").head_profile == profiles["named"]
    assert hub.requests == []


def test_entry_of_diffusers_takes_our_repos(hub, saved):
    from diffusers import DiffusionPipeline

    from hack_pipelines import HackVARClassPipeline

    hub.commit("org/tiny", saved)
    pipe = DiffusionPipeline.from_pretrained.__func__(HackVARClassPipeline, "org/tiny")
    assert torch.equal(draw(pipe), draw(HackVARPipeline.from_pretrained("org/tiny")))


def test_calibrated_pushed_and_drawn_by_another_process(hub, tmp_path, monkeypatch, capsys):
    """Calibrate, push model and profile, and let a process that has neither of them draw from their names alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    argv = ["calibrate", "--model", str(tmp_path / "model"), "--num-samples", "2", "-o", str(tmp_path / "profile")]
    assert main(argv) == 0
    assert main(["profile", "push", str(tmp_path / "profile"), "org/tiny-profile", "--tag", "v1"]) == 0
    pipe.register_to_config(default_head_profile="org/tiny-profile@v1")
    pipe.push_to_hub("org/tiny", license="mit", tag="v1")
    assert not any(name.startswith("head_profile") for name in hub.repos["org/tiny"].files())

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_DISABLE_XET": "1"}
    argv = ["generate", "1", "--model", "org/tiny", "--kv-budget", "0.5", "--seed", "3", "-o"]
    theirs = subprocess.run(
        [sys.executable, "-m", "hack_pipelines.cli", *argv, "theirs.png"],
        env={**inherited, **places, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert theirs.returncode == 0, theirs.stderr
    monkeypatch.chdir(tmp_path)
    argv[argv.index("org/tiny")] = str(tmp_path / "model")
    assert main([*argv, "mine.png", "--head-profile", str(tmp_path / "profile")]) == 0
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "mine.png").read_bytes()
