"""The trained models inside the package: complete, small, honest about themselves, and compressed as they should be."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hack_pipelines import HACK, HackVARPipeline, HeadKV, Random, ScaleWindow
from hack_pipelines.evaluation import psnr, teacher_forced_nll
from hack_pipelines.hub import locate
from hack_pipelines.profiles.statistics import rank_correlation

from .components import masked_nll, seeds


HELD_OUT = Path(__file__).parents[1] / "benchmarks" / "data"
PICTURES = 48


@dataclass(frozen=True)
class Demo:
    """
    What a demo model promises.

    Args:
        held_out (`str`): Name of the file with its held-out pictures.
        megabytes (`int`): Most that its folder may take.
        nll (`float`): Most nats a token of held-out pictures; knowing nothing is ln 1024 = 6.93 for codes and
            12 ln 2 = 8.32 for bits.
        inputs (`list`): What is drawn.
    """

    held_out: str
    megabytes: int
    nll: float
    inputs: list


PROMPTS = [
    "a red heart",
    "a grinning face",
    "a smiling cat",
    "a red apple, blue background",
    "a gold star",
    "a blue book",
]
DEMOS = {
    "demo": Demo("demo_text_heldout", 20, 5.6, PROMPTS),
    "demo-class": Demo("demo_class_heldout", 16, 4.2, list(range(0, 70, 9))),
}


@pytest.fixture(scope="module", params=DEMOS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def demo(name):
    return DEMOS[name]


@pytest.fixture(scope="module")
def folder(name):
    return locate(name).folder


@pytest.fixture(scope="module")
def pipe(name):
    pipe = HackVARPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def held_out(demo):
    path = HELD_OUT / f"{demo.held_out}.safetensors"
    arrays = load_file(path)
    inputs = arrays["labels"].tolist() if "labels" in arrays else json.loads(path.with_suffix(".json").read_text())
    assert len(inputs) == len(arrays["tokens"])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:PICTURES]
    return arrays["tokens"][order].long(), [inputs[index] for index in order.tolist()]


@pytest.fixture(scope="module")
def full_nll(pipe, held_out):
    return teacher_forced_nll(pipe, *held_out)


def test_folder_is_small_and_complete(folder, demo):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= demo.megabytes * 2**20
    names = {str(path.relative_to(folder)) for path in files}
    assert {
        "README.md",
        "NOTICE.md",
        "samples.png",
        "model_index.json",
        "head_profile/config.json",
        "head_profile/head_map.png",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".py"))]
    assert "MIT License" in (folder / "NOTICE.md").read_text()


def test_no_file_names_the_machine_it_was_made_on(folder):
    for path in folder.rglob("*.json"):
        assert not re.search(r'"/\w+/', path.read_text()), path


def test_profile_belongs_to_the_model(pipe, name):
    profile = pipe.head_profile
    assert profile.base_model == name and profile.num_samples >= 50
    profile.check_fits(pipe.geometry())
    assert profile.contextual_heads(0.5).float().mean() == 0.5


def test_names_of_classes():
    pipe = HackVARPipeline.from_pretrained("demo-class")
    names = pipe.config["id2label"]
    assert len(names) == pipe.transformer.config["num_classes"]
    assert pipe.get_label_ids(["face smiling", "food fruit"]) == [
        int(key) for wanted in ("face smiling", "food fruit") for key, name in names.items() if name == wanted
    ]


def test_prompts_decide_what_is_drawn():
    """The right prompt explains a held-out picture better than another picture's."""
    pipe, demo = HackVARPipeline.from_pretrained("demo"), DEMOS["demo"]
    tokens = load_file(HELD_OUT / f"{demo.held_out}.safetensors")["tokens"][:PICTURES].long()
    prompts = json.loads((HELD_OUT / f"{demo.held_out}.json").read_text())[:PICTURES]
    right = teacher_forced_nll(pipe, tokens, prompts)
    difference = teacher_forced_nll(pipe, tokens, prompts[7:] + prompts[:7]) - right
    assert difference.mean() > 3 * difference.std() / PICTURES**0.5


def test_colours_follow_the_prompt():
    pipe = HackVARPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    colours = {"red": 0, "green": 1, "blue": 2}
    prompts = [f"a grinning face, {colour} background" for colour in colours]
    images = pipe(prompts, generator=seeds(0, 1, 2), output_type="pt").images
    corners = torch.stack([images[:, :, y, x] for y in (1, -2) for x in (1, -2)]).mean(0)
    assert corners.argmax(1).tolist() == list(colours.values())


def test_it_learned_the_held_out_pictures(full_nll, demo):
    assert full_nll.mean() < demo.nll


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


@pytest.mark.parametrize("budget", [0.3, 0.1])
def test_the_default_beats_every_floor(pipe, held_out, full_nll, budget):
    ours = teacher_forced_nll(pipe, *held_out, budget) - full_nll
    for floor in ("random", "scale_window", "value_norm"):
        difference = teacher_forced_nll(pipe, *held_out, budget, floor) - full_nll - ours
        assert difference.mean() > 2 * difference.std() / PICTURES**0.5


def test_eight_bits_cost_next_to_nothing(pipe, held_out, full_nll):
    for budget in (None, 0.3):
        plain = teacher_forced_nll(pipe, *held_out, budget)
        rounded = teacher_forced_nll(pipe, *held_out, budget, kv_dtype="int8")
        assert (rounded - plain).abs().mean() < 0.01 and not torch.equal(rounded, plain)


def test_how_local_heads_are_is_seen_early(pipe):
    class AtTheEnd(HeadKV):
        def identify_step(self, schedule):
            return len(schedule) - 1

    early, late = (method._localities(pipe.head_profile, pipe.schedule) for method in (HeadKV(), AtTheEnd()))
    assert rank_correlation(early, late) > 0.8
    assert sum(rank_correlation(*layer) for layer in zip(early, late)) / len(early) > 0.85


def test_damage_grows_as_the_budget_falls(pipe, held_out, full_nll):
    rises = [(teacher_forced_nll(pipe, *held_out, budget) - full_nll).mean().item() for budget in (1.0, 0.5, 0.3, 0.1)]
    assert rises[0] == 0 and rises == sorted(rises)


def test_pictures_are_near_the_full_cache_at_half_the_tokens(pipe, demo):
    def draw(**arguments):
        return pipe(demo.inputs, generator=seeds(*range(len(demo.inputs))), output_type="pt", **arguments)

    full, half, tenth = draw(), draw(kv_budget=0.5), draw(kv_budget=0.1)
    assert psnr(half.images, full.images).mean() > psnr(tenth.images, full.images).mean()
    assert half.cache_report.bytes_allocated_peak < full.cache_report.bytes_allocated_peak
    assert tenth.cache_report.peak_tokens <= 15


def test_lossless_run_is_exact(pipe, demo):
    full = pipe(demo.inputs[:1], generator=seeds(5), output_type="latent")
    for arguments in ({"kv_budget": 1.0}, {"kv_budget": 91, "method": "random"}):
        out = pipe(demo.inputs[:1], generator=seeds(5), output_type="latent", **arguments)
        assert torch.equal(out.images, full.images)
