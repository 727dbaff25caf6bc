"""Measures how well pictures of the text-to-image demo model agree with their prompts.

The judge (`judge.py`) names what a picture shows. Held-out pictures of the data set, which it was not trained on, tell how far
it can be trusted; then it looks at what the model draws for trained and for held-out combinations and for everyday prompts.

Run `python agreement.py --model FOLDER --output agreement`; the judge is trained first where `judge.pt` is missing.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from captions import caption, clean, held_out_backgrounds
from data import (
    BACKGROUNDS,
    HELD_OUT_CONCEPT,
    HELD_OUT_PICTURE,
    STYLES,
    TRAIN,
    EmojiData,
    colours,
    load_data,
    plain_view,
)
from judge import Judge, load_judge, to_bytes
from PIL import Image
from train_tokenizer import PATCH_NUMS, SIDE

from hack_pipelines import HackVARPipeline, HackVARTextPipeline, MultiScaleBSQModel, __version__
from hack_pipelines.cli.sheet import Sheet
from hack_pipelines.schedule import Schedule


MEASURES = (
    ("class", 1), ("class", 5), ("concept", 1), ("concept", 5), ("concept", 10), ("style", 1), ("background", 1)
)  # fmt: skip
SPLITS = (
    (TRAIN, 10, "training pictures"),
    (HELD_OUT_PICTURE, 1, "held-out pictures"),
    (HELD_OUT_CONCEPT, 1, "held-out concepts"),
)
BATCH_SIZE = 20
EVERYDAY_DEPTHS = (1, 10)
SHEET_COLUMNS = 8
FULL = "full cache"
NOTE = (
    "Percent of pictures that show what was asked for ± standard error, and in brackets the percent that show what another "
    "prompt of the same group asked for, which is chance."
)
EVERYDAY_NOTE = (
    "Percent of pictures that the judge finds nearest to their prompt among the prompts of this table, or with a right label "
    "among its first of all concepts; in brackets that of the other prompts' pictures, and that of training pictures with these "
    "labels after a trip through the tokenizer."
)
SMILES = {
    "smiling face", "smiling face with smiling eyes", "slightly smiling face", "grinning face", "smiling face with halo",
    "grinning face with big eyes", "beaming face with smiling eyes", "smiling face with hearts",
}  # fmt: skip
# What people would type, and the labels of the data set that are right answers.
EVERYDAY = {
    "a red apple": {"red apple"},
    "a green apple": {"green apple"},
    "a yellow banana": {"banana"},
    "a strawberry": {"strawberry"},
    "a lemon": {"lemon"},
    "a smiling face": SMILES,
    "an angry face": {"angry face", "enraged face", "angry face with horns"},
    "a red heart": {"red heart", "heart suit"},
    "a blue heart": {"blue heart", "light blue heart"},
    "a cat": {"cat", "cat face", "black cat"},
    "a dog face": {"dog face"},
    "a pig": {"pig", "pig face"},
    "a fish": {"fish", "tropical fish", "blowfish"},
    "a red car": {"automobile", "oncoming automobile", "racing car", "sport utility vehicle"},
    "a blue car": {"automobile", "oncoming automobile", "racing car", "sport utility vehicle"},
    "a house": {"house", "house with garden", "houses", "hut", "derelict house"},
    "a flower": {"blossom", "cherry blossom", "hibiscus", "white flower", "sunflower", "tulip", "rose", "lotus"},
    "a tree": {"deciduous tree", "evergreen tree", "palm tree", "christmas tree"},
    "a star": {"star", "glowing star"},
    "a birthday cake": {"birthday cake", "shortcake"},
    "a robot": {"robot"},
    "a woman": {"woman", "woman blond hair", "woman red hair", "woman curly hair", "woman white hair", "person"},
}


def targets(data: EmojiData, judge: Judge, rows: Sequence[int], backgrounds: Sequence[str]) -> dict[str, torch.Tensor]:
    """The right answers for pictures on backgrounds; without concepts where the judge does not know all of them."""
    labels = [clean(data.captions[row]) for row in rows]
    right = {
        "class": data.class_ids[list(rows)],
        "style": torch.tensor([STYLES.index(data.styles[row]) for row in rows]),
        "background": torch.tensor([list(BACKGROUNDS).index(name) for name in backgrounds]),
    }
    if all(label in judge.places for label in labels):
        right["concept"] = torch.tensor([judge.places[label] for label in labels])
    return right


def hits(judge: Judge, images: torch.Tensor, right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whether picture i shows what picture j should, `[N, N]` of each measure: agreement is the diagonal, the rest chance."""
    answers, result = judge.answers(images), {}
    for name, depth in MEASURES:
        if name in right:
            found = answers[name][:, :depth, None] == right[name]
            result[measure_name(name, depth)] = found.any(1).float()
    return result


def measure_name(name: str, depth: int) -> str:
    return f"{name} top-{depth}" if (name, 5) in MEASURES else name


def summary(found: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Share of pictures that agree with their prompts, its standard error, and the share that agrees with others'."""
    result = {}
    for name, matrix in found.items():
        count, share = len(matrix), float(matrix.diagonal().mean())
        chance = float(matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))
        error = (share * (1 - share) / count) ** 0.5
        result[name] = {"share": share, "error": error, "chance": chance, "pictures": count}
    return result


def paired(full: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """What a run of the same prompts and noise loses or gains, and the standard error of that."""
    result = {}
    for name, matrix in full.items():
        change = other[name].diagonal() - matrix.diagonal()
        result[name] = {"share": float(change.mean()), "error": float(change.std()) / len(change) ** 0.5}
    return result


@torch.no_grad()
def validate(data: EmojiData, judge: Judge, runs: Path) -> dict[str, dict]:
    """What the judge says of the data's pictures, as they are and after a trip through the tokenizer: the ceilings."""
    vae, schedule = MultiScaleBSQModel.from_pretrained(runs / "bsq").eval(), Schedule.from_sides(PATCH_NUMS)
    names, result = list(BACKGROUNDS), {}
    for split, step, title in SPLITS:
        rows = data.indices(split)[::step].tolist()
        for place in ("white", "held-out backgrounds"):
            pairs = [(row, "white") for row in rows]
            if place != "white":
                pairs = [(row, name) for row in rows for name in unseen_backgrounds(data, row)]
            shown, backgrounds = zip(*pairs)
            right = targets(data, judge, shown, backgrounds)
            colour = colours(torch.tensor([names.index(name) for name in backgrounds]))
            views = plain_view(data.images[list(shown)], SIDE, colour)
            result[f"{title}, {place}"] = summary(hits(judge, views, right))
            drawn = torch.cat([vae(part, schedule).sample for part in views.split(64)])
            result[f"{title}, {place}, through the tokenizer"] = summary(hits(judge, drawn, right))
    return result


def unseen_backgrounds(data: EmojiData, row: int) -> list[str]:
    return sorted(held_out_backgrounds(clean(data.captions[row])))


def prompts(data: EmojiData, runs: Path, count: int, seed: int) -> dict[str, list[tuple[int, str]]]:
    """Pictures of the data set, as rows, and backgrounds that prompts of each group ask for."""
    choice, names = random.Random(seed), list(BACKGROUNDS)
    views = torch.load(runs / "bsq_views.pt", weights_only=True, mmap=True)["backgrounds"].T.tolist()
    trained = dict(zip(data.indices(TRAIN).tolist(), views))
    other_style = {clean(data.captions[row]): row for row in trained}
    seen, concepts = list(trained), data.indices(HELD_OUT_CONCEPT).tolist()
    pictures = data.indices(HELD_OUT_PICTURE).tolist()

    def picked(rows: list[int]) -> list[int]:
        return (choice.sample(rows, len(rows)) * (count // len(rows) + 1))[:count]

    def known(row: int) -> str:
        return names[choice.choice(sorted(set(trained[row])))]

    return {
        "seen": [(row, known(row)) for row in picked(seen)],
        "held-out pictures": [(row, known(other_style[clean(data.captions[row])])) for row in picked(pictures)],
        "held-out backgrounds": [(row, choice.choice(unseen_backgrounds(data, row))) for row in picked(seen)],
        "held-out concepts": [(row, choice.choice(names)) for row in picked(concepts)],
    }


def draw(
    pipe: HackVARTextPipeline, texts: Sequence[str], seed: int, period: int | None = None, **options
) -> torch.Tensor:
    """One picture a prompt, in [-1, 1]; the noise depends on its place in the list alone, and comes again every `period`."""
    seeds = [seed + number % (period or len(texts)) for number in range(len(texts))]
    images = []
    for start in range(0, len(texts), BATCH_SIZE):
        place = slice(start, start + BATCH_SIZE)
        generators = [torch.Generator().manual_seed(number) for number in seeds[place]]
        images.append(pipe(list(texts[place]), generator=generators, output_type="pt", **options).images * 2 - 1)
    return torch.cat(images)


def measure(
    pipe: HackVARTextPipeline, data: EmojiData, judge: Judge, groups: dict[str, list], seed: int = 0, **options
) -> dict[str, dict[str, torch.Tensor]]:
    """Draws the prompts of all groups and asks the judge; `options` go to the pipeline."""
    found = {}
    for title, pairs in groups.items():
        rows, backgrounds = zip(*pairs)
        texts = [caption(clean(data.captions[row]), data.styles[row], name) for row, name in pairs]
        found[title] = hits(judge, draw(pipe, texts, seed, **options), targets(data, judge, rows, backgrounds))
    return found


def everyday_hits(judge: Judge, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whether picture i shows what everyday prompt j asks for, `[N, prompts]` of each measure.

    `nearest` asks which of these prompts the judge finds nearest, `top-k` whether a right label is among its first k of all.
    """
    ranks = judge.answers(images)["concept"].argsort(1)
    labels = [torch.tensor([judge.places[label] for label in sorted(accepted)]) for accepted in EVERYDAY.values()]
    best = torch.stack([ranks[:, accepted].amin(1) for accepted in labels], dim=1)
    tops = {f"top-{depth}": (best < depth).float() for depth in EVERYDAY_DEPTHS}
    return {"nearest": (best == best.amin(1, keepdim=True)).float(), **tops}


def measure_everyday(
    pipe: HackVARTextPipeline, data: EmojiData, judge: Judge, path: Path, seeds: int, seed: int = 0, **options
) -> dict[str, dict]:
    """How many pictures of everyday prompts show what they should; writes a sheet of the first seeds.

    Beside it stands how many pictures of the other prompts would pass, which is chance, and how many training pictures with the
    right labels do after a trip through the tokenizer, which is the most that the judge would see.
    """
    count = len(EVERYDAY)
    images = draw(pipe, [text for text in EVERYDAY for _ in range(seeds)], seed, seeds, **options)
    shares = {name: found.view(count, seeds, count).mean(1) for name, found in everyday_hits(judge, images).items()}
    result = {}
    for number, (text, labels) in enumerate(EVERYDAY.items()):
        rows = [row for row in data.indices(TRAIN).tolist() if clean(data.captions[row]) in labels]
        with torch.no_grad():
            known = everyday_hits(judge, pipe.vae(plain_view(data.images[rows], SIDE), pipe.schedule).sample)
        result[text] = {"accepted": sorted(labels), "pictures": seeds}
        for name, share in shares.items():
            result[text][name] = {
                "share": float(share[number, number]),
                "chance": float(share[:, number].sum() - share[number, number]) / (count - 1),
                "ceiling": float(known[name][:, number].mean()),
            }
    pixels = to_bytes(images.clamp(-1, 1)).permute(0, 2, 3, 1).numpy().reshape(count, seeds, SIDE, SIDE, 3)
    pictures = [[Image.fromarray(picture) for picture in row] for row in pixels[:, :SHEET_COLUMNS]]
    Sheet(pictures, left=list(EVERYDAY)).draw().save(path)
    return result


def percent(entry: dict[str, float] | None, signed: bool = False) -> str:
    """A table's cell: share, standard error and chance, in percent."""
    if entry is None:
        return ""
    text = f"{100 * entry['share']:{'+' if signed else ''}.0f} ± {100 * entry['error']:.0f}"
    return f"{text} ({100 * entry['chance']:.1f})" if "chance" in entry else text


def table(title: str, groups: dict[str, dict], signed: bool = False) -> str:
    """A Markdown table with a row a group and a column a measure."""
    columns = [measure_name(*pair) for pair in MEASURES]
    lines = [f"## {title}", "", "| | pictures | " + " | ".join(columns) + " |", "| --- |" * (len(columns) + 2)]
    lines[-1] = "| --- " * (len(columns) + 2) + "|"
    for name, entries in groups.items():
        count = next(iter(entries.values())).get("pictures", "")
        cells = [percent(entries.get(column), signed) for column in columns]
        lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def everyday_table(title: str, results: dict[str, dict]) -> str:
    """A Markdown table with a row a prompt, and the mean with its standard error over prompts."""
    names = [name for name in next(iter(results.values())) if name not in ("accepted", "pictures")]
    lines = [f"## {title}", "", EVERYDAY_NOTE, "", "| prompt | right labels | " + " | ".join(names) + " |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for text, entry in results.items():
        numbers = [[round(100 * entry[name][key]) for key in ("share", "chance", "ceiling")] for name in names]
        cells = [f"{share} ({chance}, {ceiling})" for share, chance, ceiling in numbers]
        lines.append(f"| {text} | {', '.join(entry['accepted'])} | " + " | ".join(cells) + " |")
    cells = []
    for name in names:
        shares = [entry[name]["share"] for entry in results.values()]
        often, error = sum(share > 0.5 for share in shares), stdev(shares) / len(shares) ** 0.5
        cells.append(f"{100 * fmean(shares):.0f} ± {100 * error:.0f}, more often than not {often} of {len(shares)}")
    lines.append("| mean | | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def judge_model(arguments: argparse.Namespace, data: EmojiData, judge: Judge) -> tuple[dict[str, dict], list[str]]:
    """Numbers and tables of a model with the full cache, and with a compressed one on demand."""
    pipe = HackVARPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_p")}
    runs, numbers = {FULL: given}, {}
    if arguments.kv_budget is not None:
        compressed = {"kv_budget": arguments.kv_budget, "method": arguments.method}
        runs[f"{arguments.method}, {arguments.kv_budget:g} of the cache"] = {**given, **compressed}
    used = {**pipe.config["sampling"], **{name: value for name, value in given.items() if value is not None}}
    settings = (
        f"Sampling {used}, seeds from {arguments.seed}, {pipe.dtype}, torch {torch.__version__}, {__version__}.\n"
    )
    groups, found, parts = prompts(data, arguments.runs, arguments.prompts, arguments.seed), {}, [settings]
    for name, options in runs.items():
        found[name] = measure(pipe, data, judge, groups, arguments.seed, **options)
        agreement = {group: summary(entry) for group, entry in found[name].items()}
        sheet = arguments.output / ("everyday.png" if name == FULL else "everyday-compressed.png")
        everyday = measure_everyday(pipe, data, judge, sheet, arguments.everyday_seeds, arguments.seed, **options)
        numbers[name] = {"groups": agreement, "everyday": everyday}
        parts += [table(f"Agreement, {name}", agreement), everyday_table(f"Everyday prompts, {name}", everyday)]
        if name != FULL:
            change = {group: paired(found[FULL][group], entry) for group, entry in found[name].items()}
            numbers[name]["change"] = change
            parts.append(table(f"{name} less {FULL}, same prompts and noise", change, signed=True))
    return numbers, parts


def report(arguments: argparse.Namespace) -> str:
    """Measures everything, writes sheets, tables and numbers to the output folder, and returns the tables."""
    data, output = load_data(arguments.data), arguments.output
    output.mkdir(parents=True, exist_ok=True)
    judge = load_judge(data, arguments.runs, arguments.judge_minutes)
    ceilings = validate(data, judge, arguments.runs)
    numbers, parts = {"judge": ceilings}, [NOTE, "", table("The judge on pictures of the data set", ceilings)]
    if arguments.model is not None:
        of_model, tables = judge_model(arguments, data, judge)
        numbers.update(of_model)
        parts += tables
    text = "\n".join(parts)
    (output / "agreement.md").write_text(text)
    (output / "agreement.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return text


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the trainings and of the judge")
    parser.add_argument("--model", type=Path, help="folder of the pipeline; without one only the judge is validated")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables, numbers and sheets")
    parser.add_argument("--prompts", type=int, default=100, help="prompts a group")
    parser.add_argument("--everyday-seeds", type=int, default=16, help="pictures of each everyday prompt")
    parser.add_argument("--judge-minutes", type=float, default=20, help="training time of the judge")
    parser.add_argument("--kv-budget", type=float, help="measure a run with this much of the cache, too")
    parser.add_argument("--method", default="hack", help="method of compression")
    parser.add_argument("--guidance-scale", type=float, help="instead of the model's own")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    parser.add_argument("--top-p", type=float, help="instead of the model's own")
    parser.add_argument("--seed", type=int, default=0)
    print(report(parser.parse_args()))


if __name__ == "__main__":
    main()
