"""What goes wrong on the way to the Hub, and repos that mean harm: the real client against a small server that fails as told."""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from hack_pipelines import HackVARPipeline, HeadProfile
from hack_pipelines.hub import client, locate
from hack_pipelines.hub.checks import check_weights
from hack_pipelines.hub.client import asked_wait

from .components import tiny_pipeline
from .test_hub import PARTS, WEIGHTS, files_of, saved
from .test_hub_push import profile_for


__all__ = ["saved"]

VAE = f"vae/{WEIGHTS}"
CONTENT = f"GET .*/resolve/.*{VAE}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Shorter waits of our own; those that a server asks for, and the client's, are as they are."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


@pytest.fixture
def tiny(hub, saved):
    hub.commit("org/tiny", saved)
    return hub


def cached(pattern: str = "*") -> list[str]:
    """Names of the files in snapshots."""
    cache = Path(constants.HF_HUB_CACHE)
    return sorted(path.name for path in cache.glob(f"models--*/snapshots/*/**/{pattern}") if path.is_file())


def unfinished() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


# The connection


def test_cut_connection_is_continued_where_it_was_cut(tiny, saved, monkeypatch):
    # The client hands on whole chunks, of ten megabytes, and continues after the last one.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    tiny.fault(CONTENT, cut=100_500)
    folder = locate("org/tiny").folder
    assert tiny.ranges == [(VAE, 100_000)]
    assert (folder / VAE).read_bytes() == (saved / VAE).read_bytes()
    check_weights(folder, PARTS)


def test_reset_connection_is_tried_again(tiny, saved, caplog):
    tiny.fault(CONTENT, cut=100_000, reset=True)
    with caplog.at_level(logging.WARNING, "hack_pipelines"):
        folder = locate("org/tiny").folder
    assert (folder / VAE).read_bytes() == (saved / VAE).read_bytes()
    assert "Attempt 2 of 4 in 0.01 s." in caplog.text


def test_lost_connection_leaves_nothing_that_looks_complete_and_the_next_call_fetches_the_rest(tiny):
    tiny.fault(CONTENT, cut=100_000, reset=True, times=client.ATTEMPTS)
    with pytest.raises(
        ConnectionError, match="connection to the Hub was lost over 'org/tiny'.* what is complete is kept"
    ):
        HackVARPipeline.from_pretrained("org/tiny")
    assert unfinished() == [] and cached(WEIGHTS) == [WEIGHTS]
    with pytest.raises(ConnectionError, match="not, or not completely, in the cache"):
        HackVARPipeline.from_pretrained("org/tiny", local_files_only=True)
    tiny.requests.clear()
    check_weights(locate("org/tiny").folder, PARTS)
    assert tiny.fetched() == [VAE]


def test_connection_that_is_lost_while_the_hub_answers_a_question(tiny):
    tiny.fault("GET /api/models/org/tiny/revision/main", cut=10)
    check_weights(locate("org/tiny").folder, PARTS)


# A busy Hub


@pytest.mark.parametrize(
    "request_", ["GET /api/models/org/tiny/revision/main", "GET /api/models/org/tiny/tree", CONTENT, f"HEAD .*{VAE}"]
)
@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub_is_asked_again(tiny, request_, status):
    tiny.fault(request_, status=status, headers={"Retry-After": "0"})
    check_weights(locate("org/tiny").folder, PARTS)
    assert tiny.faults == []


def test_attempts_are_bounded_and_logged(tiny, caplog):
    tiny.fault("/revision/main", status=429, headers={"Retry-After": "0"}, times=100)
    with caplog.at_level(logging.WARNING, "hack_pipelines"):
        with pytest.raises(
            ConnectionError, match=r"too many requests from here \(429\): try again in 0 seconds, and log in"
        ):
            locate("org/tiny")
    assert len(tiny.requests) == client.ATTEMPTS
    assert [record.message.split(". ")[-1] for record in caplog.records] == [
        f"Attempt {attempt} of 4 in 0 s." for attempt in (2, 3, 4)
    ]


def test_hub_that_asks_for_too_long_a_wait_is_not_waited_for(tiny):
    tiny.fault("/revision/main", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(ConnectionError, match="did not answer for 'org/tiny'.*try again in 3600 seconds"):
        locate("org/tiny")
    assert len(tiny.requests) == 1


def test_trouble_of_the_hub(tiny):
    tiny.fault("/revision/main", status=503, times=100)
    with pytest.raises(ConnectionError, match=r"trouble of its own \(503\): try again later, or see https://status"):
        locate("org/tiny")
    tiny.faults.clear()
    folder = locate("org/tiny").folder
    tiny.fault("/api/models/org/tiny", status=503, times=100)
    assert locate("org/tiny").folder == folder, "the cache serves while the Hub is down"
    with pytest.raises(ConnectionError, match=r"trouble of its own \(503\)"):
        locate("org/tiny", force_download=True)
    with pytest.raises(ValueError, match="`force_download` asks the Hub, which `local_files_only` forbids"):
        locate("org/tiny", force_download=True, local_files_only=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({"Retry-After": "-1"}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "9"}, 55),
        ({"RateLimit": '"api";r=489;t=55'}, None),
    ],
)
def test_wait_that_an_answer_asks_for(headers, seconds):
    assert asked_wait(headers) == seconds


def test_errors_of_ones_own_are_not_tried_again():
    calls = []

    def call():
        calls.append(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        client.patient(call)
    assert calls == [1]


# Refusals


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            r"does not let you read 'org/tiny' \(401\): log in",
        ),
        (403, {"X-Error-Message": "No"}, r"does not let you read 'org/tiny' \(403\): log in"),
        (404, {"X-Error-Code": "RepoNotFound"}, "'org/tiny' is neither a folder here nor a Hub repo that you can see"),
    ],
)
def test_refusals_are_not_tried_again(tiny, status, headers, message):
    tiny.fault("/revision/main", status=status, headers=headers)
    with pytest.raises(ValueError, match=message):
        locate("org/tiny")
    assert len(tiny.requests) == 1 and cached() == []


def test_refused_file_leaves_nothing_that_looks_complete(tiny):
    tiny.fault(f"HEAD .*{VAE}", status=403)
    with pytest.raises(ValueError, match=r"does not let you read 'org/tiny' \(403\): log in"):
        locate("org/tiny")
    with pytest.raises(ConnectionError):
        locate("org/tiny", local_files_only=True)
    check_weights(locate("org/tiny").folder, PARTS)


# Files that are not what they should be


def test_file_of_another_length_is_not_kept(tiny, saved):
    tiny.fault(CONTENT, content=(saved / VAE).read_bytes()[:-100])
    with pytest.raises(OSError, match="(?s)should be of size .*force_download=True"):
        locate("org/tiny")
    assert cached(WEIGHTS) == [WEIGHTS] and unfinished() == []
    check_weights(locate("org/tiny").folder, PARTS)


def test_file_with_other_content_is_refused_until_it_is_downloaded_again(tiny, saved):
    tiny.fault(CONTENT, content=bytes(len((saved / VAE).read_bytes())))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{VAE} is cut short or damaged.*`force_download=True`"):
            HackVARPipeline.from_pretrained("org/tiny")
    HackVARPipeline.from_pretrained("org/tiny", force_download=True)


@pytest.fixture(scope="module")
def profile_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("profile")
    profile_for(tiny_pipeline()).save_pretrained(folder)
    return files_of(folder)


@pytest.mark.parametrize("name", ["config.json", "profile.safetensors"])
def test_damaged_profile_is_refused_until_it_is_downloaded_again(hub, profile_files, name):
    hub.commit("org/profile", profile_files)
    hub.fault(f"GET .*/resolve/.*{name}", content=bytes(len(profile_files[name])))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} is damaged.*`force_download=True`"):
            HeadProfile.from_pretrained("org/profile")
    assert HeadProfile.from_pretrained("org/profile", force_download=True).num_layers == 3


def test_errors_on_the_way_to_a_profile(hub, profile_files, monkeypatch):
    hub.commit("org/profile", profile_files)
    for arguments, kind, message in (
        ({"name_or_path": "org/absent"}, ValueError, "'org/absent' is neither a folder here nor a Hub repo"),
        ({"name_or_path": "a/b/c"}, ValueError, "nor a name that a Hub repo can have"),
        ({"name_or_path": "org/profile@v9"}, ValueError, "'org/profile' has no revision 'v9'"),
        ({"name_or_path": "org/profile", "local_files_only": True}, ConnectionError, "not completely, in the cache"),
    ):
        with pytest.raises(kind, match=message):
            HeadProfile.from_pretrained(**arguments)
    hub.fault("/revision/main", status=503, headers={"Retry-After": "0"})
    profile = HeadProfile.from_pretrained("org/profile")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert HeadProfile.from_pretrained("org/profile") == profile
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repos["org/profile"].token = "hf_right"
    with pytest.raises(ValueError, match="give `token` if it is private"):
        HeadProfile.from_pretrained("org/profile", force_download=True)
    assert HeadProfile.from_pretrained("org/profile", token="hf_right") == profile


# Harm


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path) -> Path:
    """A path that exists when code of a repo has run; the code is in every file that others would run."""
    return tmp_path / "trapped"


def armed(files: dict[str, bytes], trap: Path) -> dict[str, bytes]:
    code, bomb = f"import os; os.mkdir({str(trap)!r})".encode(), pickle.dumps(Bomb(trap))
    names = (
        "transformer/diffusion_pytorch_model",
        "vae/pytorch_model",
        "transformer/diffusion_pytorch_model.bf16",
        "profile",
    )
    pickles = {f"{name}{suffix}": bomb for name in names for suffix in (".bin", ".pt", ".pth", ".ckpt")}
    scripts = (
        "pipeline.py",
        "transformer/pipeline.py",
        "transformer/transformer_var.py",
        "hack_pipelines.py",
        "head_profile.py",
    )
    return {**files, **pickles, **dict.fromkeys(scripts, code)}


def test_nothing_of_a_repo_is_run(hub, saved, profile_files, trap):
    files = armed(files_of(saved), trap)
    hub.commit("org/evil", files)
    HackVARPipeline.from_pretrained("org/evil")
    hub.commit("org/profile", armed(profile_files, trap))
    HeadProfile.from_pretrained("org/profile")
    for name in (WEIGHTS, f"{WEIGHTS}.index.json"):
        files.pop(f"transformer/{name}", None)
    hub.commit("org/pickles", files)
    with pytest.raises(ValueError, match="pickle files are neither fetched nor read"):
        HackVARPipeline.from_pretrained("org/pickles")
    bomb = files["profile.bin"]
    hub.commit("org/disguised", {**files_of(saved), f"transformer/{WEIGHTS}": bomb})
    with pytest.raises(ValueError, match="is cut short or damaged"):
        HackVARPipeline.from_pretrained("org/disguised")
    hub.commit("org/disguised-profile", {**profile_files, "profile.safetensors": bomb})
    with pytest.raises(ValueError, match="profile.safetensors is damaged"):
        HeadProfile.from_pretrained("org/disguised-profile")
    assert not trap.exists()
    assert not [name for name in hub.fetched() if not name.endswith((".json", ".safetensors", ".md"))]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": ["pipeline", "Evil"]}, "model_index.json is damaged: it has no `_class_name`"),
        ({"_class_name": "StableDiffusionPipeline"}, "holds a pipeline of name 'StableDiffusionPipeline', but"),
        ({"transformer": ["pipeline", "Evil"]}, "could run code that came with the model"),
        ({"transformer": ["os", "system"]}, "could run code that came with the model"),
        ({"default_head_profile": "../../evil"}, "must be 'owner/name'"),
    ],
)
def test_index_that_names_code_or_places(hub, saved, trap, entries, message):
    files = armed(files_of(saved), trap)
    index = {**json.loads(files["model_index.json"]), **entries}
    hub.commit("org/evil", {**files, "model_index.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match=re.escape(message)):
        HackVARPipeline.from_pretrained("org/evil")
    assert not trap.exists()


@pytest.mark.parametrize("option", [{"custom_pipeline": "org/evil"}, {"trust_remote_code": True}])
def test_options_that_run_code_are_refused(tiny, option):
    for opening in (HackVARPipeline.from_pretrained, HackVARPipeline.download):
        with pytest.raises(ValueError, match="No code that comes with a model is run here: leave"):
            opening("org/tiny", **option)
    assert tiny.requests == []


@pytest.mark.parametrize(
    "path", ["../../../evil.json", "transformer/../../../../evil.json", "vae\\..\\..\\evil.json/x.json"]
)
def test_names_of_files_cannot_leave_the_cache(hub, saved, tmp_path, path):
    hub.commit("org/evil", {**files_of(saved), path: b'{"evil": true}'})
    with pytest.raises(ValueError, match="'..' path segment"):
        HackVARPipeline.from_pretrained("org/evil")
    assert list(tmp_path.rglob("*evil.json*")) == []
    with pytest.raises(ConnectionError):
        locate("org/evil", local_files_only=True)


def test_absolute_names_of_files_cannot_leave_the_cache(hub, saved, tmp_path):
    hub.commit("org/evil", {**files_of(saved), f"{tmp_path}/evil.json": b'{"evil": true}'})
    with pytest.raises(ValueError, match="evil.json"):
        HackVARPipeline.from_pretrained("org/evil")
    assert not (tmp_path / "evil.json").exists()


def test_link_in_a_repo_is_its_text_only(hub, saved, tmp_path):
    (tmp_path / "secret.json").write_text(files_of(saved)["vae/config.json"].decode())
    hub.commit("org/evil", {**files_of(saved), "vae/config.json": f"{tmp_path}/secret.json".encode()})
    with pytest.raises(ValueError, match="vae/config.json is damaged"):
        HackVARPipeline.from_pretrained("org/evil")


def test_profile_cannot_name_more_than_it_holds(hub, profile_files):
    config = json.loads(profile_files["config.json"])
    for changes in (
        {"num_layers": 10**12},
        {"num_heads": -1},
        {"schedule": [[1, 1]] * 5},
        {"schedule": [[10**9, 10**9]]},
    ):
        hub.commit("org/evil", {**profile_files, "config.json": json.dumps({**config, **changes}).encode()})
        with pytest.raises(ValueError, match="The head profile in .* is damaged"):
            HeadProfile.from_pretrained("org/evil")
    hub.commit("org/evil", {**profile_files, "config.json": b"[" * 100_000})
    with pytest.raises(ValueError, match="config.json is damaged"):
        HeadProfile.from_pretrained("org/evil")
