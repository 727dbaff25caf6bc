"""`hack-pipelines compare` on tiny saved pipelines, and what it is made of."""

import csv
import json
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hack_pipelines import HackVARPipeline
from hack_pipelines.cli import main
from hack_pipelines.comparison import ComparisonFolder
from hack_pipelines.comparison import report as report_module
from hack_pipelines.comparison.folder import FULL_RUN, Run
from hack_pipelines.comparison.plot import quality_plot
from hack_pipelines.comparison.study import PSNR_CEILING, Study
from hack_pipelines.comparison.table import ordered
from hack_pipelines.evaluation import first_differing_step, psnr, ssim, teacher_forced_nll, token_agreement
from hack_pipelines.methods import HACK, METHODS, Method, Random, get_method
from hack_pipelines.methods.spec import parse_method
from hack_pipelines.result_folder import replace_file

from .components import seeds, tiny_pipeline, tiny_text_pipeline


SIDES = (1, 2, 3, 4, 6)
TOTAL, CACHEABLE = 66, 30
LAYERS, HEADS, CHANNELS = 3, 4, 16
# Of a token of one row in float32: key and value of all heads.
TOKEN_BYTES = LAYERS * HEADS * CHANNELS * 2 * 4
LABELS = [0, 3, 9, 1, 1]
METHOD_SPECS = ("hack:rules=contextual,alpha=0.4", "hack++", "random")
BUDGET = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A pipeline with the profile that belongs to it."""
    folder = tmp_path_factory.mktemp("compare") / "model"
    tiny_pipeline(patch_nums=SIDES).save_pretrained(folder)
    assert main(["calibrate", "--model", str(folder), "-o", str(folder / "head_profile"), "--num-samples", "2"]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> str:
    """Tokens of five pictures, three of them of concepts that were seen."""
    path = tmp_path_factory.mktemp("compare") / "held_out.safetensors"
    tokens = torch.randint(0, 32, (5, TOTAL), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens.short(), "labels": torch.tensor(LABELS), "seen": torch.arange(5) < 3}, path)
    return str(path)


@pytest.fixture(scope="module")
def compared(model, held_out, tmp_path_factory):
    """The folder of one comparison."""
    folder = tmp_path_factory.mktemp("compare") / "results"
    assert compare(model, folder, METHOD_SPECS, BUDGET, "--held-out", held_out, "--sampling", "greedy", "sampled") == 0
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(model, folder, methods, budget, *options) -> int:
    """Compare with five pictures in batches of two."""
    start = ["compare", "--model", str(model), "-o", str(folder), "--images", "5", "--batch-size", "2"]
    return main([*start, "--methods", *methods, "--budgets", str(budget), *map(str, options)])


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert compare(*argv) == 2
    return capsys.readouterr().err.removeprefix("hack-pipelines: error: ").rstrip("\n")


def rows_of(folder) -> dict[str, dict[str, str]]:
    """Rows of the CSV table by method."""
    with open(folder / "results.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def forbidden(*args, **kwargs):
    raise AssertionError("nothing was left to measure")


# What a run measures


@pytest.mark.parametrize("method", METHOD_SPECS)
def test_likelihood_and_its_rise_are_those_of_the_library(compared, pipe, held_out, method):
    tokens = load_file(held_out)["tokens"].long()
    asked = f"{math.floor(BUDGET * TOTAL) * TOKEN_BYTES}B"
    own = teacher_forced_nll(pipe, tokens, LABELS, asked, method, 2)
    full = teacher_forced_nll(pipe, tokens, LABELS, batch_size=2)
    figures = ComparisonFolder(compared).tensors(Run(method, BUDGET))
    assert torch.equal(figures["nll"], own) and torch.equal(figures["nll_rise"], own - full)
    row = rows_of(compared)[method]
    rise = own - full
    for name, values in (("", rise), ("_seen", rise[:3]), ("_unseen", rise[3:])):
        assert float(row[f"nll_rise{name}"]) == pytest.approx(values.mean().item(), abs=1e-5)
        assert float(row[f"nll_rise{name}_se"]) == pytest.approx(values.std().item() / len(values) ** 0.5, abs=1e-5)


@pytest.mark.parametrize(("prefix", "options"), [("", {}), ("greedy_", {"top_k": 1})])
def test_pictures_are_those_of_the_pipeline_from_the_same_seeds(compared, pipe, prefix, options):
    folder, drawn = ComparisonFolder(compared), {}
    asked = f"{math.floor(BUDGET * TOTAL) * 2 * TOKEN_BYTES}B"
    for name, cache in (("full", {}), ("random", {"method": "random", "kv_budget": asked})):
        # Five of ten classes in steps of two, as calibration takes them.
        parts = [
            pipe(labels, generator=seeds(*numbers), output_type="pt", **cache, **options)
            for labels, numbers in (([1, 3], (0, 1)), ([5, 7], (2, 3)), ([9], (4,)))
        ]
        images = torch.cat([part.images for part in parts])
        drawn[name] = (
            (images * 255).round().byte() / 255,
            [torch.cat(ids) for ids in zip(*(p.tokens for p in parts))],
        )
    full, figures = folder.tensors(FULL_RUN), folder.tensors(Run("random", BUDGET))
    assert torch.equal(full[f"{prefix}pictures"] / 255, drawn["full"][0])
    assert torch.equal(figures[f"{prefix}pictures"] / 255, drawn["random"][0])
    assert torch.equal(figures[f"{prefix}tokens"], torch.cat(drawn["random"][1], dim=1))
    (images, tokens), (others, reference) = drawn["random"], drawn["full"]
    assert torch.equal(figures[f"{prefix}psnr"], psnr(images, others).clamp_max(PSNR_CEILING))
    assert torch.equal(figures[f"{prefix}ssim"], ssim(images, others))
    agreement = token_agreement(tokens, reference)
    assert torch.equal(figures[f"{prefix}agreement"], agreement) and agreement.min() < 1
    assert torch.equal(figures[f"{prefix}first_differing_step"], first_differing_step(tokens, reference))
    row = rows_of(compared)["random"]
    assert float(row[f"{prefix}psnr"]) == pytest.approx(figures[f"{prefix}psnr"].mean().item(), rel=1e-4)
    assert float(row[f"{prefix}identical"]) == pytest.approx((agreement == 1).double().mean().item())


def test_all_methods_get_the_same_bytes(compared):
    rows = rows_of(compared)
    asked = math.floor(BUDGET * TOTAL) * 2 * TOKEN_BYTES
    for method in METHOD_SPECS:
        row = rows[method]
        assert int(row["bytes_asked"]) == asked
        of_a_token = TOKEN_BYTES + LAYERS * HEADS * get_method(method).metadata_bytes
        assert int(row["B"]) == asked // (2 * of_a_token)
        assert 0.8 * asked < int(row["bytes_allocated_peak"]) <= asked
        assert float(row["keep"]) == pytest.approx(int(row["bytes_allocated_peak"]) / (2 * TOTAL * TOKEN_BYTES), 1e-5)
        assert float(row["b_N"]) == pytest.approx(int(row["B"]) / TOTAL, 1e-5)
        assert float(row["b_c"]) == pytest.approx(int(row["B"]) / CACHEABLE, 1e-5)
        assert float(row["peak_tokens"]) <= int(row["B"])
    assert int(rows["hack++"]["B"]) < int(rows["random"]["B"]) == math.floor(BUDGET * TOTAL)
    assert int(rows["hack++"]["metadata_bytes"]) > 0 == int(rows["random"]["metadata_bytes"])
    full = rows["full"]
    assert int(full["bytes_allocated_peak"]) == 2 * CACHEABLE * TOKEN_BYTES == int(full["bytes_full_lossless"])
    assert int(full["bytes_full_original"]) == 2 * TOTAL * TOKEN_BYTES == int(full["bytes_all_tokens"])
    assert "psnr" not in json.loads((compared / "runs" / "full.json").read_text())


def test_rows_say_how_they_were_measured(compared, model):
    row = rows_of(compared)["hack++"]
    assert (row["protocol"], row["model"], row["schedule"]) == ("decoupled", model, "1x1 2x2 3x3 4x4 6x6")
    assert (row["images"], row["seeds"], row["sampling"], row["nll_images"]) == ("5", "0 to 4", "sampled greedy", "5")
    assert (row["dtype"], row["device"], row["torch"]) == ("float32", "cpu", torch.__version__)
    # Three batches, of which the first one warms up.
    assert row["timed_batches"] == "2" and float(row["seconds_per_image"]) > 0
    assert row["cuda_peak_delta"] == "" and int(row["attention_flops"]) > 0


def test_the_table_is_sorted_and_the_pictures_are_there(compared):
    overview, everything = (compared / "results.md").read_text().split("Everything that was measured:")
    lines = everything.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0][:4] == ["method", "protocol", "budget", "keep"] and table[2][0] == "full"
    rises = [float(row[table[0].index("NLL rise")].split(" ± ")[0]) for row in table[3:]]
    assert rises == sorted(rises) and len(rises) == 3
    assert "Skipped" not in everything
    methods = [line.split(" | ")[0].removeprefix("| ") for line in overview.splitlines() if line.startswith("| ")]
    by_rise, by_psnr, by_agreement = (methods[start + 2 : start + 5] for start in (0, 5, 10))
    assert by_rise == [row[0] for row in table[3:]]
    names = [row[0] for row in table[3:]]
    quality = {
        name: float(row[table[0].index("PSNR, dB (full cache)")].split(" ± ")[0])
        for name, row in zip(names, table[3:])
    }
    assert by_psnr == sorted(names, key=lambda name: (-quality[name], name)) and set(by_agreement) == set(names)
    # Three rows and two columns of two by two pictures of 12 pixels.
    assert Image.open(compared / "pictures.png").height > 3 * 24
    assert sorted(path.name for path in compared.iterdir() if path.name != "quality.png") == [
        "pictures.png", "results.csv", "results.md", "runs", "settings.json"
    ]  # fmt: skip


def test_the_plot_is_drawn_where_matplotlib_is(compared):
    pytest.importorskip("matplotlib")
    assert Image.open(compared / "quality.png").width == (6 * 2 + 3) * 150


def test_the_largest_rise_lies_inside_the_plot():
    pytest.importorskip("matplotlib")
    rows = [
        {"method": method, "nll_rise": rise, "nll_rise_se": error, "bytes_asked": 2**20, "bytes_allocated_peak": 2**20}
        for method, rise, error in (("a", 1.4, 0.05), ("b", -0.001, None))
    ]
    bottom, top = quality_plot(rows).axes[0].get_ylim()
    assert bottom < -0.001 and top > 1.1 * 1.45


def test_greedy_and_sampled_columns_apart(model, tmp_path):
    assert compare(model, tmp_path, ["random"], 0.3, "--sampling", "greedy") == 0
    row = rows_of(tmp_path)["random"]
    assert "greedy_psnr" in row and "psnr" not in row and "nll" not in row
    assert "greedy PSNR" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "pictures.png").exists()


def test_likelihood_alone(model, held_out, tmp_path):
    assert compare(model, tmp_path, ["random"], 0.3, "--held-out", held_out, "--no-pictures") == 0
    row = rows_of(tmp_path)["random"]
    # Without guidance there is one row an image.
    asked = math.floor(0.3 * TOTAL) * TOKEN_BYTES
    assert int(row["bytes_asked"]) == asked == int(row["bytes_allocated_peak"])
    assert row["images"] == "0" and "psnr" not in row and float(row["nll_rise"]) != 0
    assert not (tmp_path / "pictures.png").exists()


def test_a_part_of_the_held_out_pictures(model, held_out, tmp_path, capsys):
    """Two of five, spread over the file: the first and the third."""
    options = ("--held-out", held_out, "--no-pictures", "--held-out-images", "2")
    assert compare(model, tmp_path, ["random"], 0.3, *options) == 0
    row = rows_of(tmp_path)["random"]
    assert row["nll_images"] == "2" and "nll_rise_unseen" in row
    pipe = HackVARPipeline.from_pretrained(model)
    tokens = load_file(held_out)["tokens"].long()[[0, 2]]
    figures = ComparisonFolder(tmp_path).tensors(FULL_RUN)
    assert torch.equal(figures["nll"], teacher_forced_nll(pipe, tokens, [LABELS[0], LABELS[2]], batch_size=2))
    assert json.loads((tmp_path / "settings.json").read_text())["held_out_images"] == 2
    # Another number is another measure.
    message = refused(capsys, model, tmp_path, ["random"], 0.5, *options[:-1], "3")
    assert "held_out_images was 2 and is now 3" in message and "Give `--held-out-images 2` to go on" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--held-out-images", "2"),
            "`--held-out-images 2` needs pictures: name a file with `--held-out`, or leave it out.",
        ),
        (("--held-out-images", "6"), "`--held-out-images` must be at most 5, what {} holds, but is 6."),
    ],
)
def test_held_out_pictures_that_are_not_there_are_refused(held_out, tmp_path, capsys, options, message):
    with_file = () if "name a file" in message else ("--held-out", held_out)
    assert refused(capsys, "missing", tmp_path / "a", ["random"], 0.3, *with_file, *options) == message.format(
        held_out
    )


def test_every_run_is_a_line_on_standard_error(model, held_out, tmp_path, capsys):
    options = ("--held-out", held_out, "--no-pictures")
    assert compare(model, tmp_path, ["random", "value_norm"], 0.3, *options) == 0
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if " of 3: " in line]
    assert lines == ["1 of 3: full cache", "2 of 3: random at 0.3", "3 of 3: value_norm at 0.3"]
    assert " of 3: " not in output.out
    # What is there already is counted, and not told again.
    assert compare(model, tmp_path, ["random", "h2o"], 0.3, *options) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if " of 3: " in line] == ["3 of 3: h2o at 0.3"]


def test_quantised_runs_hold_more_tokens_in_the_same_bytes(model, tmp_path):
    assert compare(model, tmp_path, ["random"], 0.1, "--kv-dtype", "int8") == 0
    rows = rows_of(tmp_path)
    asked = math.floor(0.1 * TOTAL) * 2 * TOKEN_BYTES
    assert int(rows["random"]["bytes_asked"]) == asked >= int(rows["random"]["bytes_allocated_peak"])
    assert int(rows["random"]["B"]) == asked // (2 * LAYERS * HEADS * (CHANNELS * 2 + 4)) > 0.1 * TOTAL
    assert (rows["full"]["kv_dtype"], rows["random"]["kv_dtype"]) == ("", "int8")
    assert int(rows["full"]["bytes_allocated_peak"]) == 2 * CACHEABLE * TOKEN_BYTES


def test_an_attention_budget_is_for_methods_that_take_one(model, tmp_path):
    assert compare(model, tmp_path, ["random", "hack++"], 0.3, "--attention-budget", "0.5") == 0
    rows = rows_of(tmp_path)
    assert float(rows["hack++"]["eta_a"]) <= 0.5 < float(rows["random"]["eta_a"])


def test_prompts_and_their_held_out_pictures(tmp_path):
    tiny_text_pipeline().save_pretrained(tmp_path / "text")
    bits = torch.randint(0, 2, (3, 30, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_file({"tokens": bits}, tmp_path / "held_out.safetensors")
    (tmp_path / "held_out.json").write_text('["a red apple", "a house", "a blue cat"]')
    options = ("--held-out", tmp_path / "held_out.safetensors")
    assert compare(tmp_path / "text", tmp_path / "results", ["random"], 0.3, *options) == 0
    settings = json.loads((tmp_path / "results" / "settings.json").read_text())
    assert settings["inputs"] == ["a red apple", "a house", "a blue cat"] and settings["images"] == 5
    row = rows_of(tmp_path / "results")["random"]
    # Pictures of 8 pixels are smaller than the window.
    assert "ssim" not in row and "nll_rise_seen" not in row and float(row["agreement"]) < 1
    pipe = HackVARPipeline.from_pretrained(tmp_path / "text")
    pipe.set_progress_bar_config(disable=True)
    fourth = pipe("a red apple", generator=seeds(3), output_type="pt").tokens
    stored = ComparisonFolder(tmp_path / "results").tensors(FULL_RUN)["tokens"]
    assert (stored[3] == torch.cat(fourth, dim=1)[0]).double().mean() > 0.99


# Going on


def test_finished_runs_are_not_made_again(model, tmp_path, monkeypatch):
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    first, drawn_first = (tmp_path / "results.csv").read_text(), rows_of(tmp_path)["random"]
    del drawn_first["seconds_per_image"]
    with monkeypatch.context() as patch:
        patch.setattr(Study, "measure", forbidden)
        assert compare(model, tmp_path, ["random"], 0.3) == 0
    assert (tmp_path / "results.csv").read_text() == first
    # A run is finished when its row is there.
    (tmp_path / "runs" / "random@0.3.json").unlink()
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    again = rows_of(tmp_path)["random"]
    assert again.pop("seconds_per_image") and again == drawn_first


def test_others_add_to_the_same_folder(model, tmp_path):
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    full = (tmp_path / "runs" / "full.json").stat().st_mtime_ns
    assert compare(model, tmp_path, ["scale_window"], 0.3) == 0
    assert compare(model, tmp_path, ["scale_window", "random:protocol=pre"], 0.5) == 0
    assert (tmp_path / "runs" / "full.json").stat().st_mtime_ns == full
    with open(tmp_path / "results.csv", newline="") as file:
        rows = [(row["method"], row["budget"]) for row in csv.DictReader(file)]
    assert rows[0] == ("full", "") and set(rows[1:3]) == {("scale_window", "0.5"), ("random:protocol=pre", "0.5")}
    assert set(rows[3:]) == {("random", "0.3"), ("scale_window", "0.3")}
    assert all(not path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_other_settings_are_refused(model, tmp_path, capsys):
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    assert refused(capsys, model, tmp_path, ["random"], 0.5, "--seed", "1") == (
        f"{tmp_path} holds results with other settings: seed was 0 and is now 1. Give `--seed 0` to go on with it, or "
        "name another folder."
    )
    assert "inputs[0] was 1 and is now 4." in refused(
        capsys, model, tmp_path, ["random"], 0.5, "--prompts-file", prompts_file(tmp_path, "lighthouse")
    )


def prompts_file(folder, text: str):
    path = folder / "prompts.txt"
    path.write_text(text)
    return path


def test_what_cannot_be_reached_is_skipped_with_its_reason(model, tmp_path, capsys):
    assert compare(model, tmp_path, ["random", "hack"], 0.08) == 0
    reason = "`kv_budget='15360B'` leaves 5 tokens a head, but method 'random' needs at least 6"
    assert f"random at 0.08 is skipped: {reason}" in capsys.readouterr().err
    assert f"\n- random at 0.08: {reason}" in (tmp_path / "results.md").read_text()
    assert set(rows_of(tmp_path)) == {"full", "hack"}
    # What has become possible since is made.
    folder = ComparisonFolder(tmp_path)
    assert not folder.finished(Run("random", 0.08)) and folder.finished(Run("hack", 0.08))


def test_a_plot_that_fails_loses_no_run(model, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_module, "picture_sheet", fail)
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    assert "The plots could not be drawn: RuntimeError('no ink')" in capsys.readouterr().err
    assert set(rows_of(tmp_path)) == {"full", "random"}


def test_without_matplotlib_it_is_said_and_the_rest_is_drawn(model, tmp_path, monkeypatch, capsys):
    import hack_pipelines.comparison.plot as plot_module

    monkeypatch.setattr(plot_module, "can_plot", lambda: False)
    monkeypatch.setattr(report_module, "can_plot", lambda: False)
    assert compare(model, tmp_path, ["random"], 0.3) == 0
    assert "`pip install 'hack_pipelines[plots]'`" in capsys.readouterr().err
    assert (tmp_path / "pictures.png").exists() and not (tmp_path / "quality.png").exists()
    # Before the model is loaded: who wants the plot stops here, not after hours.
    assert compare("missing", tmp_path / "new", ["random"], 0.3) != 0
    assert "`pip install 'hack_pipelines[plots]'`" in capsys.readouterr().err


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(new):
        new.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_names_of_runs_are_safe_and_different():
    runs = [
        Run(method, budget) for method in ("hack", "hack:alpha=0.4", "hack++", "a/b", "a b") for budget in (0.3, 1)
    ]
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) and not any(set(name) & set('/\\:*?"<>| ') for name in names)


def test_the_best_method_of_a_budget_comes_first():
    def row(method, budget, **values):
        return {"method": method, "budget": budget, **values}

    rows = [
        row("a", 0.1, nll_rise=0.2, psnr=30.0),
        row("b", 0.1, nll_rise=0.1, psnr=20.0),
        row("full", None),
        row("a", 0.5, nll_rise=0.3, psnr=10.0),
    ]
    assert [(entry["method"], entry["budget"]) for entry in ordered(rows)] == [
        ("full", None), ("a", 0.5), ("b", 0.1), ("a", 0.1)
    ]  # fmt: skip
    for entry in rows:
        entry.pop("nll_rise", None)
    assert [entry["method"] for entry in ordered(rows)][2:] == ["a", "b"]


# Refusals before a model is loaded


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["hac"], (), "`method` must be one of "),
        (["hack:depth=3"], (), "Method 'hack' has no option 'depth'; its options are 'alpha', "),
        (["hack"], ("--kv-dtype", "int3"), "`kv_dtype` must be one of None, 'int8' but is 'int3'"),
        (["hack"], ("--held-out", "gone.safetensors"), "No such file or directory: gone.safetensors"),
        (["hack"], ("--prompts-file", "gone.txt"), "[Errno 2] No such file or directory: 'gone.txt'"),
    ],
)
def test_typing_mistakes_are_refused_at_once(tmp_path, capsys, methods, options, message):
    assert refused(capsys, "missing", tmp_path / "results", methods, 0.3, *options).startswith(message)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("budget", ["0", "1.5", "64MB", "none"])
def test_budgets_are_fractions(tmp_path, capsys, budget):
    with pytest.raises(SystemExit):
        compare("missing", tmp_path, ["hack"], budget)
    assert f"must be a fraction in (0, 1] but is {budget!r}" in capsys.readouterr().err


def test_held_out_files_are_checked(model, tmp_path, capsys):
    path = tmp_path / "held_out.safetensors"
    argv = (model, tmp_path / "results", ["random"], 0.3, "--held-out", path)
    path.write_text("no tensors")
    assert refused(capsys, *argv).startswith(f"`--held-out` must be a .safetensors file, but {path} is none: ")
    save_file({"labels": torch.tensor([1])}, path)
    assert "must hold `tokens` of at least one picture" in refused(capsys, *argv)
    tokens = torch.zeros(2, TOTAL, dtype=torch.int16)
    save_file({"tokens": tokens}, path)
    assert f"has no `labels`, and there is no {tmp_path / 'held_out.json'}" in refused(capsys, *argv)
    (tmp_path / "held_out.json").write_text('["a cat"]')
    assert "must name one class or prompt for each of the 2 pictures" in refused(capsys, *argv)
    save_file({"tokens": tokens[:, 1:].contiguous(), "labels": torch.tensor([1, 2])}, path)
    assert f"`tokens` must be [images, {TOTAL}]" in refused(capsys, *argv)


def test_something_must_be_measured(model, tmp_path, capsys):
    assert refused(capsys, model, tmp_path / "results", ["random"], 0.3, "--no-pictures") == (
        "Nothing would be measured: give held-out pictures, or have pictures drawn."
    )


# Methods as text


@dataclass
class Optioned(Method):
    """A method with an option of every type."""

    name: ClassVar[str] = "optioned"
    protocol: ClassVar[str] = "post"

    count: int = 1
    share: float = 0.5
    flag: bool = False
    limit: float | int | str | None = 0.3
    rest: int | None = 2
    word: str = "a"

    def min_budget(self, geometry, profile):
        raise NotImplementedError

    def plan(self, geometry, budget, profile, attention_budget=None):
        raise NotImplementedError

    def rank(self, view):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("count=3", {"count": 3}),
        ("share=1", {"share": 1.0}),
        ("share=1e-3,flag=true", {"share": 0.001, "flag": True}),
        ("flag=False, count = 7", {"flag": False, "count": 7}),
        ("limit=0.5", {"limit": 0.5}),
        ("limit=100", {"limit": 100}),
        ("limit=64MB", {"limit": "64MB"}),
        ("limit=none,rest=none", {"limit": None, "rest": None}),
        ("word=none", {"word": "none"}),
        ("word=a=b", {"word": "a=b"}),
    ],
)
def test_options_are_read_by_their_types(text, expected):
    method = parse_method(f"optioned:{text}" if text else "optioned", {"optioned": Optioned})
    assert method == Optioned(**expected)
    assert all(type(getattr(method, name)) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optioned:size=3", "'count', 'share', 'flag', 'limit', 'rest', 'word'"),
        ("optioned:count=0.5", "Option 'count' of method 'optioned' must be int but is '0.5'"),
        ("optioned:flag=1", "Option 'flag' of method 'optioned' must be bool but is '1'"),
        ("optioned:rest=x", "must be none or int but is 'x'"),
        ("optioned:count", "must have the form name:option=value,option=value but has 'count'"),
        ("optioned:", "must have the form"),
        ("optioned:count=1,count=2", "names the option 'count' twice"),
        ("other:count=1", "`method` must be one of 'optioned'"),
    ],
)
def test_texts_that_are_no_method_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_method(text, {"optioned": Optioned})


def test_methods_with_options_are_taken_everywhere(model, tmp_path):
    assert get_method("hack:rules=contextual,alpha=0.4") == HACK(rules="contextual", alpha=0.4)
    assert get_method("random:protocol=pre,seed=3") == Random(seed=3, protocol="pre")
    assert all(get_method(name) == kind() for name, kind in METHODS.items())
    with pytest.raises(ValueError, match="`rules` must be"):
        get_method("hack:rules=none")
    pipe = tiny_pipeline()
    pictures = [
        pipe(1, generator=seeds(0), kv_budget=0.4, method=method, output_type="pt").images
        for method in ("random:protocol=pre", Random(protocol="pre"), "random")
    ]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    argv = ["generate", "1", "--model", model, "-o", str(tmp_path / "a.png"), "--kv-budget", "0.4"]
    assert main([*argv, "--method", "random:seed=4"]) == 0
    assert main(["memory", "--kv-budget", "0.3", "--method", "hack:alpha=0.4"]) == 0
