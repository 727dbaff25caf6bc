"""
Time and memory of the cache at the shapes of the released models: true width, fewer layers, random weights.

Compares HACK, or other methods, at several budgets with the full cache and with the way of the original code (float32 keys, a concatenation
a step, every scale stored). The measurements take turns, so that whatever else the machine does hits all of them:

    python benchmarks/cache_shapes.py --output results/cache_shapes
    python benchmarks/cache_shapes.py --shapes infinity-2b-1024 --attention-only --output results/attention
    python benchmarks/cache_shapes.py --methods hack hack++:attention_budget=0.3 --output results/methods
    python benchmarks/cache_shapes.py --device cuda --dtypes bf16 fp16 --images 1 8 --layers 4 --output results/cuda

It prints the table of docs/benchmarks.md; `cache_shapes.csv` has all columns.
"""

import argparse
import csv
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from cache_meters import AttentionWatch, LiveBytes, Stopwatch, WatchedCache
from torch import nn
from tqdm import tqdm

from hack_pipelines.cache import Cache, FullCache, make_cache
from hack_pipelines.cache.attention import attention
from hack_pipelines.cache.budget import TokenBytes, make_plan
from hack_pipelines.memory import even_profile
from hack_pipelines.methods import Geometry, get_method
from hack_pipelines.models.infinity_schedules import template_schedule
from hack_pipelines.models.transformer_infinity import InfinityCondition, InfinityTransformer2DModel
from hack_pipelines.models.transformer_var import VARTransformer2DModel
from hack_pipelines.schedule import Schedule


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_TOKENS = 40


def title(method: str) -> str:
    """A method as the documents write it."""
    return "HACK" if method == "hack" else method


# The columns of docs/benchmarks.md. Ratios are to the full cache in the same run.
TABLE: dict[str, Callable[[dict], str]] = {
    "px": lambda row: str(row["pixels"]),
    "dtype": lambda row: row["dtype"],
    "way": lambda row: f"{title(row['method'])} {row['budget']:g}" if row["budget"] else row["method"],
    "tokens a head": lambda row: f"{row['peak_tokens']:.0f}",
    "stored": lambda row: f"{row['bytes_share_of_original']:.1%}".replace("%", " %"),
    "peak": lambda row: f"{row['peak_ratio']:.2f}",
    "time (min)": lambda row: f"{row['ratio_of_minima']:.2f}",
    "time (median)": lambda row: f"{row['ratio_to_full']:.2f}",
    "cache": lambda row: f"{row['cache_ratio']:.2f}",
    "attention": lambda row: f"{row['attention_ratio']:.2f}",
    "FLOPs": lambda row: f"{row['flops_ratio']:.2f}",
    "selection": lambda row: f"{row['selection_share']:.1%}".replace("%", " %") if row["budget"] else "",
}


class OriginalCache(Cache):
    """
    What the original code does under autocast: keys stay in float32 and are cast at every use, each step concatenates, and
    every scale is stored until the image is done.
    """

    def reset(self):
        super().reset()
        self.keys: list[torch.Tensor | None] = [None] * self.num_layers
        self.values: list[torch.Tensor | None] = [None] * self.num_layers

    def _attend(self, layer_idx, step, query, key, value, call):
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys = key.float() if keys is None else torch.cat((keys, key.float()), dim=2)
        values = value if values is None else torch.cat((values, value), dim=2)
        self.keys[layer_idx], self.values[layer_idx] = keys, values
        return attention(query, keys.to(query.dtype), values, call.scale, backend=call.backend), keys.shape[
            1
        ] * keys.shape[2]

    def _tensors(self, layer_idx):
        return (tensor for tensor in (self.keys[layer_idx], self.values[layer_idx]) if tensor is not None)


@dataclass(frozen=True)
class Setting:
    """What does not follow from a shape."""

    dtype: torch.dtype
    images: int
    layers: int
    device: torch.device
    methods: tuple[str, ...]


Pass = Callable[[Cache], None]
"""Runs all scales of some images against a cache that has been reset."""


@dataclass(frozen=True)
class Shape:
    """A released model at a resolution, and what makes a pass of it."""

    model: str
    pixels: int
    schedule: Schedule
    heads: int
    head_dim: int
    make_pass: Callable[["Shape", Setting], Pass]
    budgets: tuple[float, ...] = (0.3, 0.1)


def var_pass(shape: Shape, setting: Setting) -> Pass:
    """VAR with random weights and latents, a class an image, guided."""
    model = VARTransformer2DModel(
        num_layers=setting.layers,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        patch_nums=[height for height, _ in shape.schedule.sizes],
    )
    model = prepared(model, setting)
    latents = random_latents(shape, setting, model.config.latent_channels)
    labels = torch.arange(setting.images, device=setting.device) % model.config.num_classes
    labels = torch.cat((labels, torch.full_like(labels, model.config.num_classes)))

    def run(cache: Cache):
        for step, scale in enumerate(latents):
            model(scale if step else None, labels, step=step, kv_cache=cache, return_dict=False)

    return run


def infinity_pass(shape: Shape, setting: Setting) -> Pass:
    """Infinity with random weights, latents and text, guided; the text is encoded once a pass, as in a call."""
    narrow = shape.heads * shape.head_dim
    model = InfinityTransformer2DModel(
        num_layers=setting.layers,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        ff_hidden_dim=4 * narrow,
        num_pooling_heads=shape.heads,
    )
    model = prepared(model, setting)
    latents = random_latents(shape, setting, model.config.bits_per_token)
    texts = [torch.randn(TEXT_TOKENS, model.config.text_channels).to(setting.device) for _ in range(setting.images)]

    def run(cache: Cache):
        condition = InfinityCondition(texts)
        for step, scale in enumerate(latents):
            model(scale if step else None, condition, shape.schedule, step=step, kv_cache=cache, return_dict=False)

    return run


def attention_pass(shape: Shape, setting: Setting) -> Pass:
    """The cache alone: what the layers of either model hand over, without the model. All layers get the same."""
    steps = []
    for length in shape.schedule.lengths:
        projected = torch.randn(2 * setting.images, length, 3, shape.heads, shape.head_dim).to(setting.device)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = 4 * F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        steps.append([part.to(setting.dtype) for part in (query, key, value)])

    def run(cache: Cache):
        for parts in steps:
            for layer in range(setting.layers):
                cache.attend(layer, *parts, projection=parts[0])

    return run


def prepared(model: nn.Module, setting: Setting) -> nn.Module:
    """The model on its device; its linear layers have the dtype, as after `from_pretrained(..., dtype=...)`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in model._keep_in_fp32_modules for part in name.split(".")):
            module.to(setting.dtype)
    return model.eval().to(setting.device)


def random_latents(shape: Shape, setting: Setting, channels: int) -> list[torch.Tensor]:
    """Resized latents of every scale."""
    return [torch.randn(setting.images, length, channels).to(setting.device) for length in shape.schedule.lengths]


def var_shape(pixels: int, sides: tuple[int, ...]) -> Shape:
    return Shape("VAR-d30", pixels, Schedule.from_sides(sides), 30, 64, var_pass, (0.5, 0.3, 0.1))


def infinity_shape(pixels: int, pixel_class: str) -> Shape:
    return Shape("Infinity-2B", pixels, template_schedule(1.0, pixel_class), 16, 128, infinity_pass)


TINY = Schedule.from_sides((1, 2, 3, 4))
SHAPES = {
    "var-d30-256": var_shape(256, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "var-d30-512": var_shape(512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    "infinity-2b-256": infinity_shape(256, "0.06M"),
    "infinity-2b-512": infinity_shape(512, "0.25M"),
    "infinity-2b-1024": infinity_shape(1024, "1M"),
    "var-tiny": Shape("VAR", 64, TINY, 4, 16, var_pass, (0.5, 0.3)),
    "infinity-tiny": Shape("Infinity", 64, TINY, 2, 16, infinity_pass, (0.5, 0.3)),
}


@dataclass
class Candidate:
    """One cache under test, and what it has measured so far."""

    method: str
    protocol: str
    budget: float | None
    tokens: int
    cache: Cache
    bytes: LiveBytes = field(default_factory=LiveBytes)
    seconds: list[float] = field(default_factory=list)
    cache_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)


def make_candidates(shape: Shape, setting: Setting) -> list[Candidate]:
    """The original's cache, the full one, and every method at every budget, with a profile that knows nothing of the model."""
    geometry = Geometry(shape.schedule, setting.layers, shape.heads, shape.head_dim)
    profile = even_profile(geometry)
    common = (shape.schedule, geometry.num_layers, True)
    candidates = [
        Candidate("original", "post", None, shape.schedule.total, OriginalCache(*common)),
        Candidate("full", "post", None, shape.schedule.cacheable, FullCache(*common)),
    ]
    for spec in setting.methods:
        method = get_method(spec)
        token_bytes = TokenBytes(2, setting.dtype.itemsize, method.metadata_bytes)
        for budget in shape.budgets:
            plan = make_plan(method, geometry, profile, token_bytes, budget)
            cache = make_cache(plan, method, guided=True)
            candidates.append(Candidate(spec, method.protocol, budget, plan.budget, cache))
    return candidates


def warm_up(candidate: Candidate, run: Pass, device: torch.device):
    """A pass whose allocations are counted and whose time is not."""
    candidate.cache.reset()
    run(WatchedCache(candidate.cache, Stopwatch(device), candidate.bytes))


def measure(candidate: Candidate, run: Pass, device: torch.device):
    """A pass; its times are added to the candidate's."""
    candidate.cache.reset()
    whole, inside, calls = (Stopwatch(device) for _ in range(3))
    cache = WatchedCache(candidate.cache, inside, AttentionWatch(calls))
    whole.start()
    run(cache)
    whole.stop()
    candidate.seconds.append(whole.total())
    candidate.cache_seconds.append(inside.total())
    candidate.attention_seconds.append(calls.total())


@torch.inference_mode()
def measure_all(shape: Shape, setting: Setting, repeats: int, bar: tqdm) -> list[Candidate]:
    """All candidates at one shape: a warm-up each, then rounds in which they take turns."""
    torch.manual_seed(0)
    run = shape.make_pass(shape, setting)
    candidates = make_candidates(shape, setting)
    for round_index in range(repeats + 1):
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        for candidate in candidates if round_index % 2 else reversed(candidates):
            (measure if round_index else warm_up)(candidate, run, setting.device)
            bar.update()
    return candidates


def summary(candidate: Candidate, full: Candidate, shape: Shape, images: int) -> dict:
    """
    The part of a row that is measured. Times are minima of the runs unless they say otherwise; `ratio_to_full` is the
    median over rounds, each round against its own. Selection is all that the cache does beside its attention calls.
    """
    seconds = torch.tensor(candidate.seconds)
    cache, calls = torch.tensor(candidate.cache_seconds), torch.tensor(candidate.attention_seconds)
    quartiles = seconds.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    report, full_report = candidate.cache.report(), full.cache.report()
    selection = (cache - calls).min().item()
    return {
        "seconds_min": round(seconds.min().item(), 4),
        "seconds_median": round(quartiles[1], 4),
        "seconds_q1": round(quartiles[0], 4),
        "seconds_q3": round(quartiles[2], 4),
        "ratio_to_full": round((seconds / torch.tensor(full.seconds)).median().item(), 3),
        "ratio_of_minima": round(seconds.min().item() / min(full.seconds), 3),
        "cache_seconds": round(cache.min().item(), 4),
        "cache_ratio": round(cache.min().item() / min(full.cache_seconds), 3),
        "attention_seconds": round(calls.min().item(), 4),
        "attention_ratio": round(calls.min().item() / min(full.attention_seconds), 3),
        "selection_seconds": round(selection, 4),
        "selection_share": round(selection / min(full.seconds), 4),
        "attention_flops": report.attention_flops,
        "flops_ratio": round(report.attention_flops / full_report.attention_flops, 3),
        "peak_tokens": round(report.peak_tokens, 1),
        "bytes_allocated_peak": report.bytes_allocated_peak,
        "bytes_share_of_original": round(report.bytes_allocated_peak / report.bytes_full, 3),
        "bytes_peak": candidate.bytes.peak // images,
        "bytes_temporary": candidate.bytes.temporary // images,
        "peak_ratio": round(candidate.bytes.peak / full.bytes.peak, 3),
        "runs": len(candidate.seconds),
    }


def rows_of(candidates: list[Candidate], shape: Shape, shown: dict) -> list[dict]:
    """A row a candidate; `shown` says how it was run."""
    full = next(candidate for candidate in candidates if candidate.method == "full")
    return [
        {
            "model": shape.model,
            "pixels": shape.pixels,
            **shown,
            "method": candidate.method,
            "protocol": candidate.protocol,
            "budget": candidate.budget,
            "B": candidate.tokens,
            "b_N": round(candidate.tokens / shape.schedule.total, 4),
            "b_c": round(candidate.tokens / shape.schedule.cacheable, 4),
            **summary(candidate, full, shape, shown["images"]),
        }
        for candidate in candidates
    ]


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def markdown(rows: list[dict]) -> str:
    """The rows as the table of docs/benchmarks.md."""
    lines = [TABLE, ["---"] * len(TABLE), *([cell(row) for cell in TABLE.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(rows: list[dict], output: Path):
    """`cache_shapes.csv` and `cache_shapes.md` in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "cache_shapes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (output / "cache_shapes.md").write_text(markdown(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV and Markdown tables")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", default=["var-d30-256", "var-d30-512"], choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=["hack"], metavar="METHOD", help="with options if need be")
    parser.add_argument("--images", nargs="+", type=int, default=[1], help="images a batch; guidance doubles the rows")
    parser.add_argument("--repeats", type=int, default=7, help="rounds after the warm-up")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--attention-only", action="store_true", help="the cache alone, without the models around it")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny shapes, whatever else is asked for")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.dtypes, arguments.images = ["var-tiny", "infinity-tiny"], ["fp32"], [1]
        arguments.layers, arguments.repeats = 2, 2
    return arguments


def main():
    arguments = parse_arguments()
    shapes = [SHAPES[name] for name in arguments.shapes]
    if arguments.attention_only:
        shapes = [replace(shape, make_pass=attention_pass) for shape in shapes]
    runs = [(shape, dtype, images) for shape in shapes for dtype in arguments.dtypes for images in arguments.images]
    passes = sum(len(shape.budgets) * len(arguments.methods) + 2 for shape, _, _ in runs) * (arguments.repeats + 1)
    rows: list[dict] = []
    with tqdm(total=passes, unit="pass", smoothing=0) as bar:
        for shape, dtype, images in runs:
            bar.set_description(f"{shape.model} {shape.pixels} {dtype}, {images} images")
            setting = Setting(DTYPES[dtype], images, arguments.layers, arguments.device, tuple(arguments.methods))
            candidates = measure_all(shape, setting, arguments.repeats, bar)
            shown = {
                "measured": "cache" if arguments.attention_only else "model",
                "layers": arguments.layers,
                "dtype": dtype,
                "images": images,
                "device": device_name(arguments.device),
                "torch": torch.__version__,
            }
            rows += rows_of(candidates, shape, shown)
            write(rows, arguments.output)
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
