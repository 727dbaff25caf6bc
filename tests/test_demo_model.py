"""The trained model inside the package: complete, small, honest about itself, and compressed as it should be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hack_pipelines import HACK, HackVARPipeline, Random, ScaleWindow
from hack_pipelines.evaluation import psnr, teacher_forced_nll
from hack_pipelines.hub import locate

from .components import masked_nll, seeds


FOLDER = locate("demo").folder
HELD_OUT = Path(__file__).parents[1] / "benchmarks" / "data" / "demo_heldout_tokens.safetensors"
PICTURES = 48


@pytest.fixture(scope="module")
def pipe():
    pipe = HackVARPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def held_out():
    arrays = load_file(HELD_OUT)
    order = torch.randperm(len(arrays["labels"]), generator=torch.Generator().manual_seed(0))[:PICTURES]
    return arrays["tokens"][order].long(), arrays["labels"][order]


@pytest.fixture(scope="module")
def full_nll(pipe, held_out):
    return teacher_forced_nll(pipe, *held_out)


def test_folder_is_small_and_complete():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    names = {str(path.relative_to(FOLDER)) for path in files}
    assert {
        "README.md",
        "NOTICE.md",
        "model_index.json",
        "head_profile/config.json",
        "head_profile/head_map.png",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".py"))]
    assert "MIT License" in (FOLDER / "NOTICE.md").read_text()


def test_profile_belongs_to_the_model(pipe):
    profile = pipe.head_profile
    assert profile.base_model == "demo" and profile.num_samples >= 50
    profile.check_fits(pipe.geometry())
    share = profile.contextual_heads(0.5).float().mean()
    assert share == 0.5


def test_names_of_classes(pipe):
    names = json.loads((FOLDER / "model_index.json").read_text())["id2label"]
    assert len(names) == pipe.transformer.config["num_classes"]
    assert pipe.get_label_ids(["face smiling", "food fruit"]) == [
        int(key) for wanted in ("face smiling", "food fruit") for key, name in names.items() if name == wanted
    ]


def test_it_learned_the_held_out_pictures(full_nll):
    """Knowing nothing is ln 1024 = 6.93 nats a token."""
    assert full_nll.mean() < 4.2


def test_likelihood_is_that_of_the_masked_pass(pipe, held_out, full_nll):
    masked = masked_nll(pipe, held_out[0][:8], held_out[1][:8])
    torch.testing.assert_close(masked, full_nll[:8], atol=1e-4, rtol=0)


@pytest.mark.parametrize("protocol", ["pre", "post"])
def test_hack_beats_the_floors_at_its_own_protocol(pipe, held_out, full_nll, protocol):
    rises = {
        method.name: teacher_forced_nll(pipe, *held_out, 0.3, method) - full_nll
        for method in (HACK(protocol=protocol), Random(protocol=protocol), ScaleWindow(protocol=protocol))
    }
    for floor in ("random", "scale_window"):
        difference = rises[floor] - rises["hack"]
        assert difference.mean() > 2 * difference.std() / PICTURES**0.5


def test_damage_grows_as_the_budget_falls(pipe, held_out, full_nll):
    rises = [(teacher_forced_nll(pipe, *held_out, budget) - full_nll).mean().item() for budget in (1.0, 0.5, 0.3, 0.1)]
    assert rises[0] == 0 and rises == sorted(rises)


def test_pictures_are_near_the_full_cache_at_half_the_tokens(pipe):
    labels = list(range(0, 70, 9))
    options = {"class_labels": labels, "generator": None, "output_type": "pt"}

    def draw(**arguments):
        return pipe(**{**options, "generator": seeds(*range(len(labels)))}, **arguments)

    full, half, tenth = draw(), draw(kv_budget=0.5), draw(kv_budget=0.1)
    assert psnr(half.images, full.images).mean() > psnr(tenth.images, full.images).mean()
    assert half.cache_report.bytes_allocated_peak < full.cache_report.bytes_allocated_peak
    assert tenth.cache_report.peak_tokens <= 15


def test_lossless_run_is_exact(pipe):
    full = pipe(class_labels=[3], generator=seeds(5), output_type="latent")
    for arguments in ({"kv_budget": 1.0}, {"kv_budget": 91, "method": "random"}):
        out = pipe(class_labels=[3], generator=seeds(5), output_type="latent", **arguments)
        assert torch.equal(out.images, full.images)
