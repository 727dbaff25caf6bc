"""Released files of Infinity, in tiny form: the real client of the Hub against a small server on this machine."""

import io
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save
from transformers import T5EncoderModel

from hack_pipelines import HackVARPipeline
from hack_pipelines.convert import convert_original
from hack_pipelines.hub import locate
from hack_pipelines.hub.checks import check_weights

from .components import tiny_t5
from .conftest import FIXTURES
from .released import released_bsq, wrapped


REPO, T5 = "FoundationVision/Infinity", "google/flan-t5-xl"
TRANSFORMER, TOKENIZER = (FIXTURES / "infinity" / f"{name}.safetensors" for name in ("transformer", "vae"))
PARTS = ["transformer", "vae", "text_encoder", "tokenizer"]
TINY_SCHEDULE = [(1, 1), (2, 2), (4, 4)]


def as_pth(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def shards(state_dict: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Two shards and their index."""
    files, weight_map = {}, {}
    for index in range(2):
        part = {key: state_dict[key] for key in sorted(state_dict)[index::2]}
        name = f"model-{index + 1:05}-of-00002.safetensors"
        files[name] = save(part)
        weight_map |= dict.fromkeys(part, name)
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


@pytest.fixture(scope="module")
def infinity_files() -> dict[str, bytes]:
    """Tiny models under the names of the released ones, and files beside them that nobody needs."""
    transformer = load_file(TRANSFORMER)
    patchified = {key: torch.randn(shape) for key, shape in wrapped(released_bsq(4, (32, 32))).items()}
    files = {
        "README.md": b"original",
        "infinity_2b_reg.pth": as_pth(transformer),
        "infinity_vae_d32reg.pth": as_pth({"vae": load_file(TOKENIZER), "epoch": 3}),
        "infinity_vae_d56_f8_14_patchify.pth": as_pth({"vae": patchified}),
        "infinity_vae_d16.pth": b"not needed",
    }
    for folder in ("infinity_8b_weights", "infinity_8b_512x512_weights"):
        files |= {f"{folder}/{name}": content for name, content in shards(transformer).items()}
        files |= {f"{folder}/{name}": b"not needed" for name in ("pytorch_model.bin", "other.safetensors")}
    return files


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def infinity(hub, infinity_files, t5):
    """The server with both repos."""
    hub.commit(REPO, infinity_files)
    hub.commit(T5, t5)
    hub.repos[T5].commits[hub.repos[T5].refs["main"]] |= {
        name: b"not needed" for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "code.py")
    }
    return hub


T5_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("variant", "files", "patchify", "temperature", "last"),
    [
        ("2b", ["infinity_2b_reg.pth", "infinity_vae_d32reg.pth"], False, 0.5, 64),
        (
            "8b",
            [*(f"infinity_8b_weights/{name}" for name in SHARDS), "infinity_vae_d56_f8_14_patchify.pth"],
            True,
            1.0,
            64,
        ),
        (
            "8b-512",
            [*(f"infinity_8b_512x512_weights/{name}" for name in SHARDS), "infinity_vae_d56_f8_14_patchify.pth"],
            True,
            1.0,
            32,
        ),
    ],
)
def test_variant_is_converted_once_from_its_own_files(
    infinity, variant, files, patchify, temperature, last, monkeypatch
):
    folder = locate(REPO, variant=variant).folder
    assert sorted(infinity.fetched()) == sorted(["README.md", *files, *T5_FILES])
    check_weights(folder, PARTS)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "HackVARTextPipeline"
    assert index["sampling"] == {"guidance_scale": 3.0, "temperature": temperature, "top_k": 900, "top_p": 0.97}
    assert index["scale_schedule"][-1] == [last, last]
    assert json.loads((folder / "vae" / "config.json").read_text())["patchify"] is patchify
    infinity.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(REPO.lower(), variant=variant).folder == folder
    assert infinity.requests == []


def test_unknown_variant_lists_the_known_ones(infinity):
    with pytest.raises(ValueError, match="`variant` must be one of 2b, 8b, 8b-512 but is None"):
        HackVARPipeline.from_pretrained(REPO)
    assert infinity.requests == []


def test_missing_files_are_named(hub, infinity_files, t5):
    def lacking(*names: str):
        hub.commit(REPO, {name: content for name, content in infinity_files.items() if not name.endswith(names)})

    hub.commit(REPO, infinity_files)
    with pytest.raises(ValueError, match=f"'{T5}' is neither a folder here nor a Hub repo that you can see"):
        locate(REPO, variant="2b")
    hub.commit(T5, t5)
    lacking(".index.json")
    with pytest.raises(ValueError, match="has no index of shards in infinity_8b_weights/, such as model.safetensors"):
        locate(REPO, variant="8b")
    lacking("2-of-00002.safetensors", "x")
    with pytest.raises(
        ValueError, match="has no model-00002-of-00002.safetensors, which model.safetensors.index.json"
    ):
        locate(REPO, variant="8b")
    lacking("d56_f8_14_patchify.pth", "xy")
    with pytest.raises(ValueError, match="lacks a file that is needed.*infinity_vae_d56_f8_14_patchify.pth"):
        locate(REPO, variant="8b")


def test_index_of_shards_cannot_name_other_files(hub, infinity_files):
    name = "infinity_8b_weights/model.safetensors.index.json"
    for file in ("../infinity_2b_reg.pth", "*.safetensors"):
        index = json.dumps({"weight_map": {"head.bias": file}}).encode()
        hub.commit(REPO, {**infinity_files, name: index}, ref=f"evil{len(file)}")
        with pytest.raises(ValueError, match="it may only name .safetensors files beside it"):
            locate(REPO, variant="8b", revision=f"evil{len(file)}")
    assert hub.fetched() == ["README.md", name]


@pytest.fixture(scope="module")
def converted(tmp_path_factory, t5) -> Path:
    """A converted folder with a text encoder in two shards."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_original(
        TRANSFORMER,
        TOKENIZER,
        folder,
        max_shard_size="50KB",
        progress=False,
        text_encoder=t5,
        scale_schedule=TINY_SCHEDULE,
    )
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_converted_folder_works_alone(converted, t5):
    assert len(list((converted / "text_encoder").glob("model-*.safetensors"))) > 1
    original = HackVARPipeline.from_original(TRANSFORMER, TOKENIZER, text_encoder=t5, scale_schedule=TINY_SCHEDULE)
    pipe = HackVARPipeline.from_pretrained(converted)
    assert type(pipe) is type(original) and pipe.family == "infinity"
    for name in ("transformer", "vae", "text_encoder"):
        expected = getattr(original, name).state_dict()
        got = getattr(pipe, name).state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got), name
    assert isinstance(pipe.text_encoder, T5EncoderModel)
    assert pipe.tokenizer("a storm").input_ids == original.tokenizer("a storm").input_ids == [3, 5, 1]
    assert [tuple(size) for size in pipe.config["scale_schedule"]] == TINY_SCHEDULE
    assert pipe.config["sampling"] == original.config["sampling"]
    images = []
    for each in (original, pipe):
        each.set_progress_bar_config(disable=True)
        output = each("a storm", generator=torch.Generator().manual_seed(0), output_type="pt")
        images.append(output.images)
    assert torch.equal(*images) and images[0].shape == (1, 3, 16, 16)


def test_converted_folder_without_a_text_encoder_takes_features_only(tmp_path):
    folder = convert_original(TRANSFORMER, TOKENIZER, tmp_path / "model", progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", "transformer", "vae"]
    assert json.loads((folder / "model_index.json").read_text())["text_encoder"] == [None, None]
    pipe = HackVARPipeline.from_pretrained(folder)
    assert pipe.text_encoder is None and pipe.tokenizer is None
    assert pipe.config["scale_schedule"][-1] in ([64, 64], (64, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_folder_is_what_save_pretrained_writes(dtype, t5, tmp_path):
    pipe = HackVARPipeline.from_original(TRANSFORMER, TOKENIZER, text_encoder=t5, dtype=dtype)
    pipe.save_pretrained(tmp_path / "saved")
    # A converter knows nothing to say on a card.
    (tmp_path / "saved" / "README.md").unlink()
    folder = convert_original(
        TRANSFORMER, TOKENIZER, tmp_path / "converted", dtype=dtype, progress=False, text_encoder=t5
    )
    assert files_of(folder).keys() == files_of(tmp_path / "saved").keys()
    for name, content in files_of(folder).items():
        if name.endswith(".safetensors"):
            got, expected = load_file(folder / name), load_file(tmp_path / "saved" / name)
            assert got.keys() == expected.keys()
            for key in expected:
                assert got[key].dtype == expected[key].dtype and torch.equal(got[key], expected[key]), key
        else:
            assert json.loads(content) == json.loads((tmp_path / "saved" / name).read_text()), name


def test_hub_repo_with_a_text_encoder_is_fetched_whole_and_without_pickles(hub, converted):
    extra = {f"text_encoder/{name}": b"pickle" for name in ("pytorch_model.bin", "code.py", "model.fp16.safetensors")}
    hub.commit("org/text", {**files_of(converted), **extra, "tokenizer/spiece.model": b"words"})
    pipe = HackVARPipeline.from_pretrained("org/text")
    assert sorted(hub.fetched()) == sorted([*files_of(converted), "tokenizer/spiece.model"])
    assert pipe.tokenizer("a storm").input_ids == [3, 5, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "has no model-00001-of-.*, which model.safetensors.index.json names: the download is incomplete"),
        ("cut", "model-00001-of-.* is cut short or damaged"),
        (
            "pickles",
            r"has no model.safetensors; pickle files \(there is pytorch_model.bin\) are neither fetched nor read",
        ),
    ],
)
def test_damaged_text_encoders_are_named(damage, message, converted, tmp_path):
    for name, content in files_of(converted).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "text_encoder"
    first = next(folder.glob("model-00001-*"))
    if damage == "missing":
        first.unlink()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        (folder / "model.safetensors.index.json").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message) as caught:
        HackVARPipeline.from_pretrained(tmp_path)
    assert str(folder) in str(caught.value)
    check_weights(tmp_path, ["transformer", "vae", "tokenizer"])
