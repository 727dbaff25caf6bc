"""The judge of the text-to-image demo model: a small network that names what a picture shows.

It learns concept, class, style and background from training pictures alone, as they are and after trips through the image
tokenizer with some bits wrong, because that is what drawn pictures look like. `agreement.py` trains and asks it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from captions import clean, training_backgrounds
from common import Clock, learning_rate_factor
from data import BACKGROUNDS, STYLES, TRAIN, EmojiData, augmented_view, colours
from torch import nn
from tqdm import tqdm
from train_bsq_tokenizer import PLAIN_SHARE
from train_infinity import encode_views
from train_tokenizer import PATCH_NUMS, SIDE

from hack_pipelines import MultiScaleBSQModel
from hack_pipelines.schedule import Schedule


WIDTHS = (32, 64, 128, 256)
EMBEDDING, SHARPNESS = 192, 16.0
SMOOTHING = 0.1
LEARNING_RATE, WARMUP_STEPS, DECAY_START = 3e-3, 100, 0.1
FLIP_RATE = 0.2
DRAWN_VIEWS, RAW_VIEWS = 6, 4
SCALES, SHIFT, GAIN, NOISE = (0.85, 1.1), 0.1, 0.1, 0.04
CALIBRATION_VIEWS = 6000


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
    They are judged against `usual` and `spread`, their mean and deviation over training pictures of each style: a concept
    that was trained in one style only is far from everything in the other one.
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
        self.register_buffer("usual", torch.zeros(len(STYLES), len(concepts)))
        self.register_buffer("spread", torch.ones(len(STYLES), len(concepts)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        logits = {name: head(features) for name, head in self.heads.items()}
        cosines = F.normalize(self.embed(features), dim=1) @ F.normalize(self.captions, dim=1).T
        return {**logits, "concept": SHARPNESS * cosines}

    @torch.no_grad()
    def answers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions of all answers, the most likely one first."""
        logits = self.all_logits(images)
        style = logits["style"].argmax(1)
        logits["concept"] = (logits["concept"] - self.usual[style]) / self.spread[style]
        return {name: entries.argsort(1, descending=True) for name, entries in logits.items()}

    @torch.no_grad()
    def all_logits(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = [self(part) for part in images.split(64)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor, styles: torch.Tensor) -> None:
        """Measures `usual` and `spread` on training pictures of known styles."""
        concepts = self.all_logits(images)["concept"]
        for style in range(len(STYLES)):
            self.usual[style] = concepts[styles == style].mean(0)
            self.spread[style] = concepts[styles == style].std(0)


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
    labels = [clean(data.captions[row]) for row in rows.tolist()] * RAW_VIEWS
    other, pictures = training_backgrounds(labels, PLAIN_SHARE), rows.repeat(RAW_VIEWS)
    drawn = drawn_views(vae, features[:DRAWN_VIEWS].flatten(0, 1))
    return (
        torch.cat([drawn, raw_views(data, pictures, other)]),
        rows.repeat(DRAWN_VIEWS + RAW_VIEWS),
        torch.cat([backgrounds[:DRAWN_VIEWS].flatten(), other]),
    )


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
    judge.eval()
    shown = torch.randperm(len(views))[:CALIBRATION_VIEWS]
    judge.calibrate(views[shown].float() / 127.5 - 1, styles[pictures[shown]])
    torch.save({"weights": judge.state_dict(), "concepts": judge.concepts, "steps": step}, runs / "judge.pt")
    return judge


def load_judge(data: EmojiData, runs: Path, minutes: float) -> Judge:
    """The judge of `judge.pt`, which is trained where it is missing."""
    if not (runs / "judge.pt").exists():
        return train_judge(data, runs, minutes)
    state = torch.load(runs / "judge.pt", weights_only=True)
    judge = Judge(len(data.class_names), state["concepts"])
    judge.load_state_dict(state["weights"])
    return judge.eval()
