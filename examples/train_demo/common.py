"""What both trainings need: learning rates that follow the clock, checkpoints, a log, and sheets of pictures."""

import csv
import math
import os
import time
from pathlib import Path

import torch
from PIL import Image


class Clock:
    """Training time in seconds, stops included in no run: a resumed run goes on from where the last one stopped."""

    def __init__(self, minutes: float, elapsed: float = 0.0):
        self.budget = 60 * minutes
        self.start = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, from 0 to 1."""
        return min(self.elapsed / self.budget, 1.0)


def learning_rate_factor(step: int, progress: float, warmup_steps: int, decay_start: float) -> float:
    """Linear warm-up over steps, then flat, then a cosine to zero over the rest of the time."""
    warmup = min((step + 1) / warmup_steps, 1.0)
    decay = max(progress - decay_start, 0.0) / (1 - decay_start)
    return warmup * 0.5 * (1 + math.cos(math.pi * decay))


def save_checkpoint(path: Path, **state) -> None:
    """Writes the state and the random state; replaces the old file only once the new one is complete."""
    partial = path.with_suffix(".partial")
    torch.save({**state, "random_state": torch.get_rng_state()}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict | None:
    """The state that `save_checkpoint` wrote, with the random state restored, or nothing if there is none."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state.pop("random_state"))
    return state


class CsvLog:
    """One row an evaluation; a resumed run appends."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **row) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def save_sheet(images: torch.Tensor, columns: int, path: Path) -> None:
    """Writes images `[N, 3, S, S]` in [-1, 1] as one PNG, row by row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    side, rows = images.shape[-1] + 2, -(-len(images) // columns)
    sheet = torch.full((rows * side, columns * side, 3), 128, dtype=torch.uint8)
    for i, picture in enumerate(pixels.permute(0, 2, 3, 1)):
        top, left = i // columns * side, i % columns * side
        sheet[top : top + side - 2, left : left + side - 2] = picture
    Image.fromarray(sheet.numpy()).save(path)
