"""`hack-pipelines demo`: the same pictures with less and less cache, side by side."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .families import ClassFamily, Family, family_of
from .options import add_model_arguments, load_pipeline, parse_seed, seeded
from .output import check_picture


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..cache.report import CacheReport


BUDGETS = (None, 0.5, 0.3, 0.1)
# Different kinds of pictures that the models inside the package know.
DEMO_PROMPTS = [
    "a red apple",
    "a smiling cat",
    "a red heart",
    "a grinning face",
    "a strawberry, blue background",
    "a penguin, yellow background",
    "a birthday cake",
    "a tree, 3d style",
]
DEMO_CLASSES = [
    "face smiling",
    "cat face",
    "animal mammal",
    "food fruit",
    "person role",
    "place building",
    "transport ground",
    "time",
]


@dataclass
class Row:
    """Pictures of all prompts or classes with one budget, what their cache held, and how long they took together."""

    name: str
    images: "list[Image]"
    report: "CacheReport"
    seconds: float


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="draw a sheet with the model inside the package",
        description="Draw eight prompts or classes with the full cache and with three smaller ones, from the same seeds.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="the sheet (default: demo.png)")
    parser.add_argument("--seed", type=parse_seed, default=0, help="of the first prompt, the next have the next ones")
    add_model_arguments(parser)
    return parser


def run(args: argparse.Namespace):
    """Draw the sheet and print what the caches held."""
    check_picture(args.output)
    family = family_of(load_pipeline(args))
    entries = choose_entries(family)
    # The first call of a process pays for what libraries set up once.
    draw_row(family, entries[:1], BUDGETS[-1], args.seed)
    rows = [draw_row(family, entries, budget, args.seed) for budget in BUDGETS]
    draw_table([family.name(entry) for entry in entries], rows).save(args.output)
    print(f"{args.output}: {len(entries)} {family.plural}, {len(rows)} budgets, seeds from {args.seed}\n")
    for line in report_lines(rows):
        print(line)


def choose_entries(family: Family) -> list[int | str]:
    """Eight prompts or classes; of a class-conditional model with fewer classes all of them."""
    if not isinstance(family, ClassFamily):
        return family.parse(DEMO_PROMPTS)
    pipe = family.pipe
    if pipe.labels.keys() >= set(DEMO_CLASSES):
        return family.parse(DEMO_CLASSES)
    # Of another model those that are spread evenly over the ids, since neighbours are alike.
    known = sorted(map(int, pipe.config["id2label"])) or range(pipe.transformer.config["num_classes"])
    count = min(len(DEMO_CLASSES), len(known))
    return [known[(2 * index + 1) * len(known) // (2 * count)] for index in range(count)]


def draw_row(family: Family, entries: list[int | str], budget: float | None, seed: int) -> Row:
    """Draw all prompts or classes with one budget."""
    start = time.perf_counter()
    output = family.pipe(entries, generator=seeded(range(seed, seed + len(entries))), kv_budget=budget)
    seconds = time.perf_counter() - start
    name = "full cache" if budget is None else f"kv_budget={budget}"
    return Row(name, output.images, output.cache_report, seconds)


def draw_table(names: list[str], rows: list[Row]) -> "Image":
    """A row a budget, a column a prompt or class: few rows and many columns fit a page."""
    from .sheet import Sheet

    left = [f"{row.name}\n{row.report.bytes_allocated_peak / 2**10:.0f} KiB" for row in rows]
    return Sheet([row.images for row in rows], left=left, top=names).draw()


def report_lines(rows: list[Row]) -> list[str]:
    """A table of what the caches held for a picture, and of the time for all of them."""
    lines = ["per picture     tokens a head  KiB stored  than original  than lossless  seconds for all"]
    for row in rows:
        report = row.report
        stored = report.bytes_allocated_peak
        original, lossless = report.bytes_full / stored, report.bytes_full_cacheable / stored
        lines.append(
            f"{row.name:<14}  {report.peak_tokens:>13.1f}  {stored / 2**10:>10.1f}  {original:>8.2f}x less"
            f"  {lossless:>8.2f}x less  {row.seconds:>15.2f}"
        )
    return lines
