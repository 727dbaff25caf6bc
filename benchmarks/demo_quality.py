"""
Quality against memory on the demo models: compression methods at equal budgets, against the full cache.

Teacher-forced likelihood of held-out pictures is the sharp measure; pictures drawn with shared noise are the other one.
Needs the `plots` extra. A run that was interrupted goes on where it stopped:

    python benchmarks/demo_quality.py --model demo --output results/demo_quality
    python benchmarks/demo_quality.py --model demo-class --output results/demo_class_quality
"""

import argparse
import csv
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_quality_report import write_reports
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import hack_pipelines
from hack_pipelines import (
    HACK,
    HackVARClassPipeline,
    HackVARPipeline,
    MultiScaleVQModel,
    Random,
    ScaleWindow,
    VARTransformer2DModel,
)
from hack_pipelines.evaluation import first_differing_step, psnr, teacher_forced_nll, token_agreement
from hack_pipelines.methods import Method


DATA = Path(__file__).parent / "data"
# By the pipeline's family: tokens of held-out pictures; prompts lie beside them as JSON.
TOKENS = {"var": DATA / "demo_class_heldout.safetensors", "infinity": DATA / "demo_text_heldout.safetensors"}
BUDGETS = [1.0, 0.63, 0.5, 0.3, 0.2, 0.1]
FULL = "full"
RANDOM_HEADS = "hack-random-heads"
METHODS: dict[str, Method] = {
    "hack": HACK(),
    "hack-swapped": HACK(rules="swapped"),
    "hack-contextual-rule": HACK(rules="contextual"),
    "hack-symmetric": HACK(contextual_ratio=1.0),
    RANDOM_HEADS: HACK(),
    "hack-post": HACK(protocol="post"),
    "random": Random(protocol="post"),
    "random-pre": Random(protocol="pre"),
    "scale_window": ScaleWindow(protocol="post"),
    "scale_window-pre": ScaleWindow(protocol="pre"),
}
SHOWN_PICTURES = 4
# The noise of rounding to 8 bits, 1 / (12 * 255^2): nearer pictures look the same, and their infinite values would drown
# every mean.
PSNR_CEILING = 10 * math.log10(12 * 255**2)


@dataclass(frozen=True)
class RandomTypes:
    """Stands in for a head profile: as many contextual heads, but any of them."""

    num_layers: int
    num_heads: int
    seed: int = 0

    def contextual_heads(self, alpha: float) -> torch.Tensor:
        """Boolean `[layers, heads]`."""
        total = self.num_layers * self.num_heads
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        return (order < int(alpha * total + 0.5)).view(self.num_layers, self.num_heads)


@dataclass
class Study:
    """What all runs of a study share."""

    pipe: HackVARPipeline
    tokens: torch.Tensor
    inputs: list[int | str]
    seen: torch.Tensor
    arguments: argparse.Namespace

    def __post_init__(self):
        self.profile = self.pipe.head_profile
        geometry = self.pipe.geometry()
        self.random_types = RandomTypes(geometry.num_layers, geometry.num_heads)

    def nll(self, budget: float | None, method: str) -> torch.Tensor:
        """Nats per token of every held-out picture."""
        size, parts = self.arguments.batch_size, []
        for start in tqdm(range(0, len(self.tokens), size), desc="likelihood", leave=False):
            tokens, inputs = self.tokens[start : start + size], self.inputs[start : start + size]
            parts.append(teacher_forced_nll(self.pipe, tokens, inputs, budget, self.method(method), size))
        return torch.cat(parts)

    def sample(self, budget: float | None, method: str) -> tuple[torch.Tensor, list[torch.Tensor], list[float], Any]:
        """
        Images, their tokens, seconds per image of every batch, and the report of the first batch.

        Every image has a generator of its own. A token is drawn as `argmax p / Exp(1)`, so equal seeds share the Gumbel
        noise of every token.
        """
        count, size = self.arguments.images, self.arguments.batch_size
        images, tokens, seconds, reports = [], [], [], []
        for start in tqdm(range(0, count, size), desc="pictures", leave=False):
            numbers = range(start, min(start + size, count))
            begin = time.perf_counter()
            out = self.pipe(
                [self.drawn(number) for number in numbers],
                generator=[torch.Generator().manual_seed(self.arguments.seed + number) for number in numbers],
                kv_budget=budget,
                method=self.method(method),
                output_type="pt",
            )
            # Copying to the CPU waits for the device.
            images.append(out.images.cpu())
            seconds.append((time.perf_counter() - begin) / len(numbers))
            tokens.append([ids.cpu() for ids in out.tokens])
            reports.append(out.cache_report)
        return torch.cat(images), [torch.cat(scale) for scale in zip(*tokens)], seconds, reports[0]

    def drawn(self, number: int) -> int | str:
        """What a picture shows: the classes in turn, or the held-out prompts."""
        if isinstance(self.inputs[0], str):
            return self.inputs[number % len(self.inputs)]
        return number % self.pipe.transformer.config["num_classes"]

    def method(self, name: str) -> Method:
        return METHODS.get(name, METHODS["hack"])

    def run(self, budget: float | None, method: str, folder: Path) -> dict:
        """One row of the table; the figures of every image go to `folder`."""
        self.pipe.head_profile = self.random_types if method == RANDOM_HEADS else self.profile
        nll = self.nll(budget, method)
        images, tokens, seconds, report = self.sample(budget, method)
        path = folder / f"{FULL}.safetensors"
        reference = {"images": images, "tokens": torch.cat(tokens, dim=1), "nll": nll}
        if method == FULL:
            save_file(reference, path)
        else:
            reference = load_file(path)
        other = reference["tokens"].split(self.pipe.schedule.lengths, dim=1)
        figures = {
            "nll": nll,
            "nll_rise": nll - reference["nll"],
            "psnr": psnr(images, reference["images"]).clamp_max(PSNR_CEILING),
            "agreement": token_agreement(tokens, other),
            "first_differing_step": first_differing_step(tokens, other),
        }
        pictures = (images[:SHOWN_PICTURES] * 255).round().byte()
        save_file({**figures, "pictures": pictures}, folder / f"{run_name(method, budget)}.safetensors")
        return {**self.identity(budget, method), **self.summary(figures), **costs(report, seconds)}

    def identity(self, budget: float | None, method: str) -> dict:
        """Which run a row describes."""
        schedule = self.pipe.schedule
        tokens = schedule.total
        if budget is not None:
            tokens = self.pipe.prepare_cache(budget, method=self.method(method)).plan.budget
        return {
            "method": method,
            "protocol": "" if method == FULL else self.method(method).protocol,
            "budget": budget if budget is not None else "",
            "model": self.arguments.model,
            "schedule": " ".join(f"{height}x{width}" for height, width in schedule.sizes),
            "B": tokens,
            "b_N": round(tokens / schedule.total, 4),
            "b_c": round(tokens / schedule.cacheable, 4),
            "images": self.arguments.images,
            "seeds": f"{self.arguments.seed} to {self.arguments.seed + self.arguments.images - 1}",
            "nll_images": len(self.tokens),
            "batch_size": self.arguments.batch_size,
            "dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
            "device": self.arguments.device,
            "torch": torch.__version__,
            "hack_pipelines": hack_pipelines.__version__,
        }

    def summary(self, figures: dict[str, torch.Tensor]) -> dict:
        """Means over images, with their standard errors; differences to the full cache are paired."""
        rise, agreement = figures["nll_rise"], figures["agreement"]
        return {
            "nll": round(figures["nll"].mean().item(), 5),
            **mean_and_error("nll_rise", rise),
            **mean_and_error("nll_rise_seen", rise[self.seen]),
            **mean_and_error("nll_rise_unseen", rise[~self.seen]),
            **mean_and_error("psnr", figures["psnr"]),
            **mean_and_error("agreement", agreement),
            "identical": round((agreement == 1).double().mean().item(), 4),
            "first_differing_step": round(figures["first_differing_step"].double().mean().item(), 3),
        }


def mean_and_error(name: str, values: torch.Tensor) -> dict:
    """Mean and standard error, empty where there are too few values."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    mean = values.mean().item() if len(values) else math.nan
    return {name: round(mean, 5), f"{name}_se": round(error, 5)}


def costs(report: Any, seconds: list[float]) -> dict:
    """What a run held and took, per image with guidance. The first batch warms up unless it is the only one."""
    timed = sorted(seconds[1:] or seconds)
    return {
        "peak_tokens": round(report.peak_tokens, 3),
        "checkpoint_peak_tokens": round(report.checkpoint_peak_tokens, 3),
        "bytes_allocated_peak": report.bytes_allocated_peak,
        "bytes_full": report.bytes_full,
        "attention_flops": report.attention_flops,
        "cuda_peak_delta": report.cuda_peak_delta if report.cuda_peak_delta is not None else "",
        "seconds_per_image": round(timed[len(timed) // 2], 5),
        "timed_batches": len(timed),
    }


def run_name(method: str, budget: float | str | None) -> str:
    """Name of the file with the figures of a run."""
    return f"{method}@{budget}" if method != FULL else f"{FULL}@all"


def tiny_study(arguments: argparse.Namespace) -> Study:
    """Random weights and random tokens, to see that everything runs."""
    torch.manual_seed(0)
    transformer = VARTransformer2DModel(
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        num_classes=10,
        vocab_size=32,
        latent_channels=8,
        patch_nums=(1, 2, 3, 4),
    )
    vae = MultiScaleVQModel(vocab_size=32, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1)
    pipe = HackVARClassPipeline(transformer=transformer.eval(), vae=vae.eval())
    tokens = torch.randint(0, 32, (6, transformer.schedule.total))
    return Study(pipe, tokens, list(range(6)), torch.arange(6) % 2 == 0, arguments)


def load_study(arguments: argparse.Namespace) -> Study:
    """The model and its held-out pictures."""
    dtype = getattr(torch, arguments.dtype)
    pipe = HackVARPipeline.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
    path = arguments.tokens or TOKENS[pipe.family]
    held_out = load_file(path)
    if "labels" in held_out:
        inputs = held_out["labels"].tolist()
    else:
        inputs = json.loads(path.with_suffix(".json").read_text())
    return Study(pipe, held_out["tokens"].long(), inputs, held_out["seen"].bool(), arguments)


def check_settings(arguments: argparse.Namespace):
    """Refuse a folder whose rows were measured with other settings."""
    names = ("model", "tokens", "images", "batch_size", "seed", "dtype", "device", "quick")
    settings = {name: str(getattr(arguments, name)) for name in names}
    path = arguments.output / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    elif (earlier := json.loads(path.read_text())) != settings:
        raise SystemExit(f"{arguments.output} holds results of other settings, {earlier}: give another --output.")


def finished(path: Path) -> list[dict]:
    """Rows of earlier runs."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict):
    """Add a row to the table."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for tables, plots and pictures")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--tokens", type=Path, help="held-out pictures: `tokens`, `seen`, and `labels` or a JSON of prompts"
    )
    parser.add_argument("--images", type=int, default=128, help="pictures to draw")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny random model, a few pictures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.batch_size = 4, 2
    return arguments


def main():
    arguments = parse_arguments()
    runs = arguments.output / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    check_settings(arguments)
    study = tiny_study(arguments) if arguments.quick else load_study(arguments)
    study.pipe.set_progress_bar_config(disable=True)
    table = arguments.output / "demo_quality.csv"
    done = {run_name(row["method"], row["budget"]) for row in finished(table)}
    wanted = [(FULL, None)] + [(method, budget) for budget in arguments.budgets for method in arguments.methods]
    for method, budget in tqdm(wanted, desc="runs"):
        if run_name(method, budget) in done:
            continue
        try:
            study.pipe.prepare_cache(budget, method=study.method(method))
        except ValueError as error:
            tqdm.write(f"{method} at {budget} is left out: {error}")
            continue
        append(table, study.run(budget, method, runs))
        write_reports(finished(table), arguments.output)
    print(write_reports(finished(table), arguments.output))


if __name__ == "__main__":
    main()
