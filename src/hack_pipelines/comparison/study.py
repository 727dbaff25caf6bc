"""Methods at equal budgets against the full cache: what is measured, and in which order."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from .. import __version__
from ..cache import CacheReport
from ..cache.budget import TokenBytes, budget_tokens
from ..cache.storage import get_storage
from ..evaluation import first_differing_step, psnr, ssim, token_agreement
from ..evaluation.fidelity import check_tokens, nll_through
from ..evaluation.similarity import WINDOW
from ..methods import Full, Method, get_method
from .folder import FULL_RUN, ComparisonFolder, Run
from .metrics import PictureMetric
from .report import write_reports


Inputs = Sequence[int | str]

# How a mode of sampling is asked for, and what its columns begin with.
SAMPLING: dict[str, tuple[dict[str, Any], str]] = {"sampled": ({}, ""), "greedy": ({"top_k": 1}, "greedy_")}
# The noise of rounding to 8 bits, 1 / (12 * 255^2): nearer pictures look the same, and their infinite values would drown
# every mean.
PSNR_CEILING = 10 * math.log10(12 * 255**2)


@dataclass(frozen=True)
class Settings:
    """
    What all runs of a comparison share.

    Args:
        inputs (`Sequence[int | str]`):
            Class or prompt of the pictures, taken in turn.
        images (`int`, *optional*, defaults to 64):
            Pictures that are drawn, with seeds that count up.
        batch_size (`int`, *optional*, defaults to 32):
            Images that run together.
        seed (`int`, *optional*, defaults to 0):
            Of the first picture.
        sampling (`Sequence[str]`, *optional*, defaults to `("sampled",)`):
            `"sampled"` draws as the model does by default, `"greedy"` takes the most likely token; none draws no pictures.
        attention_budget (`float` or `int`, *optional*):
            What a step may attend to, for methods that separate it from what they store; the others are left alone.
        kv_dtype (`str`, *optional*):
            Storage type of keys and values of the compressed runs.
    """

    inputs: Inputs
    images: int = 64
    batch_size: int = 32
    seed: int = 0
    sampling: Sequence[str] = ("sampled",)
    attention_budget: float | int | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """
    Pictures that the model was not trained on, as tokens.

    Args:
        tokens (`torch.Tensor`):
            Ids `[images, N]` or bits `[images, N, bits]`, all scales one after the other.
        inputs (`Sequence[int | str]`):
            Class or prompt of every picture.
        seen (`torch.Tensor`, *optional*):
            Boolean `[images]`: whether the model has seen other pictures of the same thing.
    """

    tokens: torch.Tensor
    inputs: Inputs
    seen: torch.Tensor | None = None


@dataclass
class Pictures:
    """Pictures of one mode of sampling, `[images, 3, height, width]` in uint8, and the tokens of every scale."""

    images: torch.Tensor
    tokens: list[torch.Tensor]


@dataclass
class Costs:
    """Cache reports and seconds per image, an entry a batch."""

    reports: list[CacheReport] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Study:
    """
    A comparison of methods on one model.

    Equal budgets are equal bytes: a fraction stands for the bytes of so many of the model's tokens as attention reads
    them, and a method that holds more beside keys and values, or fewer bits, holds fewer or more tokens in them.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
        folder ([`ComparisonFolder`]):
            Where the results go. Runs that it holds are not made again.
        settings ([`Settings`]):
            What all runs share.
        held_out ([`HeldOut`], *optional*):
            Pictures whose likelihood is measured.
        metrics (`Sequence[PictureMetric]`, *optional*):
            More measures of the pictures.
        identity (`dict`, *optional*):
            What besides belongs to the folder's settings, such as the name of the model.

    Raises:
        `ValueError`: if nothing would be measured, the held-out pictures are another model's, or the folder holds runs
            with other settings.
    """

    pipe: Any
    folder: ComparisonFolder
    settings: Settings
    held_out: HeldOut | None = None
    metrics: Sequence[PictureMetric] = ()
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.held_out is None and not self.settings.sampling:
            raise ValueError("Nothing would be measured: give held-out pictures, or have pictures drawn.")
        if self.held_out is not None:
            check_tokens(self.pipe, self.held_out.tokens, self.held_out.inputs)
        if any(metric.needs_prompts for metric in self.metrics) and not isinstance(self.settings.inputs[0], str):
            raise ValueError(
                "`--metrics clip` compares pictures with prompts, but this model draws classes: leave it out."
            )
        self.geometry = self.pipe.geometry()
        self.folder.check_settings({**self.identity, **asdict(self.settings)})
        self._reference: dict[str, torch.Tensor] | None = None

    @property
    def reference(self) -> dict[str, torch.Tensor]:
        """The figures, pictures and tokens of the full cache, which is measured first."""
        if self._reference is None:
            self._reference = self.folder.tensors(FULL_RUN)
        return self._reference

    @property
    def rows_per_image(self) -> int:
        """Rows of an image in the runs whose costs are reported: those of the pictures, if any are drawn."""
        return 2 if self.settings.sampling and self.pipe.prepare_settings().guided else 1

    def run(self, methods: Iterable[str], budgets: Iterable[float], tell: Callable[[str], None] | None = None):
        """
        Make all runs that the folder does not hold yet, the full cache first, and then tables, plots and pictures.

        Args:
            methods (`Iterable[str]`):
                As [`get_method`] takes them.
            budgets (`Iterable[float]`):
                Fractions of the full cache in (0, 1].
            tell (`Callable[[str], None]`, *optional*):
                Gets a line before each run that is made, such as `"3 of 11: random at 0.3"`.
        """
        methods, budgets = list(dict.fromkeys(methods)), list(dict.fromkeys(budgets))
        wanted = [FULL_RUN, *(Run(method, budget) for budget in budgets for method in methods)]
        for number, run in enumerate(wanted, 1):
            if self.folder.finished(run):
                continue
            if tell is not None:
                tell(f"{number} of {len(wanted)}: {run.title}")
            try:
                self.check(run)
            except ValueError as error:
                self.folder.skip(run, " ".join(str(error).split()))
                print(f"{run.title} is skipped: {error}", file=sys.stderr)
            else:
                self.folder.save(run, *self.measure(run))
            write_reports(self.folder)
        write_reports(self.folder)

    def check(self, run: Run):
        """
        Make the plan of a run.

        Raises:
            `ValueError`: if the method cannot reach the budget or lacks something.
        """
        guided = self.rows_per_image == 2
        self.pipe.prepare_cache(**self.cache_options(run, self.rows_per_image), guided=guided)

    def measure(self, run: Run) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A row of the table, and the figures of every image, the pictures and the tokens."""
        figures, kept, costs = {}, {}, Costs()
        if self.held_out is not None:
            figures["nll"] = self.likelihood(run, self.held_out, None if self.settings.sampling else costs)
        for mode in self.settings.sampling:
            _, prefix = SAMPLING[mode]
            pictures = self.draw(run, mode, costs if mode == self.settings.sampling[0] else None)
            kept[f"{prefix}pictures"], kept[f"{prefix}tokens"] = pictures.images, torch.cat(pictures.tokens, dim=1)
        if run != FULL_RUN:
            if self.held_out is not None:
                figures["nll_rise"] = figures["nll"] - self.reference["nll"]
            for mode in self.settings.sampling:
                figures |= self.fidelity(kept, SAMPLING[mode][1])
        for mode in self.settings.sampling:
            figures |= self.measured(run, kept, SAMPLING[mode][1])
        return {**self.described(run), **self.costs(costs), **self.summary(figures)}, {**figures, **kept}

    def likelihood(self, run: Run, held_out: HeldOut, costs: Costs | None) -> torch.Tensor:
        """Nats per token of every held-out picture. There is no guidance, and so one row an image."""
        size, parts = self.settings.batch_size, []
        for start in bar(range(0, len(held_out.tokens), size), "likelihood"):
            part, begin = slice(start, start + size), time.perf_counter()
            cache = self.pipe.prepare_cache(**self.cache_options(run, 1), guided=False)
            parts.append(nll_through(cache, self.pipe, held_out.tokens[part], held_out.inputs[part]))
            if costs is not None:
                costs.reports.append(cache.report())
                costs.seconds.append((time.perf_counter() - begin) / len(parts[-1]))
        return torch.cat(parts)

    def draw(self, run: Run, mode: str, costs: Costs | None) -> Pictures:
        """
        All pictures.

        Every image has a generator of its own. A token is drawn as `argmax p / Exp(1)`, so equal seeds share the Gumbel
        noise of every token.
        """
        count, size, inputs = self.settings.images, self.settings.batch_size, self.settings.inputs
        options = {**self.cache_options(run, self.rows_per_image), **SAMPLING[mode][0]}
        images, tokens = [], []
        for start in bar(range(0, count, size), f"{mode} pictures"):
            numbers, begin = range(start, min(start + size, count)), time.perf_counter()
            output = self.pipe(
                [inputs[number % len(inputs)] for number in numbers],
                generator=[torch.Generator().manual_seed(self.settings.seed + number) for number in numbers],
                output_type="pt",
                **options,
            )
            # Copying to the CPU waits for the device.
            images.append((output.images * 255).round().byte().cpu())
            if costs is not None:
                costs.seconds.append((time.perf_counter() - begin) / len(numbers))
                costs.reports.append(output.cache_report)
            tokens.append([ids.cpu() for ids in output.tokens])
        return Pictures(torch.cat(images), [torch.cat(scale) for scale in zip(*tokens)])

    def cache_options(self, run: Run, rows_per_image: int) -> dict[str, Any]:
        """What a run says of the cache, in a call with so many rows an image."""
        if run.budget is None:
            return {}
        method = get_method(run.method)
        return {
            "method": method,
            "kv_budget": f"{self.asked_bytes(run.budget, rows_per_image)}B",
            "attention_budget": self.settings.attention_budget if method.protocol == "decoupled" else None,
            "kv_dtype": self.settings.kv_dtype,
        }

    def asked_bytes(self, budget: float, rows_per_image: int) -> int:
        """Bytes of an image that a budget stands for, the same for all methods."""
        token = TokenBytes(rows_per_image, self.pipe.transformer.dtype.itemsize)
        return budget_tokens(budget, self.geometry, token) * token.per_token(self.geometry)

    def tokens(self, run: Run, method: Method) -> int:
        """Tokens per head that a run may hold."""
        if run.budget is None:
            return self.geometry.schedule.total
        storage, rows = get_storage(self.settings.kv_dtype), self.rows_per_image
        itemsize = storage.itemsize(self.pipe.transformer.dtype)
        token = TokenBytes(rows, itemsize, storage.metadata_bytes + method.metadata_bytes)
        return budget_tokens(f"{self.asked_bytes(run.budget, rows)}B", self.geometry, token)

    def fidelity(self, kept: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """How near each picture of one mode is to that of the full cache."""
        lengths = self.geometry.schedule.lengths
        images, others = (source[f"{prefix}pictures"] / 255 for source in (kept, self.reference))
        tokens, other = (source[f"{prefix}tokens"].split(lengths, dim=1) for source in (kept, self.reference))
        figures = {
            "psnr": psnr(images, others).clamp_max(PSNR_CEILING),
            "agreement": token_agreement(tokens, other),
            "first_differing_step": first_differing_step(tokens, other),
        }
        if min(images.shape[-2:]) >= WINDOW:
            figures["ssim"] = ssim(images, others)
        return {f"{prefix}{name}": values for name, values in figures.items()}

    def measured(self, run: Run, kept: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """What the other measures say of the pictures of one mode."""
        pictures, inputs = kept[f"{prefix}pictures"], self.settings.inputs
        shown = [str(inputs[number % len(inputs)]) for number in range(len(pictures))]
        full = pictures if run == FULL_RUN else self.reference[f"{prefix}pictures"]
        return {
            f"{prefix}{metric.name}": metric.measure(pictures, full, shown)
            for metric in self.metrics
            if run != FULL_RUN or not metric.against_full
        }

    def described(self, run: Run) -> dict[str, Any]:
        """Which run a row is of."""
        schedule, settings = self.geometry.schedule, self.settings
        method = Full() if run == FULL_RUN else get_method(run.method)
        tokens = self.tokens(run, method)
        drawn = settings.images if settings.sampling else 0
        return {
            "method": run.method,
            "protocol": "" if run == FULL_RUN else method.protocol,
            "budget": run.budget,
            "model": self.identity.get("model"),
            "schedule": " ".join(f"{height}x{width}" for height, width in schedule.sizes),
            "B": tokens,
            "b_N": tokens / schedule.total,
            "b_c": tokens / schedule.cacheable,
            "bytes_asked": None if run.budget is None else self.asked_bytes(run.budget, self.rows_per_image),
            "images": drawn,
            "seeds": f"{settings.seed} to {settings.seed + drawn - 1}" if drawn else "",
            "sampling": " ".join(settings.sampling),
            "nll_images": 0 if self.held_out is None else len(self.held_out.tokens),
            "batch_size": settings.batch_size,
            "rows_per_image": self.rows_per_image,
            "dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
            "kv_dtype": settings.kv_dtype if run != FULL_RUN else None,
            "device": device_name(self.pipe.device),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "hack_pipelines": __version__,
        }

    def costs(self, costs: Costs) -> dict[str, Any]:
        """What a run held and took per image, the largest of all batches. The first one warms up unless it is the only one."""
        timed = costs.seconds[1:] or costs.seconds
        peaks = [report.cuda_peak_delta for report in costs.reports if report.cuda_peak_delta is not None]
        first = costs.reports[0]
        allocated = max(report.bytes_allocated_peak for report in costs.reports)
        attended = max(max(report.attended_by_step) for report in costs.reports)
        token = TokenBytes(self.rows_per_image, self.pipe.transformer.dtype.itemsize)
        everything = self.geometry.schedule.total * token.per_token(self.geometry)
        return {
            "eta_a": attended / self.geometry.schedule.total,
            "peak_tokens": max(report.peak_tokens for report in costs.reports),
            "checkpoint_peak_tokens": max(report.checkpoint_peak_tokens for report in costs.reports),
            "bytes_allocated_peak": allocated,
            "metadata_bytes": max(report.metadata_bytes for report in costs.reports),
            "bytes_all_tokens": everything,
            "keep": allocated / everything,
            "bytes_full_original": first.bytes_full,
            "bytes_full_lossless": first.bytes_full_cacheable,
            "cuda_peak_delta": max(peaks, default=None),
            "attention_flops": round(fmean(report.attention_flops for report in costs.reports)),
            "seconds_per_image": median(timed),
            "timed_batches": len(timed),
        }

    def summary(self, figures: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Means over images and their standard errors; differences to the full cache are paired."""
        result: dict[str, Any] = {}
        for name, values in figures.items():
            # What is measured of a whole set has no error.
            result |= mean_and_error(name, values) if values.ndim else {name: values.item()}
            if name.endswith("agreement"):
                result[name.replace("agreement", "identical")] = (values == 1).double().mean().item()
        seen = None if self.held_out is None else self.held_out.seen
        if seen is not None and "nll_rise" in figures:
            result |= mean_and_error("nll_rise_seen", figures["nll_rise"][seen])
            result |= mean_and_error("nll_rise_unseen", figures["nll_rise"][~seen])
        return result


def mean_and_error(name: str, values: torch.Tensor) -> dict[str, float | None]:
    """Mean and standard error, `None` where there are too few values."""
    mean = values.double().mean().item() if len(values) else None
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: mean, f"{name}_se": error}


def bar(items: Iterable, title: str) -> tqdm:
    """A progress bar that goes when it is full, on terminals only."""
    return tqdm(items, desc=title, leave=False, disable=None)


def device_name(device: torch.device) -> str:
    """What a device is called; that of a card says which one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
