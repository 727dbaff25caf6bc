"""`hack-pipelines generate --backend transformers`, run in this process on tiny saved models."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from hack_pipelines.cli import main
from hack_pipelines.integrations.next_token import NextTokenPipeline

from ..components import seeds
from .folders import save_code_model, save_emu3, save_janus


SAVE = {"janus": save_janus, "emu3": save_emu3, "llama": save_code_model}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    return {name: save(parent / name) for name, save in SAVE.items()}


def generate(folder, command: str) -> int:
    return main(["generate", "--model", str(folder), *shlex.split(command)])


def refused(capsys, folder, command: str) -> str:
    capsys.readouterr()
    assert generate(folder, command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hack-pipelines: error: ")
    return err.removeprefix("hack-pipelines: error: ").rstrip("\n")


def test_one_picture(folders, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert generate(folders["janus"], f"'a cat' --backend transformers --kv-budget 0.375 --seed 5 -o {path}") == 0
    assert "at most 24.0 tokens a head" in capsys.readouterr().out
    pipe = NextTokenPipeline.from_pretrained(folders["janus"])
    expected = pipe("a cat", generator=seeds(5), kv_budget=24).images[0]
    assert np.array_equal(Image.open(path), expected)


def test_folder_of_prompts_is_taken_up_again(folders, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na red house\n")
    folder = tmp_path / "out"
    command = (
        f"--backend transformers --prompts-file {tmp_path / 'prompts.txt'} --num-images 2 --batch-size 3 --kv-budget 18 "
        f"--method linear_ar --negative-prompt blurry --height 32 --width 64 --top-k 8 --output-dir {folder}"
    )
    assert generate(folders["emu3"], command) == 0
    out = capsys.readouterr().out
    assert "4 pictures, listed in manifest.jsonl" in out
    assert "\ncache per picture: " in out and "\nunconditional cache per picture: " in out
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a cat"] * 2 + ["a red house"] * 2
    settings = records[0]["settings"]
    assert settings["grid"] == [4, 8] and settings["negative_prompt"] == "blurry" and settings["kv_budget"] == 18
    assert settings["sampling"] == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8, "top_p": 1.0}
    assert settings["method"] == "linear_ar:anchors=1,recent=1,observe=8"
    assert records[0]["model"]["head_profile"] is None
    assert records[0]["cache"]["peak_tokens"] == records[0]["unconditional_cache"]["peak_tokens"] == 18
    # What is missing is drawn again, and is what it was.
    picture = folder / records[2]["file"]
    before = picture.read_bytes()
    picture.unlink()
    assert generate(folders["emu3"], command) == 0
    assert picture.read_bytes() == before


def test_classes_of_a_llama_model(folders, tmp_path):
    command = f"dog 0 --class -1 --backend transformers --output-dir {tmp_path}"
    assert generate(folders["llama"], command) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "00000-dog-0.png",
        "00001-cat-1.png",
        "00002-no-class-2.png",
    ]
    assert generate(folders["llama"], f"--backend transformers --num-images 2 -o {tmp_path / 'any.png'}") == 0


@pytest.mark.parametrize(
    "option",
    [
        "--kv-dtype int8",
        "--attention-budget 0.5",
        "--variant fp16",
        "--device-map balanced",
        "--head-profile x",
        "--more-smooth",
    ],
)
def test_options_of_the_other_backend_are_refused(option, tmp_path, capsys):
    # Before the model, which does not exist, is loaded.
    message = refused(capsys, tmp_path / "missing", f"0 --backend transformers {option} -o {tmp_path / 'a.png'}")
    assert message == f"`{option.split()[0]}` is not for `--backend transformers`: leave it out."


def test_what_cannot_be_meant(folders, tmp_path, capsys):
    output = f"-o {tmp_path / 'a.png'}"
    missing = tmp_path / "missing"
    assert refused(capsys, missing, f"0 --backend transformers --method hack++ {output}").startswith(
        "`method` must be one of 'h2o', 'headkv_ar'"
    )
    assert refused(capsys, missing, f"0 --method headkv_ar {output}").startswith("`method` must be one of 'cake'")
    for where in (output, f"--output-dir {tmp_path / 'out'}"):
        assert refused(capsys, folders["janus"], f"'a cat' {where}") == (
            f"{folders['janus']} is a model of transformers, of type 'janus': add `--backend transformers`."
        )
    janus = folders["janus"], f"'a cat' --backend transformers {output} "
    for option in ("--negative-prompt", "--height"):
        assert refused(capsys, janus[0], janus[1] + f"{option} 8") == (
            f"`{option}` is for text-to-image models, but {janus[0]} is a Janus model: leave it out."
        )
    assert "A text-to-image model needs a prompt" in refused(capsys, janus[0], f"--backend transformers {output}")
    assert "`kv_budget`" in refused(capsys, janus[0], janus[1] + "--kv-budget 15")
    assert "`top_p` must be" in refused(capsys, janus[0], janus[1] + "--top-p 2")
