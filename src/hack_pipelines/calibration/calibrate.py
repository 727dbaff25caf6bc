"""From a pipeline to a head profile: draw known images without compression, and record what the heads attend to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers.utils import logging

from .. import __version__
from ..cache.recording import RecordingCache
from ..profiles.head_profile import HeadProfile
from ..profiles.statistics import rank_correlation
from ..schedule import Schedule


if TYPE_CHECKING:
    from ..pipelines.pipeline_hack_var import HackVARPipeline


@torch.no_grad()
def calibrate(
    pipe: "HackVARPipeline",
    num_samples: int = 50,
    seed: int = 0,
    batch_size: int = 1,
    inputs: Sequence[int | str] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    progress: bool = True,
    schedule: Schedule | None = None,
) -> HeadProfile:
    """
    Record a head profile from uncompressed runs on known inputs.

    The pipeline is left as it was: the profile is not attached, and no global random state is used.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
        num_samples (`int`, *optional*, defaults to 50):
            Images to draw. One is enough to tell head types.
        seed (`int`, *optional*, defaults to 0):
            Of the first image; the next one's is larger by 1.
        batch_size (`int`, *optional*, defaults to 1):
            Images drawn together. Up to rounding the profile does not depend on it.
        inputs (`list[int | str]`, *optional*):
            Classes or prompts to take in turn. Built-in ones by default: classes spread evenly over all there are, or
            prompts of many kinds.
        base_model (`str`, *optional*):
            Name of the model that goes into the profile; by default the repository or folder that it was loaded from.
        base_revision (`str`, *optional*):
            Commit of that repository.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        schedule (`Schedule`, *optional*):
            Scales to draw, where the model draws others than its own.

    Returns:
        [`HeadProfile`]: on the CPU.

    Raises:
        `ValueError`: if a number is not positive, or the model's attention is not finite.
        `RuntimeError`: if the pipeline is interrupted meanwhile.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 but is {value}.")
    if inputs is not None and not len(inputs):
        raise ValueError(
            "`inputs` is empty: give at least one class or prompt, or leave it out for the built-in ones."
        )
    settings = pipe.prepare_settings() if schedule is None else pipe.prepare_settings(schedule=schedule)
    geometry = pipe.geometry(schedule)
    cache = RecordingCache(geometry.schedule, geometry.num_layers, settings.guided)
    moments: dict[str, Moments] = {}
    inputs = pipe.calibration_inputs(num_samples) if inputs is None else inputs
    taken: list[int | str] = [inputs[sample % len(inputs)] for sample in range(num_samples)]
    with undisturbed(pipe), logging.tqdm(total=num_samples, desc="Calibrating", disable=not progress) as progress_bar:
        for start in range(0, num_samples, batch_size):
            samples = range(start, min(start + batch_size, num_samples))
            condition = pipe.encode_inputs([taken[sample] for sample in samples], settings.guided)
            generators = [torch.Generator().manual_seed(seed + sample) for sample in samples]
            cache.reset()
            pipe.draw_scales(condition, cache, settings, generators)
            if pipe.interrupt:
                raise RuntimeError("The calibration was interrupted, so there is no profile.")
            for name, arrays in cache.statistics.items():
                moments.setdefault(name, Moments(arrays[0])).add(arrays)
            progress_bar.update(len(samples))
    return HeadProfile(
        mean={name: entry.mean for name, entry in moments.items()},
        variance={name: entry.variance for name, entry in moments.items()},
        base_model=base_model or model_name(pipe),
        base_revision=base_revision,
        family=pipe.family,
        num_layers=geometry.num_layers,
        num_heads=geometry.num_heads,
        head_dim=geometry.head_dim,
        schedule=[list(size) for size in geometry.schedule.sizes],
        dtype=str(cache.dtype).removeprefix("torch."),
        sampling=asdict(settings),
        inputs=taken,
        seeds=list(range(seed, seed + num_samples)),
        software={
            "hack_pipelines": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
        },
    )


def split_half_correlation(first: HeadProfile, second: HeadProfile) -> float:
    """
    Spearman's rank correlation of what tells head types apart in two profiles of one model: how stable the types are.

    Args:
        first, second ([`HeadProfile`]):
            Of different samples.

    Returns:
        `float`: 1 where both rank all heads alike, near 0 where the types are chance; `nan` where one of them is constant.

    Raises:
        `ValueError`: if the profiles are of models with different numbers of layers or heads.
    """
    if first.scores.shape != second.scores.shape:
        raise ValueError(
            f"The profiles have {tuple(first.scores.shape)} and {tuple(second.scores.shape)} layers and heads: only those "
            "of one model can be compared."
        )
    return rank_correlation(first.scores, second.scores)


class Moments:
    """Mean and variance of arrays that come one after the other (Welford's recurrence), in float64."""

    def __init__(self, like: torch.Tensor):
        self.count = 0
        self.mean = torch.zeros_like(like)
        self.squares = torch.zeros_like(like)

    def add(self, samples: torch.Tensor):
        """Take in samples `[samples, ...]`."""
        for sample in samples:
            self.count += 1
            offset = sample - self.mean
            self.mean = self.mean + offset / self.count
            self.squares = self.squares + offset * (sample - self.mean)

    @property
    def variance(self) -> torch.Tensor:
        """Population variance."""
        return self.squares / self.count


@contextmanager
def undisturbed(pipe: "HackVARPipeline") -> Iterator[None]:
    """Silence a pipeline's own progress bar and its interrupt flag, and put both back."""
    config = getattr(pipe, "_progress_bar_config", {})
    interrupted = pipe.interrupt
    pipe.set_progress_bar_config(disable=True)
    pipe._interrupt = False
    try:
        yield
    finally:
        pipe._progress_bar_config = config
        pipe._interrupt = interrupted
        pipe.maybe_free_model_hooks()


def model_name(pipe: "HackVARPipeline") -> str | None:
    """Repository that a pipeline was loaded from, or the last part of the folder, which says nothing about the machine."""
    name = str(pipe.config.get("_name_or_path") or "")
    return (Path(name).name if Path(name).is_absolute() or Path(name).exists() else name) or None
