"""Tables, plots and sheets of pictures from the rows that `demo_quality.py` has measured."""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from hack_pipelines.cli.sheet import Sheet


COLUMNS = {
    "method": "method",
    "protocol": "protocol",
    "B": "B",
    "b_N": "b_N",
    "b_c": "b_c",
    "peak_tokens": "peak tokens",
    "checkpoint_peak_tokens": "checkpoint peak",
    "bytes_allocated_peak": "bytes",
    "nll_rise": "NLL rise",
    "over_hack": "over HACK",
    "nll_rise_seen": "seen concepts",
    "nll_rise_unseen": "unseen concepts",
    "psnr": "PSNR, dB (full cache)",
    "agreement": "token agreement (full cache)",
    "identical": "identical",
    "first_differing_step": "first differing step",
    "attention_flops": "attention FLOPs",
    "seconds_per_image": "s per image",
}
WITH_ERRORS = ("nll_rise", "nll_rise_seen", "nll_rise_unseen", "psnr", "agreement")
PANELS = (("nll_rise", "rise of NLL, nats per token"), ("psnr", "PSNR to the full cache's picture, dB"))
FULL, HACK = "full", "hack"


def write_reports(rows: list[dict], output: Path) -> str:
    """
    `demo_quality.md`, `demo_quality.png` and `pictures.png` in a folder.

    Args:
        rows (`list[dict]`):
            Rows of the CSV table, as read.
        output (`Path`):
            Folder with `runs/`, the figures of every image.

    Returns:
        `str`: the Markdown table.
    """
    text = markdown(rows, output / "runs")
    (output / "demo_quality.md").write_text(text)
    compressed = [row for row in rows if row["method"] != FULL]
    if compressed:
        plot(compressed).savefig(output / "demo_quality.png", dpi=150)
        sheet(compressed, output / "runs").save(output / "pictures.png")
    return text


def figures_of(row: dict, runs: Path) -> dict[str, torch.Tensor]:
    """Figures of every image of a run."""
    return load_file(runs / f"{row['method']}@{row['budget'] or 'all'}.safetensors")


def markdown(rows: list[dict], runs: Path) -> str:
    """What all rows share, then the table; `±` is the standard error over images."""
    first = rows[0]
    lines = [
        f"Model {first['model']}, schedule {first['schedule']}, {first['dtype']} on {first['device']}, torch "
        f"{first['torch']}, hack_pipelines {first['hack_pipelines']}. NLL of {first['nll_images']} held-out pictures "
        f"({first['nll']} nats per token with the full cache), {first['images']} pictures drawn with seeds {first['seeds']} "
        f"in batches of {first['batch_size']}; bytes are per image with guidance, out of {int(first['bytes_full']):,} "
        "(all tokens, float32 keys).",
        "",
        f"| {' | '.join(COLUMNS.values())} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    lines += [f"| {' | '.join(cell(row, name, rows, runs) for name in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(row: dict, name: str, rows: list[dict], runs: Path) -> str:
    """One entry of the table."""
    if name == "over_hack":
        return over_hack(row, rows, runs)
    if name in WITH_ERRORS:
        digits = 2 if name == "psnr" else 4
        return plus_minus(float(row[name]), float(row[f"{name}_se"]), digits)
    if name in ("bytes_allocated_peak", "attention_flops"):
        return f"{int(row[name]):,}"
    return row[name]


def over_hack(row: dict, rows: list[dict], runs: Path) -> str:
    """NLL rise over that of HACK at the same budget, paired by image; positive is worse than HACK."""
    hack = [other for other in rows if other["method"] == HACK and other["budget"] == row["budget"]]
    if row["method"] in (HACK, FULL) or not hack:
        return ""
    difference = figures_of(row, runs)["nll_rise"] - figures_of(hack[0], runs)["nll_rise"]
    return plus_minus(difference.mean().item(), difference.std().item() / math.sqrt(len(difference)), 4)


def plus_minus(mean: float, error: float, digits: int) -> str:
    """Mean and standard error; empty for a mean of nothing."""
    return "" if math.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def plot(rows: list[dict]) -> Figure:
    """Damage against the bytes that were stored, a line a method."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS):
        for number, method in enumerate(ordered(row["method"] for row in rows)):
            points = sorted(
                (int(row["bytes_allocated_peak"]) / 2**20, float(row[name]), float(row[f"{name}_se"]))
                for row in rows
                if row["method"] == method
            )
            sizes, means, errors = zip(*points)
            style = "-" if method.startswith(HACK) else "--"
            axes.errorbar(
                sizes, means, errors, label=method, marker="o", ms=4, ls=style, color=f"C{number}", capsize=2
            )
        axes.set(xlabel="stored at most, MiB per image", ylabel=title, xscale="log")
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def sheet(rows: list[dict], runs: Path) -> Image.Image:
    """The same pictures for every method and budget, the full cache's first."""
    methods = ordered(row["method"] for row in rows)
    budgets = sorted({float(row["budget"]) for row in rows}, reverse=True)
    full = mosaic(load_file(runs / f"{FULL}@all.safetensors")["pictures"])
    cells = {(row["method"], float(row["budget"])): mosaic(figures_of(row, runs)["pictures"]) for row in rows}
    blank = Image.new("RGB", full.size, "white")
    pictures = [[full] + [cells.get((method, budget), blank) for budget in budgets] for method in methods]
    headings = ["full cache"] + [f"{budget:g}" for budget in budgets]
    return Sheet(pictures, left=methods, top=headings).draw()


def mosaic(pictures: torch.Tensor) -> Image.Image:
    """Pictures `[count, 3, height, width]` in uint8, two beside each other."""
    pairs = [torch.cat(tuple(pair), dim=2) for pair in pictures[: len(pictures) // 2 * 2].split(2)]
    return Image.fromarray(torch.cat(pairs, dim=1).permute(1, 2, 0).numpy())


def ordered(names) -> list[str]:
    """Names without repetition, in the order in which they come."""
    return list(dict.fromkeys(names))
