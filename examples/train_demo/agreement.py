"""Measures how well pictures of the text-to-image demo model agree with their prompts.

A small network, the judge, learns to name what the data's pictures show: concept, class, style and background. It sees
training pictures alone, as they are and after trips through the image tokenizer with some bits wrong, because that is what
drawn pictures look like. Held-out pictures tell how far it can be trusted; then it looks at what the model draws.

Run `python agreement.py --model FOLDER --output agreement`; the judge is trained first where `judge.pt` is missing.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from captions import caption, clean, held_out_backgrounds, training_backgrounds
from common import Clock, learning_rate_factor
from data import (
    BACKGROUNDS,
    HELD_OUT_CONCEPT,
    HELD_OUT_PICTURE,
    STYLES,
    TRAIN,
    EmojiData,
    augmented_view,
    colours,
    load_data,
    plain_view,
)
from PIL import Image
from torch import nn
from tqdm import tqdm
from train_bsq_tokenizer import PLAIN_SHARE
from train_infinity import encode_views
from train_tokenizer import PATCH_NUMS, SIDE

from hack_pipelines import HackVARPipeline, HackVARTextPipeline, MultiScaleBSQModel
from hack_pipelines.cli.sheet import Sheet
from hack_pipelines.schedule import Schedule


WIDTHS = (32, 64, 128, 256)
EMBEDDING, SHARPNESS = 192, 16.0
SMOOTHING = 0.1
LEARNING_RATE, WARMUP_STEPS, DECAY_START = 3e-3, 100, 0.1
FLIP_RATE = 0.2
RAW_SHARE = 0.3
SCALES, SHIFT, GAIN, NOISE = (0.85, 1.1), 0.1, 0.1, 0.04
MEASURES = (
    ("class", 1), ("class", 5), ("concept", 1), ("concept", 5), ("concept", 10), ("style", 1), ("background", 1)
)  # fmt: skip
SPLITS = (
    (TRAIN, 10, "training pictures"),
    (HELD_OUT_PICTURE, 1, "held-out pictures"),
    (HELD_OUT_CONCEPT, 1, "held-out concepts"),
)
BATCH_SIZE = 20
EVERYDAY_DEPTHS = (1, 5, 10)
SHEET_COLUMNS = 8
NOTE = (
    "Percent of pictures that show what was asked for ± standard error, and in brackets the percent that show what another "
    "prompt of the same group asked for, which is chance."
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


def convolution(channels: int, width: int, stride: int) -> nn.Sequential:
    layers = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A convolution beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.convolution = convolution(width, width, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.convolution(maps)


class Judge(nn.Module):
    """Names what pictures `[B, 3, 64, 64]` in [-1, 1] show.

    Logits of concepts are cosines between the picture's embedding and one vector a concept: retrieval of the nearest caption.
    """

    def __init__(self, classes: int, concepts: list[str]):
        super().__init__()
        self.concepts = concepts
        self.places = {concept: place for place, concept in enumerate(concepts)}
        stages = [(convolution(a, b, 2), Residual(b)) for a, b in zip((3, *WIDTHS), WIDTHS)]
        self.trunk = nn.Sequential(*[layer for stage in stages for layer in stage])
        answers = {"class": classes, "style": len(STYLES), "background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTHS[-1], count) for name, count in answers.items()})
        self.embed = nn.Linear(WIDTHS[-1], EMBEDDING)
        self.captions = nn.Parameter(torch.randn(len(concepts), EMBEDDING))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        logits = {name: head(features) for name, head in self.heads.items()}
        cosines = F.normalize(self.embed(features), dim=1) @ F.normalize(self.captions, dim=1).T
        return {**logits, "concept": SHARPNESS * cosines}

    @torch.no_grad()
    def answers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions of all answers, the most likely one first."""
        parts = [self(part) for part in images.split(64)]
        return {name: torch.cat([part[name] for part in parts]).argsort(1, descending=True) for name in parts[0]}


@torch.no_grad()
def drawn_views(vae: MultiScaleBSQModel, features: torch.Tensor) -> torch.Tensor:
    """Features `[N, channels, height, width]` as the decoder draws them, uint8, each with its own share of wrong bits."""
    schedule, drawn = Schedule.from_sides(PATCH_NUMS), []
    for part in tqdm(features.split(64), desc="drawn views"):
        part, rate = part.float(), FLIP_RATE * torch.rand(part.shape[0], 1, 1)
        latents = torch.zeros_like(part)
        for step in range(len(schedule)):
            bits = vae.pack(vae.residual_maps(part - latents, step, schedule) > 0)
            latents, _ = vae.accumulate(latents, bits ^ (torch.rand(bits.shape) < rate), step, schedule)
        with torch.autocast("cpu", torch.bfloat16):
            drawn.append(to_bytes(vae.decode(latents).float()))
    return torch.cat(drawn)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def raw_views(data: EmojiData, rows: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """The training's views of pictures as they are, uint8."""
    views = []
    for part, background in zip(tqdm(rows.split(32), desc="raw views"), backgrounds.split(32)):
        images, mirrored = data.images[part], data.mirrored[part]
        views.append(to_bytes(augmented_view(images, mirrored, SIDE, torch.default_generator, colours(background))))
    return torch.cat(views)


def judge_views(data: EmojiData, runs: Path, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views `[V, 3, S, S]` in uint8 that the judge learns from, the pictures that they show, and their backgrounds."""
    vae = MultiScaleBSQModel.from_pretrained(runs / "bsq").eval()
    features, backgrounds = encode_views(vae, data, rows, runs / "bsq_views.pt")
    pictures = rows.repeat(len(features))
    labels = [clean(data.captions[row]) for row in pictures[: int(RAW_SHARE * len(pictures))].tolist()]
    other = training_backgrounds(labels, PLAIN_SHARE)
    shown = torch.cat([drawn_views(vae, features.flatten(0, 1)), raw_views(data, pictures[: len(labels)], other)])
    return shown, torch.cat([pictures, pictures[: len(labels)]]), torch.cat([backgrounds.flatten(), other])


def distort(views: torch.Tensor) -> torch.Tensor:
    """Other places, sizes, tints, focus and grain, different ones for every picture; float in [-1, 1]."""
    count = len(views)
    images = views.float() / 127.5 - 1
    zoom = torch.empty(count).uniform_(*SCALES).reciprocal()
    grid = torch.zeros(count, 2, 3)
    grid[:, 0, 0], grid[:, 1, 1] = zoom, zoom * torch.empty(count).uniform_(0.95, 1.05)
    grid[:, :, 2] = torch.empty(count, 2).uniform_(-SHIFT, SHIFT)
    places = F.affine_grid(grid, list(images.shape), align_corners=False)
    images = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, torch.rand(count, 1, 1, 1).square())
    images = images * torch.empty(count, 3, 1, 1).uniform_(1 - GAIN, 1 + GAIN)
    images = images + torch.empty(count, 1, 1, 1).uniform_(-GAIN, GAIN)
    return (images + torch.rand(count, 1, 1, 1) * NOISE * torch.randn(images.shape)).clamp(-1, 1)


def train_judge(data: EmojiData, runs: Path, minutes: float, batch_size: int = 128) -> Judge:
    """Trains the judge on training pictures alone, and keeps it in `judge.pt`."""
    torch.manual_seed(0)
    rows = data.indices(TRAIN)
    names = [clean(label) for label in data.captions]
    judge = Judge(len(data.class_names), sorted({names[row] for row in rows.tolist()}))
    concepts = torch.tensor([judge.places.get(name, -1) for name in names])
    styles = torch.tensor([STYLES.index(style) for style in data.styles])
    views, pictures, backgrounds = judge_views(data, runs, rows)
    judge.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    forward, clock, step, progress = torch.compile(judge), Clock(minutes), 0, tqdm(mininterval=10, desc="judge")
    while clock.progress < 1:
        picked = torch.randint(len(views), (batch_size,))
        shown = pictures[picked]
        right = {
            "concept": concepts[shown], "class": data.class_ids[shown], "style": styles[shown],
            "background": backgrounds[picked],
        }  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(distort(views[picked]))
        losses = {n: F.cross_entropy(logits[n].float(), right[n], label_smoothing=SMOOTHING) for n in right}
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, clock.progress, WARMUP_STEPS, DECAY_START)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
        step += 1
        progress.update()
        if step % 200 == 0:
            shares = {n: float((logits[n].argmax(1) == right[n]).float().mean()) for n in right}
            tqdm.write(f"step {step}: " + ", ".join(f"{n} {float(losses[n]):.3f} {shares[n]:.2f}" for n in right))
    torch.save({"weights": judge.state_dict(), "concepts": judge.concepts, "steps": step}, runs / "judge.pt")
    return judge.eval()


def load_judge(data: EmojiData, runs: Path, minutes: float) -> Judge:
    """The judge of `judge.pt`, which is trained where it is missing."""
    if not (runs / "judge.pt").exists():
        return train_judge(data, runs, minutes)
    state = torch.load(runs / "judge.pt", weights_only=True)
    judge = Judge(len(data.class_names), state["concepts"])
    judge.load_state_dict(state["weights"])
    return judge.eval()


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
            drawn = torch.cat([vae(part, schedule) for part in views.split(64)])
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


def draw(pipe: HackVARTextPipeline, texts: Sequence[str], seed: int, **options) -> torch.Tensor:
    """One picture a prompt, in [-1, 1]; the noise of each depends on its place in the list alone."""
    images = []
    for start in range(0, len(texts), BATCH_SIZE):
        part = list(texts[start : start + BATCH_SIZE])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images.append(pipe(part, generator=generators, output_type="pt", **options).images * 2 - 1)
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


def measure_everyday(
    pipe: HackVARTextPipeline, judge: Judge, path: Path, seeds: int, seed: int = 0, **options
) -> dict[str, dict]:
    """Share of pictures of everyday prompts with a right label among the judge's first; writes a sheet of the first seeds."""
    result, rows = {}, []
    for text, labels in EVERYDAY.items():
        images = draw(pipe, [text] * seeds, seed, **options)
        accepted = torch.tensor([judge.places[label] for label in sorted(labels)])
        right = torch.isin(judge.answers(images)["concept"], accepted).float()
        result[text] = {"accepted": sorted(labels), "pictures": seeds}
        for depth in EVERYDAY_DEPTHS:
            share = float(right[:, :depth].amax(1).mean())
            result[text][f"top-{depth}"] = share
        pixels = to_bytes(images[:SHEET_COLUMNS].clamp(-1, 1)).permute(0, 2, 3, 1).numpy()
        rows.append([Image.fromarray(picture) for picture in pixels])
    Sheet(rows, left=list(EVERYDAY)).draw().save(path)
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
    depths = [f"top-{depth}" for depth in EVERYDAY_DEPTHS]
    lines = [f"## {title}", "", "| prompt | right labels | " + " | ".join(depths) + " |"]
    lines.append("| --- " * (len(depths) + 2) + "|")
    for text, entry in results.items():
        cells = [f"{100 * entry[depth]:.0f}" for depth in depths]
        lines.append(f"| {text} | {', '.join(entry['accepted'])} | " + " | ".join(cells) + " |")
    cells = []
    for depth in depths:
        shares = [entry[depth] for entry in results.values()]
        often = sum(share > 0.5 for share in shares)
        error = stdev(shares) / len(shares) ** 0.5
        cells.append(f"{100 * fmean(shares):.0f} ± {100 * error:.0f}, more often than not {often} of {len(shares)}")
    lines.append("| mean | | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def report(arguments: argparse.Namespace) -> str:
    """Measures everything, writes sheets, tables and numbers to the output folder, and returns the tables."""
    data, output = load_data(arguments.data), arguments.output
    output.mkdir(parents=True, exist_ok=True)
    judge = load_judge(data, arguments.runs, arguments.judge_minutes)
    ceilings = validate(data, judge, arguments.runs)
    numbers, parts = {"judge": ceilings}, [table("The judge on pictures of the data set", ceilings)]
    if arguments.model is not None:
        pipe = HackVARPipeline.from_pretrained(arguments.model)
        pipe.set_progress_bar_config(disable=True)
        sampling = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_p")}
        runs = {"full cache": sampling}
        if arguments.kv_budget is not None:
            compressed = {"kv_budget": arguments.kv_budget, "method": arguments.method}
            runs[f"{arguments.method}, {arguments.kv_budget:g} of the cache"] = {**sampling, **compressed}
        groups, found = prompts(data, arguments.runs, arguments.prompts, arguments.seed), {}
        for number, (name, options) in enumerate(runs.items()):
            found[name] = measure(pipe, data, judge, groups, arguments.seed, **options)
            agreement = {group: summary(entry) for group, entry in found[name].items()}
            sheet = output / ("everyday-compressed.png" if number else "everyday.png")
            everyday = measure_everyday(pipe, judge, sheet, arguments.everyday_seeds, arguments.seed, **options)
            numbers[name] = {"groups": agreement, "everyday": everyday}
            parts += [table(f"Agreement, {name}", agreement), everyday_table(f"Everyday prompts, {name}", everyday)]
            if number:
                change = {group: paired(found["full cache"][group], entry) for group, entry in found[name].items()}
                numbers[name]["change"] = change
                parts.append(table(f"{name} less full cache, same prompts and noise", change, signed=True))
    text = "\n".join([f"{NOTE}\n", *parts])
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
    parser.add_argument("--judge-minutes", type=float, default=10, help="training time of the judge")
    parser.add_argument("--kv-budget", type=float, help="measure a run with this much of the cache, too")
    parser.add_argument("--method", default="hack", help="method of compression")
    parser.add_argument("--guidance-scale", type=float, help="instead of the model's own")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    parser.add_argument("--top-p", type=float, help="instead of the model's own")
    parser.add_argument("--seed", type=int, default=0)
    print(report(parser.parse_args()))


if __name__ == "__main__":
    main()
