"""
Time and memory of the cache at the shapes of the released VAR-d30: true width, fewer layers, random weights.

Compares HACK at several budgets with the full cache and with the way of the original code (float32 keys, a concatenation
a step, every scale stored). The measurements take turns, so that whatever else the machine does hits all of them:

    python benchmarks/cache_shapes.py --output results/cache_shapes
    python benchmarks/cache_shapes.py --device cuda --dtypes bf16 fp16 --images 1 8 --layers 4 --output results/cuda
"""

import argparse
import csv
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hack_pipelines.cache.attention import attention
from hack_pipelines.cache.budget import TokenBytes, budget_tokens
from hack_pipelines.cache.cache import Cache, FullCache
from hack_pipelines.cache.head_group import HeadGroupCache
from hack_pipelines.methods import HACK, Geometry
from hack_pipelines.models.transformer_var import VARTransformer2DModel


# Sides of the token maps: VAR 256 px (d16 to d30) and VAR 512 px (d36).
SCHEDULES = {"256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), "tiny": (1, 2, 3, 4)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {
    "method": "method",
    "protocol": "protocol",
    "schedule": "schedule",
    "dtype": "dtype",
    "images": "images",
    "B": "B",
    "b_N": "b_N",
    "b_c": "b_c",
    "seconds_min": "s min",
    "seconds_median": "s median",
    "seconds_q1": "s q1",
    "seconds_q3": "s q3",
    "ratio_to_full": "time / full",
    "ratio_of_minima": "min / full's",
    "attention_seconds": "s in attend",
    "attention_share": "attend share",
    "peak_tokens": "peak tokens",
    "bytes_allocated_peak": "bytes stored",
    "bytes_share_of_original": "of original's",
    "runs": "runs",
    "layers": "layers",
    "device": "device",
    "torch": "torch",
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

    def _attend(self, layer_idx, step, query, key, value, scale):
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys = key.float() if keys is None else torch.cat((keys, key.float()), dim=2)
        values = value if values is None else torch.cat((values, value), dim=2)
        self.keys[layer_idx], self.values[layer_idx] = keys, values
        return attention(query, keys.to(query.dtype), values, scale), keys.shape[1] * keys.shape[2]

    def _tensors(self, layer_idx):
        return (tensor for tensor in (self.keys[layer_idx], self.values[layer_idx]) if tensor is not None)


@dataclass(frozen=True)
class HalfContextual:
    """Stands in for a head profile: every second head of every layer is contextual."""

    num_layers: int
    num_heads: int

    def contextual_heads(self, alpha: float) -> torch.Tensor:
        """Which heads are contextual, boolean `[layers, heads]`; the share is a half whatever `alpha` is."""
        return (torch.arange(self.num_heads) % 2 == 0).expand(self.num_layers, -1)


@dataclass
class Stopwatch:
    """Seconds between `start` and `stop`, summed; on CUDA from events, so that nothing waits in between."""

    device: torch.device
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def start(self):
        if self.device.type == "cuda":
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.seconds -= time.perf_counter()

    def stop(self):
        if self.device.type == "cuda":
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter()

    def total(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        return self.seconds


@dataclass
class TimedCache:
    """Hands everything to a cache and measures how long its attention takes."""

    cache: Cache
    watch: Stopwatch

    def attend(self, *arguments) -> torch.Tensor:
        self.watch.start()
        output = self.cache.attend(*arguments)
        self.watch.stop()
        return output


@dataclass
class Candidate:
    """One cache under test, and what it has measured so far."""

    method: str
    protocol: str
    tokens: int
    cache: Cache
    seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)


def make_model(arguments: argparse.Namespace, schedule: str, dtype: torch.dtype) -> VARTransformer2DModel:
    """A transformer of random weights; its linear layers have the dtype, as after `from_pretrained(..., dtype=...)`."""
    torch.manual_seed(0)
    model = VARTransformer2DModel(
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.head_dim,
        patch_nums=SCHEDULES[schedule],
        vocab_size=arguments.vocab_size,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model.eval().to(arguments.device)


def make_candidates(model: VARTransformer2DModel, budgets: list[float], itemsize: int) -> list[Candidate]:
    """The original's cache, the full one, and HACK at every budget."""
    config = model.config
    geometry = Geometry(model.schedule, config.num_layers, config.num_attention_heads, config.attention_head_dim)
    profile = HalfContextual(geometry.num_layers, geometry.num_heads)
    common = (model.schedule, geometry.num_layers, True)
    candidates = [
        Candidate("original", "post", model.schedule.total, OriginalCache(*common)),
        Candidate("full", "post", model.schedule.cacheable, FullCache(*common)),
    ]
    method = HACK()
    for budget in budgets:
        tokens = budget_tokens(budget, geometry, TokenBytes(2, itemsize))
        cache = HeadGroupCache(method.plan(geometry, tokens, profile), method, guided=True)
        candidates.append(Candidate(method.name, method.protocol, tokens, cache))
    return candidates


@torch.inference_mode()
def measure(candidate: Candidate, model: VARTransformer2DModel, inputs: list[torch.Tensor], labels: torch.Tensor):
    """One pass of the transformer over all scales; its time is added to the candidate's."""
    candidate.cache.reset()
    whole, inside = Stopwatch(labels.device), Stopwatch(labels.device)
    cache = TimedCache(candidate.cache, inside)
    whole.start()
    for step, scale_input in enumerate(inputs):
        model(scale_input if step else None, labels, step=step, kv_cache=cache, return_dict=False)
    whole.stop()
    candidate.seconds.append(whole.total())
    candidate.attention_seconds.append(inside.total())


def run(arguments: argparse.Namespace, schedule: str, dtype: str, images: int, bar: tqdm) -> list[dict]:
    """All candidates at one shape: a warm-up each, then `repeats` rounds in which they take turns."""
    model = make_model(arguments, schedule, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(images, length, model.config.latent_channels, generator=generator).to(arguments.device)
        for length in model.schedule.lengths
    ]
    labels = torch.arange(images, device=arguments.device) % model.config.num_classes
    labels = torch.cat((labels, torch.full_like(labels, model.config.num_classes)))
    candidates = make_candidates(model, arguments.budgets, DTYPES[dtype].itemsize)
    for round_index in range(arguments.repeats + 1):
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        for candidate in candidates if round_index % 2 else reversed(candidates):
            measure(candidate, model, inputs, labels)
            bar.update()
        if round_index == 0:
            for candidate in candidates:
                candidate.seconds.clear()
                candidate.attention_seconds.clear()
    shape = {
        "schedule": schedule,
        "dtype": dtype,
        "images": images,
        "layers": arguments.layers,
        "device": device_name(arguments.device),
        "torch": torch.__version__,
    }
    full = next(candidate for candidate in candidates if candidate.method == "full")
    original = next(candidate for candidate in candidates if candidate.method == "original")
    bytes_original = original.cache.report().bytes_full
    return [{**shape, **summary(candidate, full, bytes_original)} for candidate in candidates]


def summary(candidate: Candidate, full: Candidate, bytes_original: int) -> dict:
    """A row of the table. The ratio to the full cache is the median over rounds, each round against its own."""
    seconds, inside = torch.tensor(candidate.seconds), torch.tensor(candidate.attention_seconds)
    reference = torch.tensor(full.seconds)
    quartiles = seconds.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    report, schedule = candidate.cache.report(), candidate.cache.schedule
    # The meter looks at boundaries between steps; the original also holds the last scale after its last step.
    stored = bytes_original if candidate.method == "original" else report.bytes_allocated_peak
    return {
        "method": candidate.method,
        "protocol": candidate.protocol,
        "B": candidate.tokens,
        "b_N": round(candidate.tokens / schedule.total, 4),
        "b_c": round(candidate.tokens / schedule.cacheable, 4),
        "seconds_min": round(seconds.min().item(), 4),
        "seconds_median": round(quartiles[1], 4),
        "seconds_q1": round(quartiles[0], 4),
        "seconds_q3": round(quartiles[2], 4),
        "ratio_to_full": round((seconds / reference).median().item(), 3),
        "ratio_of_minima": round((seconds.min() / reference.min()).item(), 3),
        "attention_seconds": round(inside.median().item(), 4),
        "attention_share": round((inside / seconds).median().item(), 3),
        "peak_tokens": round(report.peak_tokens, 1),
        "bytes_allocated_peak": stored,
        "bytes_share_of_original": round(stored / bytes_original, 3),
        "runs": len(candidate.seconds),
    }


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [
        " | ".join(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in COLUMNS)
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def write(rows: list[dict], output: Path):
    """`cache_shapes.csv` and `cache_shapes.md` in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "cache_shapes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (output / "cache_shapes.md").write_text(markdown(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV and Markdown tables")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--schedules", nargs="+", default=["256", "512"], choices=SCHEDULES)
    parser.add_argument("--images", nargs="+", type=int, default=[1], help="images a batch; guidance doubles the rows")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3, 0.1])
    parser.add_argument("--repeats", type=int, default=7, help="rounds after the warm-up")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny shapes, whatever else is asked for")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.schedules, arguments.dtypes, arguments.images = ["tiny"], ["fp32"], [1]
        arguments.layers, arguments.heads, arguments.head_dim, arguments.vocab_size = 2, 4, 16, 32
        arguments.repeats, arguments.budgets = 2, [0.5, 0.3]
    return arguments


def main():
    arguments = parse_arguments()
    shapes = [
        (schedule, dtype, images)
        for schedule in arguments.schedules
        for dtype in arguments.dtypes
        for images in arguments.images
    ]
    rows: list[dict] = []
    with tqdm(total=len(shapes) * (arguments.repeats + 1) * (len(arguments.budgets) + 2), unit="pass") as bar:
        for shape in shapes:
            bar.set_description(" ".join(map(str, shape)))
            rows += run(arguments, *shape, bar)
            write(rows, arguments.output)
    print(markdown(rows))


if __name__ == "__main__":
    main()
