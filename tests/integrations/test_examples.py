"""The examples of next-token models, on tiny models with random weights."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from .folders import save_chameleon, save_emu3, save_janus


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *argv: object):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(map(str, argv)))


def test_janus(tmp_path, capsys):
    run("janus_headkv", "a cat", "--model", save_janus(tmp_path), "--kv-budget", 0.3, "--output-dir", tmp_path)
    full, small = capsys.readouterr().out.splitlines()
    assert full.startswith("full cache: ") and full.endswith("at most 56.0 tokens a head")
    assert small.startswith("small cache: ") and small.endswith("at most 19.0 tokens a head")
    assert Image.open(tmp_path / "janus_full.png").tobytes() != Image.open(tmp_path / "janus_small.png").tobytes()


@pytest.mark.parametrize(("ratio", "size"), [("1:1", (8, 8)), ("4:3", (8, 6))])
def test_emu3(ratio, size, tmp_path, capsys):
    area = size[0] * size[1] * 64
    path = tmp_path / "a.png"
    run(
        "emu3_headkv",
        "a cat",
        "--model",
        save_emu3(tmp_path),
        "--kv-budget",
        0.4,
        "--ratio",
        ratio,
        "--area",
        area,
        "--output",
        path,
    )
    lines = capsys.readouterr().out.splitlines()
    held = int(0.4 * size[1] * (size[0] + 1))
    assert [line.split(":")[0] for line in lines] == ["conditional cache", "unconditional cache"]
    assert all(line.endswith(f"at most {held}.0 tokens a head") for line in lines)
    assert Image.open(path).size == size


def test_chameleon(tmp_path, capsys):
    path = tmp_path / "tokens.safetensors"
    run(
        "chameleon_loop",
        "a cat",
        "--model",
        save_chameleon(tmp_path),
        "--kv-budget",
        0.3,
        "--side",
        8,
        "--output",
        path,
    )
    tokens = load_file(path)["tokens"]
    assert tokens.shape == (1, 64) and 40 <= tokens.min() and tokens.max() < 50 and len(tokens.unique()) > 4
    assert capsys.readouterr().out.endswith("at most 19.0 tokens a head\n")
