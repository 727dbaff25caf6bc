"""Reading files that somebody else saved: every way to store them, and everything that is refused."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hack_pipelines.convert import load_original
from hack_pipelines.convert.original import read_state_dict

from .conftest import FIXTURES


TOKENIZER = FIXTURES / "var" / "vae.safetensors"
TINY_A, TINY_B = FIXTURES / "var" / "tiny_a.safetensors", FIXTURES / "var" / "tiny_b.safetensors"


@pytest.mark.parametrize("style", ["pth", "old", "shards", "pickled shards"])
def test_every_way_to_store_a_state_dict_gives_the_same(style, tmp_path):
    source = load_file(TINY_B)
    path = tmp_path / "model.pth"
    if style == "pth":
        torch.save(source, path)
    elif style == "old":
        torch.save(source, path, _use_new_zipfile_serialization=False)
    else:
        path = tmp_path / "shards"
        path.mkdir()
        keys = sorted(source)
        for index in range(3):
            part = {key: source[key] for key in keys[index::3]}
            if style == "shards":
                save_file(part, path / f"model-0000{index}-of-00003.safetensors")
            else:
                torch.save(part, path / f"pytorch_model-0000{index}-of-00003.bin")
    read = read_state_dict(str(path))
    assert read.keys() == source.keys()
    assert all(torch.equal(read[key], source[key]) and read[key].dtype == source[key].dtype for key in source)


def test_state_dicts_are_taken_out_of_the_places_where_the_authors_put_them(tmp_path):
    state_dict = {"a": torch.ones(2), "b": torch.zeros(3)}
    for content in (
        {"vae": state_dict, "discriminator": {"c": torch.ones(1)}, "epoch": 3},
        {"trainer": {"gpt_fsdp": state_dict, "gpt_opt": {"state": {}}}, "args": "x"},
    ):
        torch.save(content, tmp_path / "nested.pth")
        read = read_state_dict(tmp_path / "nested.pth")
        assert read.keys() == state_dict.keys() and all(torch.equal(read[key], state_dict[key]) for key in read)
    save_file({"vae": torch.ones(2)}, tmp_path / "flat.safetensors")
    assert list(read_state_dict(tmp_path / "flat.safetensors")) == ["vae"]


INDEX_NAMES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


def sharded(folder: Path, suffix: str) -> Path:
    """Two shards with one tensor each, and a third file that the index does not name."""
    folder.mkdir()
    for name in ("one", "two", "three"):
        save = save_file if suffix == ".safetensors" else torch.save
        save({name: torch.ones(2)}, folder / f"{name}{suffix}")
    index = {"metadata": {}, "weight_map": {name: f"{name}{suffix}" for name in ("one", "two")}}
    (folder / INDEX_NAMES[suffix]).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("suffix", INDEX_NAMES)
def test_index_of_shards_says_what_is_read(suffix, tmp_path):
    folder = sharded(tmp_path / "shards", suffix)
    assert sorted(read_state_dict(folder)) == ["one", "two"]
    (folder / f"two{suffix}").unlink()
    with pytest.raises(ValueError, match=f"has no two{suffix}, which {INDEX_NAMES[suffix]} names: the download is"):
        read_state_dict(folder)
    (folder / INDEX_NAMES[suffix]).unlink()
    assert sorted(read_state_dict(folder)) == ["one", "three"]


@pytest.mark.parametrize("suffix", INDEX_NAMES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("{}", "is damaged .*weight_map"),
        ('{"weight_map": {}}', "is damaged: `weight_map` must hold the file of every weight"),
        ('{"weight_map": {"one": 1}}', "is damaged: `weight_map` must hold the file of every weight"),
        ('{"weight_map": ["one"]}', "is damaged: `weight_map` must hold the file of every weight"),
        ('{"weight_map": {"one": "../one%s"}}', "it may only name .* files beside it"),
        ('{"weight_map": {"one": "/one%s"}}', "it may only name .* files beside it"),
        ('{"weight_map": {"one": "..\\\\one%s"}}', "it may only name .* files beside it"),
        ('{"weight_map": {"one": "*%s"}}', "it may only name .* files beside it"),
        ('{"weight_map": {"one": "one.txt"}}', "names 'one.txt': it may only name"),
    ],
)
def test_damaged_indexes_and_paths_out_of_the_folder_are_refused(suffix, content, message, tmp_path):
    folder = sharded(tmp_path / "shards", suffix)
    (folder / INDEX_NAMES[suffix]).write_text(content.replace("%s", suffix))
    with pytest.raises(ValueError, match=f"{INDEX_NAMES[suffix]} .*{message}|{message}") as caught:
        read_state_dict(folder)
    assert INDEX_NAMES[suffix] in str(caught.value)


def test_two_indexes_in_a_folder_are_refused(tmp_path):
    folder = sharded(tmp_path / "shards", ".safetensors")
    (folder / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(
        ValueError, match="several models, of model.safetensors.index.json, other.safetensors.index.json"
    ):
        read_state_dict(folder)


class Evil:
    """Runs a command when somebody unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("style", ["zip", "old", "plain pickle"])
def test_code_in_a_pickle_is_named_and_not_run(style, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"class_emb.weight": torch.zeros(2, 2), "evil": Evil(marker)}
    if style == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=style == "zip")
    with pytest.raises(ValueError, match="evil.pth is not read, because that could run code.*posix.system") as caught:
        load_original(path, TOKENIZER)
    assert not marker.exists() and caught.value.__cause__ is not None


def test_objects_in_a_pickle_are_named(tmp_path):
    torch.save({"args": argparse.Namespace(depth=16)}, tmp_path / "train.pth")
    with pytest.raises(ValueError, match="besides tensors it names argparse.Namespace"):
        load_original(tmp_path / "train.pth", TOKENIZER)


def damaged(tmp_path: Path, kind: str) -> Path:
    torch.save(load_file(TINY_B), tmp_path / "whole.pth", _use_new_zipfile_serialization=kind != "cut old")
    whole = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "damaged.pth"
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "cut old": whole[: len(whole) // 2],
        "cut within the start": whole[:3],
        "text": b"<!DOCTYPE html>",
        "noise": bytes(range(256)) * 4,
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty: download it again"),
        ("cut", "is cut short.*Download it again"),
        ("cut old", "is damaged or no checkpoint of torch"),
        ("cut within the start", "is damaged or no checkpoint of torch"),
        ("text", "is damaged or no checkpoint of torch"),
        ("noise", "is damaged or no checkpoint of torch"),
        ("pointer", "is a Git LFS pointer of 63 bytes"),
    ],
)
def test_damaged_files_are_named(kind, message, tmp_path):
    with pytest.raises(ValueError, match=f"damaged.pth {message}"):
        load_original(damaged(tmp_path, kind), TOKENIZER)


def test_damaged_safetensors_are_named(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(TINY_A.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut.safetensors is damaged or no safetensors file"):
        load_original(path, TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_no_flipped_byte_escapes_as_another_error(tmp_path_factory, position, value):
    path = tmp_path_factory.mktemp("flipped") / "model.pth"
    torch.save({"a": torch.arange(4.0), "b": torch.ones(3)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_state_dict(path).values())
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list: expected a state dict"),
        (torch.ones(2), "holds a Tensor: expected a state dict"),
        ({}, "holds an empty state dict"),
        ({"a": torch.ones(2), "epoch": 3}, "holds a int under 'epoch'"),
        ({0: torch.ones(2)}, "holds a Tensor under 0"),
        ({"a": torch.eye(3).to_sparse()}, "holds a sparse tensor"),
        (
            {"epoch": 3, "trainer": {"var_wo_ddp": {"a": torch.ones(2)}, "vae_local": {"b": torch.ones(2)}, "x": 1}},
            r"training checkpoint, with state dicts inside at \['trainer'\]\['var_wo_ddp'\], \['trainer'\]\['vae_local'\]",
        ),
        ({"model": {"a": torch.ones(2)}}, r"state dicts inside at \['model'\]"),
        (
            {"vae": {"a": torch.ones(2)}, "trainer": {"gpt_fsdp": {"b": torch.ones(2)}}},
            r"state dicts inside at \['vae'\], \['trainer'\]\['gpt_fsdp'\]",
        ),
        ({"vae": {"a": torch.ones(2), "epoch": 3}}, "holds a int under 'epoch'"),
        ({"vae": {}}, "holds an empty state dict"),
    ],
)
def test_anything_but_a_flat_state_dict_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        load_original(tmp_path / "odd.pth", TOKENIZER)


def test_missing_files_and_unfit_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder .*absent.pth"):
        load_original(tmp_path / "absent.pth", TOKENIZER)
    with pytest.raises(ValueError, match="holds no checkpoint: expected"):
        load_original(tmp_path, TOKENIZER)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"head.bias": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"b.safetensors repeats head.bias"):
        load_original(tmp_path, TOKENIZER)
