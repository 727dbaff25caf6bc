"""Random eviction, the floor under every method."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Ranking, StepView
from .baseline import Baseline


@dataclass
class Random(Baseline):
    """
    Keep tokens at random, the same ones for every image. A method that does not beat it at its own budget is broken.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        protocol (`"post"` or `"pre"`, *optional*, defaults to `"post"`):
            Whether a step attends to all that is present and then stores a part, or attends only to what it will store.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "a floor, published by nobody"

    seed: int = 0
    protocol: str = "post"

    def rank(self, view: StepView) -> Ranking:
        generator = torch.Generator().manual_seed((self.seed * 1_000 + view.layer) * 1_000 + view.step)
        scores = torch.rand(len(view.heads), view.num_present, generator=generator)
        return Ranking(scores.to(view.query.device).expand(len(view.query), -1, -1))
