"""Head profiles: what they say, how they are stored, and what they refuse."""

import json
import math
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hack_pipelines import HeadProfile
from hack_pipelines.methods.base import Geometry
from hack_pipelines.profiles.statistics import rank_correlation, statistic_shapes
from hack_pipelines.schedule import Schedule


SIZES = [[1, 1], [2, 2], [3, 5]]


def make_profile(num_layers=3, num_heads=4, seed=0, **overrides) -> HeadProfile:
    generator = torch.Generator().manual_seed(seed)
    shapes = statistic_shapes(num_layers, num_heads, len(SIZES))
    arguments = {
        "mean": {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()},
        "variance": {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()},
        "base_model": "someone/tiny",
        "base_revision": "0123abc",
        "family": "var",
        "num_layers": num_layers,
        "num_heads": num_heads,
        "head_dim": 16,
        "schedule": SIZES,
        "dtype": "float32",
        "sampling": {"guidance": (1.0, 1.5, 2.0), "top_k": (0, 0, 0), "more_smooth": False},
        "inputs": [3, "tabby cat"],
        "seeds": [7, 8],
        "software": {"torch": "2.0"},
    }
    return HeadProfile(**(arguments | overrides))


def with_scores(scores: list[list[float]]) -> HeadProfile:
    """A profile with given variances at the last scale, and misleading ones before."""
    profile = make_profile(len(scores), len(scores[0]))
    profile.mean["colvar"] = -torch.tensor(scores).unsqueeze(-1).repeat(1, 1, len(SIZES))
    profile.mean["colvar"][:, :, -1] *= -1
    return profile


def geometry(**overrides) -> Geometry:
    sizes = tuple(tuple(size) for size in SIZES)
    return Geometry(**({"schedule": Schedule(sizes), "num_layers": 3, "num_heads": 4, "head_dim": 16} | overrides))


# Head types


def test_contextual_heads_are_the_lowest_of_all_layers():
    profile = with_scores([[0.1, 0.9, 0.2], [0.8, 0.7, 0.6]])
    assert profile.contextual_heads(0.5).tolist() == [[True, False, True], [False, False, True]]
    assert profile.contextual_heads(0).sum() == 0
    assert profile.contextual_heads(1).sum() == 6


def test_ties_go_by_layer_then_head():
    profile = with_scores([[0.5, 0.5, 0.5], [0.5, 0.5, 0.1]])
    assert profile.contextual_heads(0.5).tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("alpha", "count"), [(0.5, 5), (0.1, 1), (0.15, 2), (0.25, 3), (0.35, 4), (0.04, 0), (0.05, 1), (0.7, 7)]
)
def test_number_of_contextual_heads_rounds_half_up(alpha, count):
    profile = with_scores([[0.1 * head for head in range(5)], [1 + 0.1 * head for head in range(5)]])
    assert profile.contextual_heads(alpha).sum() == count


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must lie in \[0, 1\]"):
        make_profile().contextual_heads(alpha)


def test_gap_is_the_ratio_across_the_cut():
    profile = with_scores([[0.1, 0.8, 0.2], [0.9, 0.7, 0.3]])
    assert profile.gap(0.5) == pytest.approx(0.7 / 0.3)
    assert profile.gap(1 / 3) == pytest.approx(0.3 / 0.2)
    assert with_scores([[0.0, 0.5]]).gap(0.5) == math.inf
    assert with_scores([[0.0, 0.0]]).gap(0.5) == 1
    with pytest.raises(ValueError, match="one side"):
        profile.gap(0)


def test_rank_correlation():
    first = torch.tensor([[1.0, 2.0, 2.0], [4.0, 5.0, 9.0]])
    assert rank_correlation(first, first.exp()) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    # By hand: ranks 0 1 2 3 against 0 1.5 1.5 3, centred, give 4.5 / sqrt(5 * 4.5).
    tied = rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 2, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert math.isnan(rank_correlation(first, torch.ones(2, 3)))


# The picture


def test_head_map_colours_and_marks_each_head():
    profile = with_scores([[0.1, 0.9], [0.8, 0.2], [0.05, 0.7]])
    picture = profile.head_map(0.5)
    left, top, cell = 78, 110, 40
    for layer in range(3):
        for head in range(2):
            corner = picture.getpixel((left + layer * cell + 3, top + head * cell + 3))
            middle = picture.getpixel((left + layer * cell + 19, top + head * cell + 19))
            contextual = bool(profile.contextual_heads(0.5)[layer, head])
            assert (corner[2] > corner[0]) == contextual, "blue means contextual, orange structural"
            assert (middle != corner) == contextual, "a dot means contextual"
    darkest = [picture.getpixel((left + layer * cell + 3, top + 3)) for layer in (0, 2)]
    assert sum(darkest[1]) < sum(darkest[0]), "farther from the cut is darker"


@pytest.mark.parametrize("scores", [[[0.0, 0.0]], [[0.3]], [[0.0, 1e-30, 1.0]]])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_head_map_of_degenerate_scores(scores, alpha):
    assert with_scores(scores).head_map(alpha).width >= 600


def test_head_map_of_a_large_model_stays_readable():
    assert max(make_profile(40, 28).head_map().size) < 1200


# Does it fit


def test_check_fits():
    make_profile().check_fits(geometry())


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ({"num_layers": 16}, ["layers 16 (profile: 3)"]),
        ({"num_heads": 8}, ["heads a layer 8 (profile: 4)"]),
        ({"head_dim": 64}, ["channels a head 64 (profile: 16)"]),
        ({"schedule": Schedule.from_sides((1, 2, 4))}, ["scales of sizes 1 2 4 (profile: 1 2 3x5)"]),
        ({"num_layers": 2, "head_dim": 8}, ["layers 2 (profile: 3)", "channels a head 8 (profile: 16)"]),
    ],
)
def test_check_fits_names_each_difference(overrides, texts):
    with pytest.raises(ValueError) as error:
        make_profile().check_fits(geometry(**overrides))
    for text in (*texts, "someone/tiny", "hack-pipelines calibrate"):
        assert text in str(error.value)
    assert str(error.value).count("(profile:") == len(texts)


# Making and comparing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_layers": 4, "mean": make_profile().mean},
            r"`mean.mass` must be \(4, 4, 3, 3\), as the model says, but is \(3, 4, 3, 3\)",
        ),
        ({"num_heads": 0}, "`num_heads` must be a positive int but is 0"),
        ({"seeds": [1]}, "2 `inputs` and 1 `seeds`"),
        ({"inputs": [], "seeds": []}, "0 `inputs` and 0 `seeds`"),
        ({"mean": {"mass": torch.zeros(1)}}, "`mean` must hold"),
        ({"schedule": 5}, "`schedule` must be a list of heights and widths but is 5"),
        ({"schedule": [[1, 1], [0, 2], [3, 3]]}, "sides of at least 1"),
    ],
)
def test_bad_profiles(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_profile(**overrides)


def test_equality():
    assert make_profile() == make_profile()
    assert make_profile() != make_profile(base_model="other/model")
    assert make_profile() != make_profile(seed=1)
    changed = make_profile()
    changed.variance["entropy"][0, 0, 0] += 1
    assert make_profile() != changed
    assert make_profile() != "a profile"


# On disk


def test_round_trip(tmp_path):
    profile = make_profile()
    profile.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "head_map.png",
        "profile.safetensors",
    ]
    loaded = HeadProfile.from_pretrained(tmp_path)
    assert loaded == profile
    assert loaded.num_samples == 2
    assert loaded.schedule == Schedule(((1, 1), (2, 2), (3, 5)))
    assert torch.equal(loaded.scores, profile.mean["colvar"][:, :, 2])
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("README.md", "config.json", "head_map.png", "profile.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_config_says_how_it_was_made(tmp_path):
    make_profile().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format_version": 1,
        "base_model": "someone/tiny",
        "base_revision": "0123abc",
        "family": "var",
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "schedule": SIZES,
        "dtype": "float32",
        "sampling": {"guidance": [1.0, 1.5, 2.0], "top_k": [0, 0, 0], "more_smooth": False},
        "inputs": [3, "tabby cat"],
        "seeds": [7, 8],
        "software": {"torch": "2.0"},
    }


def test_card(tmp_path, monkeypatch):
    # Jinja2 is no dependency: the card must be written where it cannot be imported.
    monkeypatch.setitem(sys.modules, "jinja2", None)
    profile = make_profile()
    profile.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.library_name == "hack_pipelines"
    assert card.data.license == "apache-2.0"
    assert "head-profile" in card.data.tags
    for text in (
        "# Head profile of someone/tiny",
        "![Head types by layer and head](head_map.png)",
        'HackVARPipeline.from_pretrained("someone/tiny")',
        "pipe(class_labels=3, kv_budget=0.3)",
        "| layers, heads a layer, channels a head | 3, 4, 16 |",
        "| sides of the token maps | 1 2 3x5 |",
        "| samples | 2, seeds 7 to 8 |",
        "| sampling: guidance | 1, 1.5, 2 by scale |",
        f"is {profile.gap(0.5):.3g} times that just below it",
    ):
        assert text in card.text


def test_card_of_a_model_that_is_in_no_repository(tmp_path):
    make_profile(base_model=None, inputs=["a lighthouse", "a cat"]).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "an unnamed var model" in card.text
    assert "pipe(prompt='a lighthouse', kv_budget=0.3)" in card.text


def test_edited_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    make_profile().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture
def stored(tmp_path):
    make_profile().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "profile.safetensors")
    edit(tensors)
    save_file(tensors, folder / "profile.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit_config(folder, format_version=2),
            "format 2, but this package reads formats up to 1.*upgr",
        ),
        (lambda folder: edit_config(folder, format_version="gone"), "does not belong to a head profile"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "is damaged: it must hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name":'), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "There is no head profile in .*no config.json"),
        (lambda folder: edit_config(folder, seeds="gone"), r"lacks \['seeds'\]"),
        (lambda folder: edit_config(folder, sede=1), r"unknown \['sede'\]"),
        (lambda folder: edit_config(folder, num_heads=5), r"`mean.mass` must be \(3, 5, 3, 3\)"),
        (lambda folder: edit_config(folder, schedule="abc"), "is damaged"),
        (lambda folder: edit_config(folder, software=3), "is damaged"),
        (lambda folder: (folder / "profile.safetensors").unlink(), "lacks its profile.safetensors"),
        (lambda folder: (folder / "profile.safetensors").write_bytes(b"PK\x03\x04 pickle"), "safetensors is damaged"),
        (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("mean.mass")), "`mean` must hold"),
        (
            lambda folder: edit_tensors(folder, lambda t: t.update(extra=torch.ones(1))),
            "holds 'extra', which is no part",
        ),
        (
            lambda folder: edit_tensors(folder, lambda tensors: tensors["mean.colvar"].fill_(math.nan)),
            "`mean.colvar` has entries that are not finite",
        ),
    ],
)
def test_damaged_and_foreign_folders(stored, damage, message):
    damage(stored)
    with pytest.raises(ValueError, match=message):
        HeadProfile.from_pretrained(stored)


def test_truncated_weights(stored):
    path = stored / "profile.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="profile.safetensors is damaged"):
        HeadProfile.from_pretrained(stored)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is neither a folder here nor a name that a Hub repo can have"):
        HeadProfile.from_pretrained(tmp_path / "nowhere")
