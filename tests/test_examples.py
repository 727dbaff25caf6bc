"""The examples that neither a page nor another test runs, as a reader starts them, but smaller."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hack_pipelines import HackVARPipeline, HeadProfile
from hack_pipelines.cli import main
from hack_pipelines.methods import METHODS

from .components import seeds


EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = EXAMPLES / "train_demo"
# Several scripts in one process that is not this one: they set switches of torch for the whole process.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys

for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs a script in an empty folder."""
    before = dict(METHODS)
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as status:
            assert not status.code

    yield run
    METHODS.clear()
    METHODS.update(before)


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def test_previews_come_nearer_to_the_picture(start, tmp_path, capsys):
    start("preview_scales.py", "a smiling cat", "--output-dir", "previews")
    sizes = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8)]
    previews = [tmp_path / "previews" / f"scale_{step}_{h}x{w}.png" for step, (h, w) in enumerate(sizes)]
    final = pixels(tmp_path / "previews" / "final.png")
    distances = [np.abs(pixels(path) - final).mean() for path in previews]
    assert distances[-1] == 0 and distances[0] > distances[3] > distances[5] > 0
    pipe = HackVARPipeline.from_pretrained("demo")
    image = pipe("a smiling cat", generator=seeds(0)[0], kv_budget=0.3).images[0]
    assert np.array_equal(final, np.asarray(image))
    assert "at most 46.0 tokens a head" in capsys.readouterr().out


def test_previews_stop_when_asked_to_and_take_classes(start, tmp_path):
    start("preview_scales.py", "face smiling", "--model", "demo-class", "--stop-after", 2)
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["final.png", "scale_0_1x1.png", "scale_1_2x2.png"]


def test_a_method_of_ones_own_gets_its_row(start, tmp_path, capsys):
    start("add_a_method.py", "--output", "results", "--images", 2, "--budgets", 0.1)
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| checkerboard | post | 0.1 |")]
    assert len(rows) == 1
    assert (tmp_path / "results" / "results.md").read_text() == table
    assert {"results.csv", "quality.png", "pictures.png"} <= {path.name for path in (tmp_path / "results").iterdir()}


def test_many_processes_are_also_one(start, tmp_path, capsys):
    start("many_gpus/draw.py", "pictures")
    start("many_gpus/draw.py", "pictures")
    assert capsys.readouterr().out.splitlines() == [
        "process 0 of 1: 2 batches; missing: 0",
        "process 0 of 1: 0 batches; missing: 0",
    ]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


# -- training the demo models ------------------------------------------------------------------------------------------


def disc(colour, radius):
    """A disc on nothing, RGBA, as the rendered emoji are stored."""
    offsets = np.arange(128) - 63.5
    alpha = 255 * (np.hypot(*np.meshgrid(offsets, offsets)) < radius)
    return np.dstack([*(np.full((128, 128), level) for level in colour), alpha]).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Discs of 12 concepts in two styles, three classes and all splits, in the form that `data.py` writes."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").mkdir()
    rows = [(style, number) for style in ("3d", "flat") for number in range(12)]
    np.savez(
        folder / "data" / "emoji.npz",
        images=np.stack([disc((20 * number, 90, 240 - 20 * number), 30 + number) for _, number in rows]),
        class_ids=np.array([number % 3 for _, number in rows]),
        splits=np.array([2 if number < 3 else 1 if style == "flat" and number < 6 else 0 for style, number in rows]),
        mirrored=np.ones(len(rows), dtype=bool),
        captions=np.array([f"dot {number}" for _, number in rows]),
        styles=np.array([style for style, _ in rows]),
    )
    (folder / "data" / "classes.json").write_text(json.dumps(["small dot", "dot", "large dot"]))
    return folder


def train(folder, *scripts):
    """Runs scripts of the training on the data of a folder."""
    lines = [[str(TRAINING / name), "--data", str(folder / "data"), *map(str, rest)] for name, *rest in scripts]
    environment = {"PYTHONPATH": str(TRAINING), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(lines)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_text_model_is_trained_exported_and_judged(folder, capsys):
    runs, output, again = folder / "text_runs", folder / "text", folder / "again"
    minutes = ("--tokenizer-minutes", 0.02, "--transformer-minutes", 0.02, "--batch-size", 2)
    train(
        folder,
        ("train.py", "--model", "text", "--runs", runs, "--output", output, *minutes),
        ("export_infinity.py", "--runs", runs, "--output", again, "--profile-samples", 0)
        + ("--held-out", folder / "text_held_out.safetensors", "--sheet", folder / "text.png"),
    )
    pipe = HackVARPipeline.from_pretrained(output)
    assert pipe.head_profile.num_samples == 70 and (output / "NOTICE.md").exists()
    weights = HackVARPipeline.from_pretrained(again).transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.transformer.state_dict().items())
    held_out = load_file(folder / "text_held_out.safetensors")
    assert held_out["tokens"].shape == (9, 155, 12) and held_out["seen"].tolist() == [True] * 3 + [False] * 6
    assert len(json.loads((folder / "text_held_out.json").read_text())) == 9

    # The judge of pictures: on the data alone, and on a comparison that was drawn with the model.
    results, judged = folder / "results", folder / "judged"
    compared = ["--model", str(output), "--images", "2", "--methods", "random", "--budgets", "0.3", "-o", str(results)]
    main(["compare", "dot 3", "dot 4", *compared])
    train(
        folder,
        ("agreement.py", "--runs", runs, "--output", judged, "--judge-minutes", 0.02),
        ("judge_comparison.py", "--runs", runs, "--comparison", results),
    )
    assert json.loads((judged / "agreement.json").read_text()).keys() == {"judge"}
    rows = list(csv.DictReader((results / "judged.csv").open()))
    assert [(row["method"], row["budget"]) for row in rows] == [("full", ""), ("random", "0.3")]
    assert float(rows[0]["Fréchet distance (full cache's pictures)"]) == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_a_class_model_is_trained_and_exported(folder):
    runs, output = folder / "class_runs", folder / "class"
    short = ("--runs", runs, "--minutes", 0.02, "--batch-size", 2)
    train(
        folder,
        ("train_tokenizer.py", *short),
        ("train_transformer.py", *short),
        ("export.py", "--runs", runs, "--output", output, "--profile-samples", 2)
        + ("--held-out", folder / "class_held_out.safetensors", "--sheet", folder / "class.png"),
    )
    pipe = HackVARPipeline.from_pretrained(output)
    assert pipe.head_profile == HeadProfile.from_pretrained(output / "head_profile")
    assert pipe.head_profile.num_samples == 2
    assert len(pipe(class_labels=["small dot", 1], kv_budget=0.3).images) == 2
    held_out = load_file(folder / "class_held_out.safetensors")
    assert held_out["tokens"].shape == (9, 155) and held_out["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


@pytest.mark.slow
def test_a_raster_model_is_trained_and_exported(folder):
    runs, output = folder / "raster_runs", folder / "raster"
    train(
        folder,
        ("train_raster.py", "--runs", runs, "--tokenizer-minutes", 0.02, "--minutes", 0.02, "--batch-size", 2),
        ("export_raster.py", "--runs", runs, "--output", output)
        + ("--held-out", folder / "raster_held_out.safetensors", "--sheet", folder / "raster.png"),
    )
    assert {"config.json", "model.safetensors", "vae"} <= {path.name for path in output.iterdir()}
    assert load_file(folder / "raster_held_out.safetensors")["tokens"].shape == (9, 256)
    assert Image.open(folder / "raster.png").width > 64
