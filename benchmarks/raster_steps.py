"""
Time per token and memory of head-aware caches in next-token models, at the shape of Janus-Pro-1B: true width, fewer layers,
random weights, a `LlamaForCausalLM` of transformers.

    python benchmarks/raster_steps.py --output results/raster_steps
    python benchmarks/raster_steps.py --device cuda --dtype bf16 --layers 24 --output results/raster_cuda

Every round draws one whole image with each cache in turn, so that whatever else the machine does hits all of them. Ratios are
to `DynamicCache` in the same run, over the minima of the rounds. It prints the table of docs/next-token.md;
`raster_steps.csv` has all columns.
"""

import argparse
import csv
import platform
import statistics
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hack_pipelines.integrations.transformers import HeadKVCache, head_attention


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = 16
FULL = "DynamicCache"


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """The decoder of Janus-Pro-1B with fewer layers and a small vocabulary, whose size no cache changes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).to(args.device, DTYPES[args.dtype]).eval()


@torch.no_grad()
def draw(model: LlamaForCausalLM, cache: DynamicCache | HeadKVCache, rows: int, args: argparse.Namespace) -> float:
    """Seconds of a token, a mean over the image."""
    generator = torch.Generator().manual_seed(0)
    steps = args.grid * args.grid - 1
    prompt = torch.randint(VOCABULARY, (rows, args.condition), generator=generator).to(args.device)
    tokens = torch.randint(VOCABULARY, (rows, steps), generator=generator).to(args.device)
    model(input_ids=prompt, past_key_values=cache)
    synchronize(args.device)
    start = perf_counter()
    for step in range(steps):
        model(input_ids=tokens[:, step : step + 1], past_key_values=cache)
    synchronize(args.device)
    return (perf_counter() - start) / steps


def synchronize(device: str):
    """Wait until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def dense_bytes(cache: DynamicCache) -> int:
    """What a `DynamicCache` holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: LlamaForCausalLM, batch: int, args: argparse.Namespace) -> list[dict]:
    """Rows of the table for one batch size."""
    rows = batch * (2 if args.guided else 1)
    ways: list[tuple[str, float | None]] = [(FULL, None)]
    ways += [(method, budget) for method in args.methods for budget in args.budgets]
    seconds: dict[tuple, list[float]] = {way: [] for way in ways}
    held: dict[tuple, int] = {}
    for round_index in tqdm(range(args.rounds + 1), desc=f"batch {batch}"):
        for way in ways:
            method, budget = way
            cache: DynamicCache | HeadKVCache = DynamicCache()
            if method != FULL:
                cache = HeadKVCache((args.grid, args.grid), budget, method, rows_per_image=2 if args.guided else 1)
            with nullcontext() if method == FULL else head_attention(model):
                time = draw(model, cache, rows, args)
            held[way] = dense_bytes(cache) // batch if method == FULL else cache.report().bytes_allocated_peak
            # The first round warms up.
            if round_index:
                seconds[way].append(time)
    full = seconds[FULL, None]
    return [
        {
            "batch": batch,
            "method": method,
            "budget": "" if budget is None else f"{budget:.4f}",
            "ms_a_token": 1000 * min(times),
            "ms_a_token_median": 1000 * statistics.median(times),
            "ratio": min(times) / min(full),
            "ratio_of_medians": statistics.median(times) / statistics.median(full),
            "bytes": held[method, budget],
            "bytes_ratio": held[method, budget] / held[FULL, None],
        }
        for (method, budget), times in seconds.items()
    ]


def main():
    """Measure, write the CSV, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["headkv_ar", "linear_ar"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 1 / 2, 1 / 6])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--grid", type=int, default=24)
    parser.add_argument("--condition", type=int, default=16, help="tokens of the prompt (default: 16)")
    parser.add_argument("--guided", action="store_true", help="two rows an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--output", type=Path, default=Path("results/raster_steps"))
    args = parser.parse_args()
    model = build(args)
    rows = [row for batch in args.batches for row in measure(model, batch, args)]
    machine = {
        "layers": args.layers,
        "grid": f"{args.grid}x{args.grid}",
        "condition": args.condition,
        "guided": args.guided,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "raster_steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    print("| batch | cache | budget | ms a token | time | bytes an image | bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        budget = f"{float(row['budget']):.3g}" if row["budget"] else ""
        print(
            f"| {row['batch']} | {row['method']} | {budget} | {row['ms_a_token']:.2f} | {row['ratio']:.2f} | "
            f"{row['bytes'] / 1e6:.1f} MB | {row['bytes_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
