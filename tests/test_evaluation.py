"""Metrics on inputs whose answer is known, and the benchmark scripts from end to end."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack_pipelines import HACK, Random
from hack_pipelines.evaluation import (
    first_differing_step,
    frechet_distance,
    psnr,
    ssim,
    teacher_forced_nll,
    token_agreement,
)
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


def looped_ssim(image: np.ndarray, other: np.ndarray) -> float:
    """SSIM of one channel, place by place."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(image.shape[0] - 10):
        for left in range(image.shape[1] - 10):
            x, y = (array[top : top + 11, left : left + 11] for array in (image, other))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2))
    return float(np.mean(values))


@given(st.integers(11, 16), st.integers(11, 16), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_ssim_is_that_of_the_loop(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64)
    reference = (images + 0.3 * torch.rand(images.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    expected = [
        np.mean([looped_ssim(*pair) for pair in zip(*both)]) for both in zip(images.numpy(), reference.numpy())
    ]
    assert ssim(images, reference).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_known_images():
    image = torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    assert ssim(image, image).tolist() == pytest.approx([1.0])
    other = image.flip(-1)
    assert torch.allclose(ssim(image, other), ssim(other, image)) and ssim(image, other) < 0.5
    # Without structure only the means count.
    flat = ssim(torch.full((1, 1, 11, 11), 0.5), torch.full((1, 1, 11, 11), 0.25))
    assert flat.item() == pytest.approx((2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4))
    # A negative has the opposite structure.
    assert ssim(image, 1 - image) < 0


@pytest.mark.parametrize(
    ("images", "reference", "match"),
    [
        (torch.zeros(1, 3, 16, 15), torch.zeros(1, 3, 16, 16), "one shape"),
        (torch.full((1, 3, 16, 16), -0.5), torch.zeros(1, 3, 16, 16), "-0.5"),
        (torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16), "11 pixels"),
    ],
)
def test_ssim_refuses(images, reference, match):
    with pytest.raises(ValueError, match=match):
        ssim(images, reference)


def members_of(mean: list[float], covariance: np.ndarray, count: int = 40) -> np.ndarray:
    """Members whose mean and covariance are exactly these."""
    members = np.random.default_rng(0).standard_normal((count, len(mean)))
    members -= members.mean(0)
    members = members @ np.linalg.inv(np.linalg.cholesky(np.cov(members.T).reshape(len(mean), -1))).T
    return members @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_a_closed_form():
    first = members_of([1.0, 2.0, 3.0], np.diag([4.0, 1.0, 9.0]))
    # Of commuting covariances the root is that of each variance.
    second = members_of([1.0, 0.0, 3.0], np.diag([1.0, 1.0, 4.0]), count=25)
    assert frechet_distance(first, second) == pytest.approx(2**2 + (2 - 1) ** 2 + (3 - 2) ** 2)
    assert frechet_distance(first, first + 2) == pytest.approx(3 * 2**2)
    assert frechet_distance(first, 3 * first) == pytest.approx(4 * (first.mean(0) @ first.mean(0)) + 4 * 14)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # Of one channel it is that of two numbers.
    line = members_of([0.0], np.array([[4.0]])), members_of([5.0], np.array([[9.0]]))
    assert frechet_distance(*line) == pytest.approx(5**2 + (3 - 2) ** 2)


def test_frechet_distance_of_covariances_that_do_not_commute():
    first, second = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    # The trace of the root of a 2 by 2 matrix with positive eigenvalues follows from its trace and determinant.
    product = first @ second
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    features = [torch.from_numpy(members_of([0.0, 0.0], matrix)) for matrix in (first, second)]
    assert frechet_distance(*features) == pytest.approx(expected)
    assert frechet_distance(*features[::-1]) == pytest.approx(expected)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert frechet_distance(*(entry @ turn for entry in features)) == pytest.approx(expected)


def test_frechet_distance_of_few_members():
    features = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    # The root of a singular covariance loses half of the digits.
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, features + 1) == pytest.approx(8, abs=1e-5)


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (torch.zeros(1, 2), "at least two members"),
        (torch.zeros(3, 3), "same channels"),
        (torch.zeros(3), "members, channels"),
        (torch.full((3, 2), math.nan), "finite"),
    ],
)
def test_frechet_distance_refuses(features, match):
    with pytest.raises(ValueError, match=match):
        frechet_distance(features, torch.zeros(4, 2))


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


def test_likelihood_takes_what_a_call_takes(pipe, pictures):
    full = teacher_forced_nll(pipe, *pictures)
    quantised = teacher_forced_nll(pipe, *pictures, kv_dtype="int8")
    assert 0 < (quantised - full).abs().max() < 0.1
    with pytest.raises(ValueError, match="ties what a step attends to"):
        teacher_forced_nll(pipe, *pictures, 0.5, HACK(), attention_budget=0.5)


def test_likelihood_of_a_picture_does_not_depend_on_its_batch(pipe, pictures):
    tokens, labels = pictures
    together = teacher_forced_nll(pipe, tokens, labels, 0.4, "hack")
    alone = torch.cat([teacher_forced_nll(pipe, tokens[i : i + 1], labels[i : i + 1], 0.4, "hack") for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(2, 29), [0, 1]), r"\[images, 30\]"),
        ((torch.zeros(2, 30), [0]), "one input an image"),
        ((torch.zeros(2, 30), [0, 1], None, "hack", 0), "batch_size"),
        ((torch.zeros(2, 30), [0, 1], 0.5, "magic"), "magic"),
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
