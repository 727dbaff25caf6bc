"""The command line, run in this process on tiny saved pipelines."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from hack_pipelines import HackVARClassPipeline, HackVARPipeline, HeadProfile, __version__
from hack_pipelines.cli import main
from hack_pipelines.cli.demo import DEMO_PROMPTS
from hack_pipelines.cli.options import parse_budget, parse_class
from hack_pipelines.cli.sheet import GAP, MARGIN, Sheet, wrap
from hack_pipelines.distributed import file_name
from hack_pipelines.methods import METHODS, RASTER_METHODS
from hack_pipelines.models.infinity_schedules import template_schedule

from .components import seeds, tiny_pipeline, tiny_text_pipeline
from .conftest import FIXTURES


SIDES = (1, 2, 3, 4, 5)
SIDE = 10
# Infinity's smallest square, so that the model draws its other shapes, too; 32 pixels a side here.
TEXT_SIZES = [(side, side) for side in (1, 2, 4, 6, 8, 12, 16)]
TEXT_SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A pipeline with the profile that belongs to it."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_pipeline(patch_nums=SIDES).save_pretrained(folder)
    assert main(["calibrate", "--model", str(folder), "-o", str(folder / "head_profile"), "--num-samples", "2"]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    """A text-to-image pipeline with the profile that belongs to it."""
    folder = tmp_path_factory.mktemp("cli") / "text"
    tiny_text_pipeline(TEXT_SIZES).save_pretrained(folder)
    assert main(["calibrate", "--model", str(folder), "-o", str(folder / "head_profile"), "--num-samples", "2"]) == 0
    return str(folder)


def refused(capsys, *argv, status: int = 2) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("hack-pipelines: error: ")
    return err.removeprefix("hack-pipelines: error: ").rstrip("\n")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def drawn(model: str, label: int | str, seed: int, **options) -> np.ndarray:
    """What the pipeline itself draws."""
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(label, generator=seeds(seed), **options).images[0])


# What is typed


@given(st.integers())
def test_whole_numbers_are_tokens(value):
    parsed = parse_budget(str(value))
    assert parsed == value and type(parsed) is int


@given(st.floats(allow_nan=False))
def test_other_numbers_are_fractions(value):
    parsed = parse_budget(repr(value))
    assert parsed == value and type(parsed) is float


@given(st.floats(0, 1e6), st.sampled_from(["B", "kB", "MB", "GiB", " mib"]))
def test_bytes_stay_text(value, unit):
    assert parse_budget(f"{value:f}{unit}") == f"{value:f}{unit}"


@given(st.text())
def test_any_budget_is_a_number_or_text_or_none(text):
    assert parse_budget(text) is None or isinstance(parse_budget(text), (int, float)) or parse_budget(text) == text


@pytest.mark.parametrize("text", ["none", "None", " NONE "])
def test_no_budget(text):
    assert parse_budget(text) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("207", 207), ("-1", -1), ("crane", "crane"), ("7 up", "7 up"), ("", "")]
)
def test_classes(text, expected):
    assert parse_class(text) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-images", "0"],
        ["--batch-size", "x"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--height", "0"],
        ["--width", "1.5"],
    ],
)
def test_numbers_out_of_range_end_at_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *arguments])
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}: must be a whole number" in capsys.readouterr().err


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hack_pipelines {__version__}\n"


def test_help_and_typing_mistakes_do_not_wait_for_torch():
    code = (
        "import sys, hack_pipelines.cli as cli\n"
        "cli.build_parser().format_help()\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hack_pipelines.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hack_pipelines {__version__}\n")


# Errors


def test_debug_raises_wherever_it_is_typed(tmp_path):
    for argv in (["--debug", "profile", "show"], ["profile", "show", "--debug"]):
        with pytest.raises(ValueError, match="There is no head profile in"):
            main([*argv, str(tmp_path)])


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hack_pipelines.cli.methods.run", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "hack-pipelines: interrupted\n"


def test_what_no_model_can_do_is_refused_before_one_is_loaded(tmp_path, capsys):
    # The model does not exist, so that loading it would give another message.
    start = ["generate", "0", "--model", tmp_path / "missing", "-o", tmp_path / "a.png"]
    assert refused(capsys, *start, "--kv-budget", "64 parsecs") == (
        "`kv_budget` must be a fraction of the full cache (a float in (0, 1]), a number of tokens per head (an int), or "
        'bytes per image such as "64MB" or "1.5GiB", but is \'64 parsecs\'.'
    )
    assert (
        refused(capsys, *start, "--kv-budget", "0")
        == "`kv_budget` must be at least 1 token when it is an int, but is 0."
    )
    assert "For 30 tokens write an int." in refused(capsys, *start, "--kv-budget", "30.0")
    assert refused(capsys, *start, "--method", "hac").startswith("`method` must be one of 'cake', ")
    assert refused(capsys, *start, "-o", tmp_path / "a.txt") == (
        f"'{tmp_path}/a.txt' must end in .png, .jpg, .webp or the like, to say what kind of picture it is."
    )
    assert refused(capsys, *start, "-o", tmp_path) == (
        f"'{tmp_path}' is a folder, where the name of a picture such as 'out.png' was expected."
    )
    (tmp_path / "file").touch()
    for option in (["-o", tmp_path / "file" / "a.png"], ["--output-dir", tmp_path / "file"]):
        assert f"'{tmp_path}/file'" in refused(capsys, "generate", "0", "--model", tmp_path / "missing", *option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(capsys, tmp_path):
    assert refused(capsys, "generate", "0", "--device", "cuda", "-o", tmp_path / "a.png") == (
        "`--device cuda` was asked for, but torch sees no CUDA device: use `--device cpu`."
    )


def test_what_the_model_refuses(model, tmp_path, capsys):
    start = ["generate", "--model", model, "-o", tmp_path / "a.png"]
    assert refused(capsys, *start, "golden retriver").startswith(
        "There is no class named 'golden retriver'. Did you mean 'golden retriever'"
    )
    assert (
        refused(capsys, *start, "crane")
        == "Class name 'crane' belongs to several classes: 2 (crane); 3 (crane). Give the id."
    )
    assert "`kv_budget=2` leaves 2 tokens a head" in refused(capsys, *start, "0", "--kv-budget", "2")
    assert "`temperature` must be a number in (0, 1000] but is 0.0." == refused(
        capsys, *start, "0", "--temperature", "0"
    )
    assert not (tmp_path / "a.png").exists()


# generate


def test_one_picture_is_what_the_pipeline_draws(model, tmp_path, capsys):
    path = tmp_path / "new folder" / "a.png"
    options = [
        "--kv-budget",
        "0.3",
        "--guidance-scale",
        "1.5",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--temperature",
        "1.1",
    ]
    assert main(["generate", "lighthouse", "--model", model, "--seed", "3", "-o", str(path), *options]) == 0
    expected = drawn(model, 4, 3, kv_budget=0.3, guidance_scale=1.5, top_k=5, top_p=0.9, temperature=1.1)
    assert np.array_equal(pixels(path), expected)
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: lighthouse, seed 3\ncache per picture: ")
    # 16 tokens (0.3 of 55) in 3 layers, 4 heads of 16 channels, keys and values in float32, two rows.
    # HACK++ shares them out by weights, which leaves a rest of less than a group's heads, and counts ids of two bytes.
    found = re.search(r"([\d.]+) MiB stored .* at most ([\d.]+) tokens a head", out)
    assert 15.7 < float(found[2]) <= 16
    assert float(found[1]) == pytest.approx(float(found[2]) * 3 * 4 * (16 * 2 * 4 + 2) * 2 / 2**20, abs=0.006)


def test_a_seed_means_one_picture(model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["generate", "1", "--model", model, "--seed", str(seed), "-o", str(tmp_path / f"{name}.png")]) == 0
    first, again, other = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_method_and_more_smooth_are_passed_on(model, tmp_path):
    path = tmp_path / "a.png"
    argv = ["generate", "1", "--model", model, "-o", str(path), "--kv-budget", "10"]
    assert main([*argv, "--method", "random"]) == 0
    assert np.array_equal(pixels(path), drawn(model, 1, 0, kv_budget=10, method="random"))
    assert main([*argv, "--more-smooth"]) == 0
    assert np.array_equal(pixels(path), drawn(model, 1, 0, kv_budget=10, more_smooth=True))


def test_half_precision_halves_what_is_stored(model, tmp_path, capsys):
    stored = []
    for dtype in ("fp32", "bf16"):
        assert main(["generate", "1", "--model", model, "--dtype", dtype, "-o", str(tmp_path / "a.png")]) == 0
        stored.append(float(capsys.readouterr().out.split("cache per picture: ")[1].split()[0]))
    assert stored == [round(30 * 3 * 4 * 16 * 2 * size * 2 / 2**20, 2) for size in (4, 2)]


def test_a_folder_gets_a_file_for_each_class_and_seed(model, tmp_path, capsys):
    argv = ["generate", "tabby cat", "--class", "1", "--num-images", "2", "--model", model, "--batch-size", "3"]
    assert main([*argv, "--output-dir", str(tmp_path)]) == 0
    stems = ["00000-tabby-0", "00001-tabby-1", "00002-golden-retriever-2", "00003-golden-retriever-3"]
    names = [f"{stem}.{ending}" for stem in stems for ending in ("json", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "manifest.jsonl", "settings.json"]
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: 4 pictures, listed in manifest.jsonl\ncache per picture: ")
    assert np.array_equal(pixels(tmp_path / "00003-golden-retriever-3.png"), drawn(model, 1, 3))


def test_several_pictures_make_a_sheet(model, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert main(["generate", "0", "1", "-1", "--model", model, "-o", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 3 pictures\n")
    sheet, side = Image.open(path).convert("RGB"), 12 * SIDE
    assert sheet.width == 2 * side + GAP + 2 * MARGIN
    picture = Image.fromarray(drawn(model, 0, 0)).resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(sheet.crop((MARGIN, MARGIN, MARGIN + side, MARGIN + side))), np.asarray(picture))


def test_without_a_class_each_seed_draws_one(model, tmp_path):
    assert main(["generate", "--num-images", "3", "--model", model, "--output-dir", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    labels = [int(torch.multinomial(torch.full((10,), 0.1), 1, generator=seeds(seed)[0])) for seed in range(3)]
    names = [
        "tabby",
        "golden retriever",
        "crane",
        "crane",
        "lighthouse",
        *(f"class {number}" for number in range(5, 10)),
    ]
    assert [(record["class_label"], record["name"], record["seed"]) for record in records] == [
        (label, names[label], seed) for seed, label in enumerate(labels)
    ]


def test_finished_pictures_survive_an_interrupt(model, tmp_path, monkeypatch, capsys):
    from hack_pipelines.cli import generate

    draw, drawn_before = generate.draw, []

    def interrupted_at_the_third(family, arguments, batch):
        if len(drawn_before) == 2:
            raise KeyboardInterrupt
        drawn_before.append(batch)
        return draw(family, arguments, batch)

    monkeypatch.setattr(generate, "draw", interrupted_at_the_third)
    path = tmp_path / "a.png"
    assert main(["generate", "0", "--num-images", "4", "--batch-size", "1", "--model", model, "-o", str(path)]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == (f"{path}: 2 pictures\n", "hack-pipelines: interrupted\n")
    assert Image.open(path).width == 2 * 12 * SIDE + GAP + 2 * MARGIN


@given(st.text())
@example("a" * 61)
@example("a " * 31)
@example("𝐚" * 40)
def test_file_names_are_short_words(text):
    name = file_name(text)
    assert re.fullmatch(r"\w+(-\w+)*", name) and len(name.encode()) <= 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple, 3d style!", "a-red-apple-3d-style"),
        ("une maison à côté d'un phare", "une-maison-à-côté-d-un-phare"),
        ("?", "picture"),
        # A word that would be cut is left out.
        ("a lighthouse in a storm, " + "word " * 8, "a-lighthouse-in-a-storm-word-word-word-word-word-word-word"),
        ("x" * 58 + " y z", "x" * 58 + "-y"),
        ("x" * 70, "x" * 60),
    ],
)
def test_a_file_is_named_after_its_prompt(text, expected):
    assert file_name(text) == expected


def test_no_memory_is_answered_with_what_to_do(model, tmp_path, monkeypatch, capsys):
    def out_of_memory(pipe, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(HackVARClassPipeline, "__call__", out_of_memory)
    argv = ["generate", "0", "1", "2", "--model", model, "--batch-size", "2", "-o", tmp_path / "a.png"]
    # Not bad input: what fills the device may be gone at the next try.
    assert refused(capsys, *argv, status=1) == (
        "The device is out of memory with 2 pictures at a time: use a smaller `--batch-size` or `--kv-budget`, or "
        "`--dtype bf16`."
    )


# Text-to-image models


def test_a_prompt_is_drawn_as_the_pipeline_draws_it(text_model, tmp_path, capsys):
    path, prompt = tmp_path / "a.png", "a smiling cat"
    argv = ["generate", prompt, "--model", text_model, "-o", str(path)]
    assert main([*argv, "--kv-budget", "0.1"]) == 0
    assert np.array_equal(pixels(path), drawn(text_model, prompt, 0, kv_budget=0.1))
    assert capsys.readouterr().out.startswith(f"{path}: {prompt}, seed 0\ncache per picture: ")
    sampling = ["--guidance-scale", "2", "--temperature", "1.5", "--top-p", "0.8", "--seed", "3"]
    assert main([*argv, *sampling, "--negative-prompt", "a storm"]) == 0
    options = {"guidance_scale": 2.0, "temperature": 1.5, "top_p": 0.8, "negative_prompt": "a storm"}
    assert np.array_equal(pixels(path), drawn(text_model, prompt, 3, **options))
    for name in options:
        without = {key: value for key, value in options.items() if key != name}
        assert not np.array_equal(pixels(path), drawn(text_model, prompt, 3, **without)), name


def test_digits_are_a_prompt_where_a_model_takes_prompts(text_model, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert main(["generate", "3", "-1", "--model", text_model, "-o", str(path)]) == 0
    assert main(["generate", "3", "--model", text_model, "-o", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[2] == f"{path}: 3, seed 0"
    assert np.array_equal(pixels(path), drawn(text_model, "3", 0))


def test_prompts_come_typed_and_from_a_file(text_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeff\na red apple\r\n   \n  a blue   house \n\n", encoding="utf-8")
    folder = tmp_path / "pictures"
    argv = ["generate", "a cat", "--model", text_model, "--output-dir", str(folder), "--num-images", "2"]
    assert main([*argv, "--prompts-file", str(tmp_path / "prompts.txt"), "--batch-size", "4", "--seed", "7"]) == 0
    names = ["a-cat", "a-cat", "a-red-apple", "a-red-apple", "a-blue-house", "a-blue-house"]
    stems = [f"{index:05d}-{name}-{7 + index}" for index, name in enumerate(names)]
    assert sorted(path.stem for path in folder.glob("*.png")) == stems
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == [f"{stem}.png" for stem in stems]
    assert (records[4]["prompt"], records[4]["name"]) == ("a blue   house", "a blue house")
    assert np.array_equal(pixels(folder / "00003-a-red-apple-10.png"), drawn(text_model, "a red apple", 10))


def test_classes_come_from_a_file_too(model, tmp_path):
    (tmp_path / "classes.txt").write_text("lighthouse\n-1\n1")
    folder = tmp_path / "pictures"
    argv = ["generate", "--model", model, "--output-dir", str(folder)]
    assert main([*argv, "--prompts-file", str(tmp_path / "classes.txt")]) == 0
    stems = ["00000-lighthouse-0", "00001-no-class-1", "00002-golden-retriever-2"]
    assert sorted(path.stem for path in folder.glob("*.png")) == stems
    assert np.array_equal(pixels(folder / "00001-no-class-1.png"), drawn(model, -1, 1))


def test_a_size_is_the_nearest_that_the_model_draws(text_model, tmp_path, caplog):
    tall, wide = tmp_path / "tall", tmp_path / "wide"
    start = ["generate", "a cat", "a house", "--model", text_model, "--batch-size", "1"]
    assert main([*start, "--output-dir", str(tall), "--height", "44", "--width", "22"]) == 0
    assert caplog.messages == []
    assert np.array_equal(pixels(tall / "00000-a-cat-0.png"), drawn(text_model, "a cat", 0, height=44, width=22))
    assert pixels(tall / "00000-a-cat-0.png").shape == (44, 22, 3)
    # Told once, not for each batch.
    assert main([*start, "--output-dir", str(wide), "--width", "64"]) == 0
    assert caplog.messages == [
        "32 x 64 (height x width) is not a size that this model draws: taking the nearest, 22 x 44."
    ]
    assert pixels(wide / "00001-a-house-1.png").shape == (22, 44, 3)


def test_long_prompts_have_short_captions(text_model, tmp_path, capsys):
    prompt = "a lighthouse in a storm " * 10
    assert main(["generate", prompt, "--model", text_model, "-o", str(tmp_path / "a.png")]) == 0
    caption = capsys.readouterr().out.splitlines()[0].removeprefix(f"{tmp_path / 'a.png'}: ")
    assert caption == f"{prompt[:97].rstrip()}..., seed 0"


@pytest.mark.parametrize(
    ("option", "values"), [("--negative-prompt", ["a storm"]), ("--height", ["32"]), ("--width", ["32"])]
)
def test_options_for_prompts_are_refused_for_classes(model, tmp_path, capsys, option, values):
    path = tmp_path / "a.png"
    assert refused(capsys, "generate", "0", "--model", model, "-o", path, option, *values) == (
        f"`{option}` is for text-to-image models, but {model} is a class-conditional model: leave it out."
    )
    assert not path.exists()


@pytest.mark.parametrize(("option", "values"), [("--class", ["3"]), ("--more-smooth", [])])
def test_options_for_classes_are_refused_for_prompts(text_model, tmp_path, capsys, option, values):
    path = tmp_path / "a.png"
    assert refused(capsys, "generate", "a cat", "--model", text_model, "-o", path, option, *values) == (
        f"`{option}` is for class-conditional models, but {text_model} is a text-to-image model: leave it out."
    )
    assert not path.exists()


def test_a_text_model_needs_a_prompt(text_model, tmp_path, capsys):
    assert refused(capsys, "generate", "--model", text_model, "-o", tmp_path / "a.png") == (
        'A text-to-image model needs a prompt: `hack-pipelines generate "a lighthouse in a storm"`, or one a line in '
        "`--prompts-file FILE`."
    )


def test_a_model_without_a_text_encoder_says_so(tmp_path, capsys):
    tiny_text_pipeline(with_text_encoder=False).save_pretrained(tmp_path / "features")
    argv = ["generate", "a cat", "--model", tmp_path / "features", "-o", tmp_path / "a.png"]
    assert refused(capsys, *argv).startswith("This pipeline has no text encoder: ")


@pytest.mark.parametrize("command", [["generate", "-o", "a.png"], ["calibrate", "-o", "profile"]])
def test_files_of_prompts_are_read_before_the_model(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    argv = [*command, "--model", "missing", "--prompts-file", "prompts.txt"]
    assert refused(capsys, *argv) == "[Errno 2] No such file or directory: 'prompts.txt'"
    (tmp_path / "prompts.txt").write_text(" \n\n")
    assert refused(capsys, *argv) == (
        "`--prompts-file` must hold a prompt or class a line, but prompts.txt holds none."
    )
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    assert refused(capsys, *argv).startswith(
        "`--prompts-file` must be a text file in UTF-8, but prompts.txt is none: "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


# offload


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("entry", ["a red apple", "3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU to offload to")
def test_offloaded_models_draw_the_same(request, tmp_path, monkeypatch, capsys, offload, entry):
    """Without a GPU weights go from main memory to main memory, through the same hooks."""
    folder = request.getfixturevalue("model" if entry == "3" else "text_model")
    reached = []
    for name in ("enable_model_cpu_offload", "enable_group_offload"):
        original = getattr(HackVARPipeline, name)
        monkeypatch.setattr(
            HackVARPipeline,
            name,
            lambda *args, _call=original, _name=name, **kw: reached.append(_name) or _call(*args, **kw),
        )
    pictures = []
    for more in ([], ["--offload", offload]):
        path = tmp_path / f"{len(more)}.png"
        assert main(["generate", entry, "--model", folder, "--kv-budget", "0.3", "-o", str(path), *more]) == 0
        pictures.append(path.read_bytes())
        assert (f"`--offload {offload}` brings weights to a GPU, but none is used" in capsys.readouterr().err) is bool(
            more
        )
    assert pictures[0] == pictures[1]
    # Diffusers calls the first again after each call.
    assert set(reached) == {{"model": "enable_model_cpu_offload", "group": "enable_group_offload"}[offload]}


def test_offload_with_a_device_map_is_refused(tmp_path, capsys):
    path = tmp_path / "x.png"
    assert refused(capsys, "generate", "x", "-o", str(path), "--device-map", "balanced", "--offload", "model") == (
        "`--device-map balanced` keeps all weights on the GPUs: leave it out, or leave out `--offload model`."
    )


# demo


def test_the_demo_of_a_text_model_draws_a_column_a_prompt(text_model, tmp_path, capsys):
    path = tmp_path / "demo.png"
    assert main(["demo", "--model", text_model, "-o", str(path), "--seed", "5"]) == 0
    assert len(DEMO_PROMPTS) == 8
    sheet, side = Image.open(path).convert("RGB"), 4 * TEXT_SIDE
    top = sheet.height - MARGIN - 4 * (side + GAP) + GAP
    left = sheet.width - MARGIN - 8 * (side + GAP) + GAP
    for row, column, budget in ((0, 1, None), (3, 7, 0.1)):
        x, y = left + column * (side + GAP), top + row * (side + GAP)
        cell = np.asarray(sheet.crop((x, y, x + side, y + side)), dtype=int)
        picture = Image.fromarray(drawn(text_model, DEMO_PROMPTS[column], 5 + column, kv_budget=budget))
        expected = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=int)
        # A batch of eight rounds differently from a single picture.
        assert np.abs(cell - expected).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 8 prompts, 4 budgets, seeds from 5"
    assert [line.split("  ")[0] for line in lines[3:]] == ["full cache", *(f"kv_budget={x}" for x in (0.5, 0.3, 0.1))]


def test_the_demo_draws_a_column_a_class_and_a_row_a_budget(model, tmp_path, capsys):
    path = tmp_path / "demo.png"
    assert main(["demo", "--model", model, "-o", str(path)]) == 0
    sheet, side = Image.open(path).convert("RGB"), 12 * SIDE
    # Five of ten classes have names.
    top = sheet.height - MARGIN - 4 * (side + GAP) + GAP
    left = sheet.width - MARGIN - 5 * (side + GAP) + GAP
    for row, budget in enumerate((None, 0.5, 0.3, 0.1)):
        x, y = left + 4 * (side + GAP), top + row * (side + GAP)
        cell = np.asarray(sheet.crop((x, y, x + side, y + side)), dtype=int)
        picture = Image.fromarray(drawn(model, 4, 4, kv_budget=budget)).resize((side, side), Image.Resampling.BICUBIC)
        # A batch of five rounds differently from a single picture.
        assert np.abs(cell - np.asarray(picture, dtype=int)).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 5 classes, 4 budgets, seeds from 0"
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for line, budget in zip(lines[3:], (None, 0.5, 0.3, 0.1), strict=True):
        report = pipe(0, generator=seeds(0), kv_budget=budget).cache_report
        stored = report.bytes_allocated_peak
        name, tokens, kibibytes, original, _, lossless, _, seconds = line.rsplit(maxsplit=7)
        assert name == ("full cache" if budget is None else f"kv_budget={budget}")
        assert (tokens, kibibytes) == (f"{report.peak_tokens:.1f}", f"{stored / 2**10:.1f}")
        assert original == f"{report.bytes_full / stored:.2f}x"
        assert lossless == f"{report.bytes_full_cacheable / stored:.2f}x"
        assert float(seconds) >= 0


# convert


def test_convert_makes_a_folder_that_draws_what_the_original_files_draw(tmp_path, capsys):
    manifest = json.loads((FIXTURES / "var" / "manifest.json").read_text())
    config = {"transformer": manifest["models"]["tiny_a"]["config"], "tokenizer": manifest["vae"]["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = [str(FIXTURES / "var" / name) for name in ("tiny_a.safetensors", "vae.safetensors")]
    folder = tmp_path / "converted"
    argv = ["convert", *files, str(folder), "--config", str(tmp_path / "config.json"), "--max-shard-size", "100KB"]
    assert main(argv) == 0
    written = [path for path in folder.rglob("*") if path.is_file()]
    shards = [path for path in written if path.suffix == ".safetensors" and path.parent.name == "transformer"]
    assert len(shards) > 1 and max(path.stat().st_size for path in shards) < 150_000
    size = sum(path.stat().st_size for path in written) / 1e6
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: {len(written)} files, {size:.1f} MB"
    options = {"kv_budget": None, "guidance_scale": 2.0, "top_k": 10}
    pipe = HackVARPipeline.from_original(*files, config=config)
    pipe.set_progress_bar_config(disable=True)
    expected = np.asarray(pipe(1, generator=seeds(0), **options).images[0])
    assert np.array_equal(drawn(str(folder), 1, 0, **options), expected)
    assert refused(capsys, *argv) == f"{folder} exists already: name a new folder, or remove this one first."


def test_convert_refuses_a_configuration_that_is_no_json(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text("{transformer: 1}")
    message = refused(capsys, "convert", "a.pth", "b.pth", tmp_path / "c", "--config", path)
    assert message.startswith(f"{path} is no JSON file: Expecting property name")
    assert str(tmp_path / "gone.json") in refused(capsys, "convert", "a", "b", "c", "--config", tmp_path / "gone.json")


# calibrate and profile


def test_calibrate_writes_a_profile_and_its_picture(model, tmp_path, capsys):
    folder = tmp_path / "profile"
    argv = ["calibrate", "--model", model, "-o", str(folder), "--num-samples", "3", "--seed", "5", "--batch-size", "2"]
    assert main([*argv, "--check"]) == 0
    out = capsys.readouterr().out.splitlines()
    profile = HeadProfile.from_pretrained(folder)
    assert profile.seeds == [5, 6, 7] and profile.base_model == "model"
    assert Image.open(folder / "head_map.png").width > 0
    assert out[0] == f"{folder}: head profile of model from 3 pictures"
    assert out[2] == f"variance just above the cut in the middle over that just below it: {profile.gap(0.5):.3f}"
    assert -1 <= float(out[3].removeprefix("rank correlation with another 3 seeds: ")) <= 1
    assert main(["generate", "0", "--model", model, "--head-profile", str(folder), "-o", str(tmp_path / "a.png")]) == 0


def test_calibrate_takes_prompts_of_a_file_in_turn(text_model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red apple\na house\n")
    folder = tmp_path / "profile"
    argv = ["calibrate", "--model", text_model, "-o", str(folder), "--prompts-file", str(tmp_path / "prompts.txt")]
    assert main([*argv, "--num-samples", "3"]) == 0
    assert HeadProfile.from_pretrained(folder).inputs == ["a red apple", "a house", "a red apple"]
    advice = f'generate "a lighthouse in a storm" --model {text_model} --head-profile {folder} --kv-budget 0.3'
    assert capsys.readouterr().out.splitlines()[-1] == f"draw with it: hack-pipelines {advice}"
    assert main([*shlex.split(advice), "-o", str(tmp_path / "a.png")]) == 0


def test_a_profile_in_the_models_folder_needs_no_naming(tmp_path, capsys):
    folder = tmp_path / "text"
    tiny_text_pipeline(TEXT_SIZES).save_pretrained(folder)
    argv = ["calibrate", "--model", str(folder), "--dtype", "bf16", "-o", str(folder / "head_profile")]
    assert main([*argv, "--num-samples", "1"]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("draw with it: hack-pipelines ")
    assert advice == f'generate "a lighthouse in a storm" --model {folder} --dtype bf16 --kv-budget 0.3'
    assert main([*shlex.split(advice), "-o", str(tmp_path / "a.png")]) == 0


def test_calibrate_takes_a_size(model, tmp_path, capsys):
    """A profile of the smallest size serves all, and a small card may have room for no other."""
    own, smallest = (template_schedule(1.0, pixels) for pixels in ("0.25M", "0.06M"))
    pipe = tiny_text_pipeline(own.sizes)
    pipe.save_pretrained(tmp_path / "sized")
    height, width = map(str, pipe.image_size(smallest))
    argv = ["calibrate", "--num-samples", "1", "-o", str(tmp_path / "profile")]
    assert main([*argv, "--model", str(tmp_path / "sized"), "--height", height, "--width", width]) == 0
    assert HeadProfile.from_pretrained(tmp_path / "profile").schedule == smallest
    # It is read for the larger ones.
    argv = [
        "generate",
        "a cat",
        "--model",
        str(tmp_path / "sized"),
        "--kv-budget",
        "0.3",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert main([*argv, "--head-profile", str(tmp_path / "profile")]) == 0
    tiny_text_pipeline([(1, 1), (2, 2), (5, 5)]).save_pretrained(tmp_path / "other")
    argv = [tmp_path / "other" if word == str(tmp_path / "sized") else word for word in argv]
    assert "does not fit this model, which has scales of sizes" in refused(
        capsys, *argv, "--head-profile", tmp_path / "profile"
    )
    argv = ["calibrate", "--num-samples", "1", "-o", str(tmp_path / "second")]
    assert refused(capsys, *argv, "--model", model, "--height", "256") == (
        f"`--height` is for text-to-image models, but {model} is a class-conditional model: leave it out."
    )


def test_calibrate_takes_classes_of_a_file(model, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("lighthouse\n1\n")
    argv = ["calibrate", "--model", model, "--prompts-file", str(tmp_path / "classes.txt"), "--num-samples", "2"]
    assert main([*argv, "-o", str(tmp_path / "profile")]) == 0
    assert HeadProfile.from_pretrained(tmp_path / "profile").inputs == [4, 1]
    (tmp_path / "classes.txt").write_text("light house\n")
    message = refused(capsys, *argv, "-o", tmp_path / "other")
    assert message.startswith("There is no class named 'light house'. Did you mean 'lighthouse'")


def test_calibrate_overwrites_no_other_folder(model, capsys):
    assert refused(capsys, "calibrate", "--model", model, "-o", model) == (
        f"{model} holds files that are no head profile: name a new folder."
    )


def test_profile_show_prints_facts_and_types(model, tmp_path, capsys):
    capsys.readouterr()
    folder, picture = f"{model}/head_profile", tmp_path / "map.png"
    assert main(["profile", "show", folder, "--alpha", "0.25", "--map", str(picture)]) == 0
    out = capsys.readouterr().out.splitlines()
    profile = HeadProfile.from_pretrained(folder)
    assert "model: model" in out and "samples: 2, seeds 0 to 1" in out and "sides of the token maps: 1 2 3 4 5" in out
    start = out.index("3 of 12 heads are contextual (C), the others structural (.); layers from left to right")
    assert out[start + 1] == f"variance just above the cut over that just below it: {profile.gap(0.25):.3f}"
    types = profile.contextual_heads(0.25).T.tolist()
    assert out[start + 2 : start + 6] == [
        f"head  {head}  " + " ".join("C" if flag else "." for flag in flags) for head, flags in enumerate(types)
    ]
    expected = profile.head_map(0.25)
    assert np.array_equal(pixels(picture), np.asarray(expected))


def test_profile_show_refuses(model, tmp_path, capsys):
    folder = f"{model}/head_profile"
    assert refused(capsys, "profile", "show", folder, "--alpha", "1.5") == "`alpha` must lie in [0, 1] but is 1.5."
    assert (
        refused(capsys, "profile", "show", tmp_path)
        == f"There is no head profile in {tmp_path}: it has no config.json."
    )


# methods


def test_methods_lists_all_with_their_defaults(capsys):
    assert main(["methods"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.split(":")[0] for block in blocks] == list({**METHODS, **RASTER_METHODS})
    random = blocks[list(METHODS).index("random")].splitlines()
    assert random[1:] == [
        "  models: next-scale and next-token",
        "  protocol: post, a step attends to all that is there and then stores a part",
        "  head profile: not needed",
        "  options: seed=0, protocol='post'",
        "  source: a floor, published by nobody",
    ]
    hack = blocks[list(METHODS).index("hack")]
    assert "alpha=0.5, contextual_ratio=0.333, n_obs=32" in hack and "head profile: needed (colvar)" in hack
    assert "models: next-scale\n" in hack
    assert "  models: next-token\n" in blocks[-1]


# Sheets


def test_a_sheet_is_as_large_as_what_is_on_it():
    pictures = [[Image.new("RGB", (64, 32), "red")] * 3, [Image.new("RGB", (64, 32), "blue")] * 2]
    sheet = Sheet(pictures).draw()
    assert sheet.size == (3 * 128 + 2 * GAP + 2 * MARGIN, 2 * 64 + GAP + 2 * MARGIN)
    assert sheet.getpixel((MARGIN, MARGIN)) == (255, 0, 0)
    assert sheet.getpixel((MARGIN + 128 + GAP, MARGIN + 64 + GAP)) == (0, 0, 255)
    assert sheet.getpixel((MARGIN + 2 * (128 + GAP), MARGIN + 64 + GAP)) == (255, 255, 255)


def test_large_pictures_keep_their_size():
    assert Sheet([[Image.new("RGB", (256, 256))]]).draw().size == (256 + 2 * MARGIN, 256 + 2 * MARGIN)


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=12), st.sampled_from([" ", "-"]))
@settings(max_examples=50)
def test_wrapping_loses_no_letter_and_keeps_to_the_width(words, joint):
    font = ImageFont.load_default(14)
    lines = wrap(joint.join(words), font, 100)
    assert "".join(lines).replace("-", "").replace(" ", "") == "".join(words)
    assert all(font.getlength(line) <= 100 or not set(" -") & set(line.rstrip("-")) for line in lines)
