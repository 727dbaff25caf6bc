"""`hack-pipelines profile`: show, diff, push and pull, against a small server on this machine."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hack_pipelines import HeadProfile
from hack_pipelines.cli import main

from .test_hub import files_of
from .test_profile import make_profile, with_scores


def run(capsys, *argv) -> tuple[int, list[str], str]:
    """Exit status, lines of the output, and the error message."""
    capsys.readouterr()
    status = main(["profile", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.removeprefix("hack-pipelines: error: ").rstrip("\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    make_profile().save_pretrained(tmp_path / "profile")
    return tmp_path / "profile"


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")


# diff


def test_equal_profiles(folder, capsys):
    assert run(capsys, "diff", folder, folder) == (0, ["The profiles are equal."], "")


def test_differences_are_printed(tmp_path, capsys):
    first = with_scores([[0.1, 0.2, 0.9], [0.3, 0.8, 0.7]])
    second = with_scores([[0.1, 0.85, 0.9], [0.3, 0.2, 0.7]])
    second.seeds, second.inputs = [7, 9], [3, "x" * 100]
    second.sampling = {**first.sampling, "top_k": [1, 0, 0]}
    first.software, second.software = {"torch": "1" * 100 + "a" * 100}, {"torch": "1" * 100 + "b"}
    second.variance["entropy"] = second.variance["entropy"] + 1
    del second.mean["vnorm"], second.variance["vnorm"]
    for name, profile in (("first", first), ("second", second)):
        profile.save_pretrained(tmp_path / name)
    status, out, _ = run(capsys, "diff", tmp_path / "first", tmp_path / "second", "--map", tmp_path / "map.png")
    assert status == 1
    # Ranks 0 1 5 2 4 3 against 0 4 5 2 1 3: 1 - 6 * (9 + 9) / (6 * 35).
    correlation = 1 - 6 * 18 / 210
    assert out == [
        "sampling.top_k: [0, 0, 0] | [1, 0, 0]",
        f"inputs: [3, 'tabby cat'] | [3, '{'x' * 75}...",
        "seeds: [7, 8] | [7, 9]",
        f"software.torch: ...{'1' * 20}{'a' * 60}... | ...{'1' * 20}b",
        next(line for line in out if line.startswith("colvar: means rank the same to ")),
        "entropy: equal means, other variances over samples",
        "vnorm: in the first only",
        f"variances that tell types apart rank the same to {correlation:.3f}",
        "2 of 6 heads change type at alpha 0.5",
        "  layer 0, head 1: contextual | structural",
        "  layer 1, head 1: structural | contextual",
        f"{tmp_path / 'map.png'}: both as a picture",
    ]
    both, maps = Image.open(tmp_path / "map.png"), [profile.head_map() for profile in (first, second)]
    assert both.size == (maps[0].width + maps[1].width, maps[0].height)
    assert both.crop((maps[0].width, 0, *both.size)).tobytes() == maps[1].tobytes()
    status, out, _ = run(capsys, "diff", tmp_path / "first", tmp_path / "second", "--alpha", "0.17")
    assert status == 1 and out[-1] == "0 of 6 heads change type at alpha 0.17"


def test_profiles_of_other_models_differ(folder, tmp_path, capsys):
    make_profile(num_layers=2).save_pretrained(tmp_path / "other")
    status, out, _ = run(capsys, "diff", folder, tmp_path / "other")
    assert status == 1 and out[0] == "num_layers: 3 | 2"
    assert "mass: [3, 4, 3, 3] | [2, 4, 3, 3]" in out
    assert out[-1] == "head types cannot be compared: the models have other layers or heads"


def test_profiles_without_types_differ(folder, tmp_path, capsys):
    profile = make_profile()
    for arrays in (profile.mean, profile.variance):
        del arrays["colvar"]
    profile.save_pretrained(tmp_path / "other")
    status, out, _ = run(capsys, "diff", folder, tmp_path / "other")
    assert (status, out) == (1, ["colvar: in the first only", "head types cannot be compared: not both hold them"])


def test_trouble_has_another_status_than_a_difference(folder, tmp_path, capsys):
    status, out, message = run(capsys, "diff", folder, tmp_path)
    assert (status, out) == (2, []) and message.startswith("There is no head profile in")
    with pytest.raises(ValueError, match="There is no head profile in"):
        main(["profile", "diff", str(folder), str(tmp_path), "--debug"])


# push and pull


def test_push_says_what_and_where_and_pull_brings_it_back(hub, login, folder, tmp_path, capsys):
    status, out, _ = run(
        capsys, "push", folder, "org/profile", "--tag", "v1", "--license", "mit", "--message", "First"
    )
    commit = hub.repos["org/profile"].refs["v1"]
    sizes = {name: len(content) for name, content in hub.repos["org/profile"].files().items()}
    names = ["README.md", "config.json", "head_map.png", "profile.safetensors"]
    assert status == 0 and out == [
        "head profile of someone/tiny to org/profile:",
        *(f"  {name:<20} {sizes[name]:>12,} bytes" for name in names),
        f"{hub.url}/org/profile/commit/{commit}",
        'use it: pipe.load_head_profile("org/profile@v1")',
    ]
    assert hub.repos["org/profile"].messages == ["First"]
    status, out, _ = run(capsys, "pull", "org/profile", "--revision", "v1", "-o", tmp_path / "new" / "pulled")
    assert status == 0 and out == [
        f"head profile of someone/tiny, commit {commit}",
        f"{tmp_path / 'new' / 'pulled'}: a copy",
    ]
    there = hub.repos["org/profile"].files()
    assert files_of(tmp_path / "new" / "pulled") == {name: there[name] for name in names}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pulled"]
    assert HeadProfile.from_pretrained(tmp_path / "new" / "pulled") == make_profile()
    assert run(capsys, "pull", "org/profile@v1")[1][1].endswith(f"snapshots/{commit}: in the cache")
    assert run(capsys, "show", "org/profile", "--revision", "v1")[1][0] == "model: someone/tiny"
    assert run(capsys, "diff", "org/profile@v1", folder)[0] == 0


def test_dry_run_sends_nothing(hub, folder, capsys):
    status, out, _ = run(capsys, "push", folder, "org/profile", "--dry-run")
    assert status == 0 and len(out) == 5 and hub.requests == []


def test_card_that_was_edited_here_is_pushed(hub, login, folder, capsys):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert run(capsys, "push", folder, "org/profile")[0] == 0
    assert hub.repos["org/profile"].files()["README.md"] == (folder / "README.md").read_bytes()


def test_pull_request_and_private_repo(hub, login, folder, capsys):
    status, out, _ = run(capsys, "push", folder, "org/profile", "--create-pr", "--private")
    assert status == 0 and out[-1].startswith(f"{hub.url}/org/profile/discussions/")
    assert hub.repos["org/profile"].private and list(hub.repos["org/profile"].files()) == [".gitattributes"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "FOLDER", "a/b/c"], "'a/b/c' is neither a folder here nor a name that a Hub repo can have"),
        (["push", "FOLDER", "org/profile"], "The Hub does not let you write to 'org/profile' (401): log in"),
        (["push", "FOLDER", "org/profile", "--create-pr", "--tag", "v1"], "leave `tag` and `revision` out"),
        (["push", "FOLDER", "org/profile", "--results", "FOLDER"], "`results` must be the folder of"),
        (["push", "nowhere/profile", "org/profile"], "'nowhere/profile' is neither a folder here nor a Hub repo"),
        (["pull", "org/absent"], "'org/absent' is neither a folder here nor a Hub repo that you can see"),
        (["pull", "org/absent", "-o", "FOLDER"], "exists already: name a new folder"),
    ],
)
def test_refusals(hub, folder, capsys, argv, message):
    status, out, error = run(capsys, *(str(folder) if word == "FOLDER" else word for word in argv))
    assert status == 2 and message in error
    assert hub.repos == {}


def test_pull_of_what_is_no_profile_copies_nothing(hub, tmp_path, capsys):
    hub.commit("org/other", {"config.json": b"{}", "profile.safetensors": torch.ones(1).numpy().tobytes()})
    status, _, error = run(capsys, "pull", "org/other", "-o", tmp_path / "pulled")
    assert status == 2 and "does not belong to a head profile" in error
    assert not (tmp_path / "pulled").exists()
