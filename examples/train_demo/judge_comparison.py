"""Lets the judge look at the pictures of a comparison of compression methods, `hack-pipelines compare`.

For every run: how many pictures show what was asked for, and how far they are as a set from real held-out pictures and from
those of the full cache, as the Fréchet distance in the judge's features.

Run `python judge_comparison.py --comparison FOLDER`; it writes `judged.csv` and `judged.md` there.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from agreement import MEASURES, measure_name
from captions import STYLE_NAMES, clean
from data import BACKGROUNDS, HELD_OUT_CONCEPT, HELD_OUT_PICTURE, STYLES, EmojiData, load_data, plain_view
from judge import Judge, load_judge
from train_tokenizer import SIDE

from hack_pipelines.comparison import ComparisonFolder
from hack_pipelines.comparison.folder import FULL_RUN, Run
from hack_pipelines.comparison.study import SAMPLING, mean_and_error
from hack_pipelines.comparison.table import csv_text, ordered
from hack_pipelines.evaluation import frechet_distance
from hack_pipelines.result_folder import replace_file


UNKNOWN = -1
REAL, FULL = "held-out pictures", "full cache's pictures"


def wanted(data: EmojiData, judge: Judge, inputs: Sequence[int | str]) -> dict[str, torch.Tensor]:
    """The right answers for pictures of classes or prompts, `UNKNOWN` where there is none."""
    classes = {clean(label): class_id for label, class_id in zip(data.captions, data.class_ids.tolist())}
    right = [answers(entry, classes, judge) for entry in inputs]
    return {name: torch.tensor([entry.get(name, UNKNOWN) for entry in right]) for name, _ in MEASURES}


def answers(entry: int | str, classes: dict[str, int], judge: Judge) -> dict[str, int]:
    """What is known of one input. A prompt has the form of `captions.caption`; a background that it does not name is white."""
    if isinstance(entry, int):
        return {"class": entry}
    first, *parts = clean_parts(entry)
    concept = next((name for name in (first, re.sub(r"^an? ", "", first)) if name in classes), None)
    if concept is None:
        return {}
    known = {"class": classes[concept], "background": list(BACKGROUNDS).index("white")}
    if concept in judge.places:
        known["concept"] = judge.places[concept]
    for part in parts:
        if part in STYLE_NAMES.values():
            known["style"] = STYLES.index(next(style for style in STYLES if STYLE_NAMES[style] == part))
        elif part.removesuffix(" background") in BACKGROUNDS:
            known["background"] = list(BACKGROUNDS).index(part.removesuffix(" background"))
    return known


def clean_parts(prompt: str) -> list[str]:
    """The parts of a prompt between its commas."""
    return [clean(part) for part in prompt.split(",")]


def in_range(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in uint8 as the judge takes them."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def features(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """What the judge's answers are read off, `[N, channels]`."""
    return torch.cat([judge.trunk(part).mean((2, 3)) for part in images.split(64)])


def found(judge: Judge, images: torch.Tensor, right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whether each picture shows what it should, of each measure; pictures without a right answer are left out."""
    given, result = judge.answers(images), {}
    for name, depth in MEASURES:
        known = right[name] != UNKNOWN
        if known.any():
            hit = (given[name][:, :depth] == right[name][:, None]).any(1)
            result[measure_name(name, depth)] = hit[known].double()
    return result


def judged(
    judge: Judge, images: torch.Tensor, right: dict[str, torch.Tensor], full: torch.Tensor, real: torch.Tensor
) -> dict[str, float | None]:
    """Agreement, what it is less than the full cache's, both with standard errors, and the distances of the set."""
    row, reference = {}, found(judge, full, right)
    for name, hits in found(judge, images, right).items():
        row |= mean_and_error(name, hits)
        row |= mean_and_error(f"{name} less full cache", hits - reference[name])
    own = features(judge, images)
    row[f"Fréchet distance ({REAL})"] = frechet_distance(own, features(judge, real))
    row[f"Fréchet distance ({FULL})"] = frechet_distance(own, features(judge, full))
    return row


def table(rows: Sequence[dict], settings: dict, real: int) -> str:
    """A Markdown table with a row a run; a share has its standard error beside it."""
    names = [name for name in rows[0] if not name.endswith("_se") and name != "bytes_allocated_peak"]
    pictures = settings["images"]
    lines = [
        f"Model {settings['model']}. Shares of {pictures} pictures a run that the judge finds to show what was asked for, ± "
        "standard error; `less full cache` is paired by picture. Fréchet distances are between Gaussians in the judge's "
        f"features, of {pictures} pictures and the reference set that the head names: {real} held-out pictures of the data "
        "set on white, or the pictures that the full cache draws from the same noise.",
        "",
        f"| {' | '.join(names)} |",
        f"|{' --- |' * len(names)}",
    ]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row, name) for name in names)} |")
    return "\n".join(lines) + "\n"


def cell(row: dict, name: str) -> str:
    value, error = row[name], row.get(f"{name}_se")
    if value is None or isinstance(value, str):
        return value or ""
    if error is None:
        return f"{value:.4g}"
    return f"{value:.3f} ± {error:.3f}"


def report(arguments: argparse.Namespace) -> str:
    """Judges all runs, writes the tables and returns the one in Markdown."""
    if not (arguments.comparison / "settings.json").is_file():
        raise SystemExit(f"{arguments.comparison} holds no comparison: make one with `hack-pipelines compare`.")
    folder = ComparisonFolder(arguments.comparison)
    settings = json.loads((folder.path / "settings.json").read_text(encoding="utf-8"))
    data = load_data(arguments.data)
    judge = load_judge(data, arguments.runs, arguments.judge_minutes)
    inputs = [settings["inputs"][number % len(settings["inputs"])] for number in range(settings["images"])]
    right = wanted(data, judge, inputs)
    held_out = torch.cat([data.indices(split) for split in (HELD_OUT_PICTURE, HELD_OUT_CONCEPT)])
    real, full, rows = plain_view(data.images[held_out], SIDE), folder.tensors(FULL_RUN), []
    for entry in ordered(folder.rows()):
        tensors = folder.tensors(Run(entry["method"], entry["budget"]))
        row = {name: entry[name] for name in ("method", "budget", "keep", "bytes_allocated_peak")}
        for mode in settings["sampling"]:
            prefix = SAMPLING[mode][1]
            images, others = (in_range(source[f"{prefix}pictures"]) for source in (tensors, full))
            for name, value in judged(judge, images, right, others, real).items():
                row[f"{prefix.replace('_', ' ')}{name}"] = value
        rows.append(row)
    text = table(rows, settings, len(real))
    replace_file(folder.path / "judged.csv", lambda new: new.write_text(csv_text(rows), encoding="utf-8"))
    replace_file(folder.path / "judged.md", lambda new: new.write_text(text, encoding="utf-8"))
    return text


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comparison", type=Path, required=True, help="folder of `hack-pipelines compare`")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the trainings and of the judge")
    parser.add_argument("--judge-minutes", type=float, default=20, help="training time of the judge, if it is missing")
    print(report(parser.parse_args()))


if __name__ == "__main__":
    main()
