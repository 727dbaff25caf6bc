"""Metrics on inputs whose answer is known, and the benchmark scripts from end to end."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hack_pipelines import HACK, Random
from hack_pipelines.evaluation import first_differing_step, psnr, teacher_forced_nll, token_agreement
from hack_pipelines.evaluation.fidelity import token_agreement_by_scale

from .components import half_contextual, masked_nll, tiny_pipeline


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.head_profile = half_contextual(3, 4)
    return pipe


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 32, (5, 30), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 9, 1, 1])


def scales(*rows: list[int]) -> list[torch.Tensor]:
    """Ids of images with scales of 1 and 4 tokens."""
    return list(torch.tensor(rows).split([1, 4], dim=1))


def test_psnr_of_known_errors():
    reference = torch.zeros(3, 3, 4, 4)
    images = reference.clone()
    images[0] += 0.1
    images[1, 0, 0, 0] = 1
    assert psnr(images, reference)[0].item() == pytest.approx(20, abs=1e-4)
    assert psnr(images, reference)[1].item() == pytest.approx(10 * math.log10(48))
    assert psnr(images, reference)[2] == math.inf


@pytest.mark.parametrize(
    ("images", "match"), [(torch.zeros(1, 3, 4, 5), "one shape"), (torch.full((1, 3, 4, 4), 1.5), "1.5")]
)
def test_psnr_refuses(images, match):
    with pytest.raises(ValueError, match=match):
        psnr(images, torch.zeros(1, 3, 4, 4))


def test_agreement_of_known_tokens():
    reference = scales([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    tokens = scales([1, 2, 3, 4, 5], [1, 2, 0, 4, 0], [0, 2, 3, 4, 5])
    assert token_agreement(tokens, reference).tolist() == [1.0, 0.6, 0.8]
    assert token_agreement_by_scale(tokens, reference).tolist() == [[1, 1], [1, 0.5], [0, 1]]
    assert first_differing_step(tokens, reference).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="same scales"):
        token_agreement(tokens, reference[:1])


def test_likelihood_is_that_of_the_masked_pass(pipe, pictures):
    wanted = masked_nll(pipe, *pictures)
    torch.testing.assert_close(teacher_forced_nll(pipe, *pictures, batch_size=2), wanted, atol=1e-4, rtol=0)


def test_likelihood_at_lossless_and_small_budgets(pipe, pictures):
    full = teacher_forced_nll(pipe, *pictures)
    assert torch.equal(teacher_forced_nll(pipe, *pictures, 1.0, HACK()), full)
    assert torch.equal(teacher_forced_nll(pipe, *pictures, 14, Random()), full)
    assert (teacher_forced_nll(pipe, *pictures, 6, Random(protocol="pre")) - full).abs().min() > 1e-4


def test_likelihood_of_a_picture_does_not_depend_on_its_batch(pipe, pictures):
    tokens, labels = pictures
    together = teacher_forced_nll(pipe, tokens, labels, 0.4)
    alone = torch.cat([teacher_forced_nll(pipe, tokens[i : i + 1], labels[i : i + 1], 0.4) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(2, 29), [0, 1]), r"\[images, 30\]"),
        ((torch.zeros(2, 30), [0]), "one input an image"),
        ((torch.zeros(2, 30), [0, 1], None, "hack", 0), "batch_size"),
        ((torch.zeros(2, 30), [0, 1], 0.5, "h2o"), "h2o"),
    ],
)
def test_likelihood_refuses(pipe, arguments, match):
    with pytest.raises(ValueError, match=match):
        teacher_forced_nll(pipe, *arguments)


def run(script: str, *arguments: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, ROOT / "benchmarks" / script, *arguments], check=True, env=environment, cwd=ROOT)


def test_shapes_benchmark_runs(tmp_path):
    run("cache_shapes.py", "--quick", "--output", str(tmp_path))
    with open(tmp_path / "cache_shapes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ways = [("original", "30"), ("full", "14"), ("hack", "15"), ("hack", "9")]
    assert [(row["model"], row["method"], row["B"]) for row in rows] == [
        (model, *way) for model in ("VAR", "Infinity") for way in ways
    ]
    for model, heads in (("VAR", 4), ("Infinity", 2)):
        own = [row for row in rows if row["model"] == model]
        stored = [int(row["bytes_allocated_peak"]) for row in own]
        assert stored == sorted(stored, reverse=True) and stored[0] == 30 * 2 * 2 * heads * 16 * 8
        # The full cache ends with one layer's history, the other's with the last scale joined to it, and an output. A
        # kernel may add the logarithms of its sums.
        full = 2 * heads * 16 * 4 * (2 * 14 + 2 * 30 + 16)
        assert full <= int(own[1]["bytes_peak"]) <= 1.02 * full
    table = (tmp_path / "cache_shapes.md").read_text().splitlines()
    assert len(table) == 10 and table[4].startswith("| 64 | fp32 | HACK 0.5 | 10 | 31.7 % |")


def test_shapes_benchmark_of_attention_alone(tmp_path):
    run("cache_shapes.py", "--quick", "--attention-only", "--output", str(tmp_path))
    with open(tmp_path / "cache_shapes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["measured"] for row in rows} == {"cache"}
    assert all(float(row["seconds_min"]) >= float(row["cache_seconds"]) for row in rows)


def test_quality_benchmark_runs_and_resumes(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--quick", "--output", str(tmp_path), "--methods", "hack", "random", "--budgets", "1.0", "0.4")
    run("demo_quality.py", *arguments)
    table = tmp_path / "demo_quality.csv"
    first = table.read_text()
    with open(table, newline="") as file:
        rows = {(row["method"], row["budget"]): row for row in csv.DictReader(file)}
    assert float(rows["hack", "1.0"]["nll_rise"]) == 0 and float(rows["hack", "1.0"]["agreement"]) == 1
    assert int(rows["hack", "0.4"]["bytes_allocated_peak"]) < int(rows["full", ""]["bytes_allocated_peak"])
    run("demo_quality.py", *arguments)
    assert table.read_text() == first
    assert (tmp_path / "pictures.png").stat().st_size > 0 and (tmp_path / "demo_quality.png").stat().st_size > 0
