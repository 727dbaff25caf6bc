"""
How much methods lose in a next-token model: the raster demo model, at equal tokens.

    python benchmarks/raster_quality.py --output results/raster_quality
    python benchmarks/raster_quality.py --methods headkv_ar:strata=1 headkv_ar:groups=4 --budgets 0.25 --output results/raster_ablations

Held-out pictures are fed token by token through each cache, and the likelihood of their codes is compared with that through
`DynamicCache`, picture by picture. Then the same pictures are drawn with the same noise. Runs that a folder already has are
not made again. It prints the tables of docs/next-token.md; `raster_quality.csv` has all columns, and
`raster_quality.png` and `raster_pictures.png` are the pictures there. `--types` measures instead how well heads are told
apart early.
"""

import argparse
import csv
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import Cache, DynamicCache

from hack_pipelines.cli.sheet import Sheet
from hack_pipelines.evaluation import next_token_nll, psnr
from hack_pipelines.integrations.next_token import (
    CodeClassPipeline,
    CodeSampling,
    NextTokenPipeline,
    class_tokens,
    decode_codes,
    draw_codes,
)
from hack_pipelines.integrations.transformers import HeadKVCache, head_attention
from hack_pipelines.methods import HeadKVAR, Plan, uniform_plan
from hack_pipelines.profiles.statistics import rank_correlation


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src/hack_pipelines/demo_models/raster"
HELD_OUT = ROOT / "benchmarks/data/demo_raster_heldout.safetensors"
SIDE = 16
FULL = "full"
METHODS = (
    "headkv_ar",
    "headkv_ar:allocation=uniform",
    "linear_ar",
    "h2o",
    "snapkv",
    "streaming_llm:sinks=1",
    "sliding_window",
    "value_norm",
    "random",
)
BUDGETS = (1 / 2, 1 / 4, 1 / 6, 1 / 8)
SAMPLING = CodeSampling(guidance_scale=3.0, top_k=100)
DRAWN_CLASSES = (3, 12, 21, 28, 37, 45, 56, 66)
COLUMNS = (
    "method",
    "budget",
    "tokens",
    "nll",
    "rise",
    "rise_se",
    "psnr",
    "agreement",
    "bytes_allocated_peak",
    "seconds",
    "pictures",
)


def make_cache(method: str, budget: float) -> HeadKVCache:
    """A cache for the demo model's rows."""
    return HeadKVCache((SIDE, SIDE), budget, method)


def measured(pipe: CodeClassPipeline, sequences: torch.Tensor, method: str, budget: float | None) -> dict:
    """Likelihood of the held-out pictures, and pictures, through one kind of cache."""
    caches: list[HeadKVCache] = []

    def cache_factory() -> Cache:
        if budget is None:
            return DynamicCache()
        caches.append(make_cache(method, budget))
        return caches[-1]

    model, codes = pipe.model, pipe.model.config.num_codes
    start = perf_counter()
    with head_attention(model):
        nll = (
            next_token_nll(model, sequences, cache_factory, num_codes=codes, batch_size=len(sequences), progress=True)
            .double()
            .mean(1)
        )
        seconds = (perf_counter() - start) / len(sequences)
        report = caches[0].report() if caches else None
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(DRAWN_CLASSES))]
        drawn = draw_codes(
            model,
            torch.tensor(DRAWN_CLASSES),
            SIDE * SIDE,
            SAMPLING,
            cache_factory(),
            generators,
        )
    pictures = torch.stack([pil_to_tensor(picture) for picture in decode_codes(pipe.vae, drawn)])
    return {"nll": nll, "drawn": drawn, "seconds": seconds, "report": report, "pictures": pictures}


def pil_to_tensor(picture: Image.Image) -> torch.Tensor:
    """`[3, height, width]` in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def quality(pipe: CodeClassPipeline, sequences: torch.Tensor, ways: list, output: Path) -> list[dict]:
    """Rows of the table; those that the folder has are read."""
    path = output / "raster_quality.csv"
    rows: list[dict] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["method"], row["budget"]) for row in rows}
    full = torch_load(output / "full.safetensors")
    for method, budget in tqdm([way for way in ways if (way[0], budget_text(way[1])) not in done]):
        result = measured(pipe, sequences, method, budget)
        if method == FULL:
            full = {name: result[name] for name in ("nll", "drawn", "pictures")}
            save_file(full, output / "full.safetensors")
        rise = result["nll"] - full["nll"]
        # Of all pixels together: a picture that is equal would have an infinite one.
        likeness = psnr(result["pictures"].flatten(0, 1)[None], full["pictures"].flatten(0, 1)[None])
        report = result["report"]
        save_file({"pictures": result["pictures"]}, output / f"{file_stem(method, budget)}.safetensors")
        rows.append(
            {
                "method": method,
                "budget": budget_text(budget),
                "tokens": "" if report is None else f"{report.peak_tokens:g}",
                "nll": f"{result['nll'].mean():.5f}",
                "rise": f"{rise.mean():.5f}",
                "rise_se": f"{standard_error(rise):.5f}",
                "psnr": "" if method == FULL else f"{likeness.item():.3f}",
                "agreement": f"{(result['drawn'] == full['drawn']).double().mean():.4f}",
                "bytes_allocated_peak": "" if report is None else report.bytes_allocated_peak,
                "seconds": f"{result['seconds']:.3f}",
                "pictures": len(result["nll"]),
            }
        )
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


def budget_text(budget: float | None) -> str:
    """A budget as the table has it."""
    return "" if budget is None else f"{budget:.4f}"


def file_stem(method: str, budget: float | None) -> str:
    """Of the file with a run's pictures."""
    return f"{method.replace(':', '+')}@{budget_text(budget)}"


def torch_load(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, none where there is none."""
    return load_file(path) if path.is_file() else {}


def standard_error(values: torch.Tensor) -> float:
    """Of a mean."""
    return float(values.std() / len(values) ** 0.5)


def table(rows: list[dict], name: str, spec: str) -> str:
    """A column by method and budget, in Markdown."""
    budgets = sorted({row["budget"] for row in rows if row["budget"]}, reverse=True)
    lines = ["| method | " + " | ".join(f"1/{round(1 / float(budget))}" for budget in budgets) + " |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    for method in dict.fromkeys(row["method"] for row in rows if row["budget"]):
        own = {row["budget"]: row for row in rows if row["method"] == method}
        cells = [format(float(own[budget][name]), spec) if budget in own else "" for budget in budgets]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path):
    """Rise of the likelihood against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for marker, method in zip("os^vDPX*hp", dict.fromkeys(row["method"] for row in rows if row["budget"])):
        own = sorted(
            (float(row["tokens"]), float(row["rise"]), float(row["rise_se"]))
            for row in rows
            if row["method"] == method
        )
        tokens, rise, error = zip(*own)
        axes.errorbar(tokens, rise, error, label=method, marker=marker, ms=4, lw=1, capsize=2)
    axes.set(xlabel="image tokens a head between lines", ylabel="rise of NLL, nats per token")
    axes.set_yscale("symlog", linthresh=0.02)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def sheet(rows: list[dict], output: Path) -> Image.Image:
    """The same pictures with each method and budget."""
    full = torch_load(output / "full.safetensors")["pictures"]
    budgets = sorted({row["budget"] for row in rows if row["budget"]}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"]))
    cells = [
        [
            full,
            *(
                torch_load(output / f"{file_stem(method, float(budget))}.safetensors")["pictures"]
                for budget in budgets
            ),
        ]
        for method in methods
    ]
    top = ["full cache", *(f"1/{round(1 / float(budget))}" for budget in budgets)]
    return Sheet([[mosaic(pictures) for pictures in row] for row in cells], left=methods, top=top).draw()


def mosaic(pictures: torch.Tensor) -> Image.Image:
    """The first four, two by two."""
    rows = [torch.cat(tuple(pair), dim=2) for pair in pictures[:4].split(2)]
    return Image.fromarray((torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy())


class Evidence(HeadKVAR):
    """Looks at all heads at the end of every line, and lets nothing go before the last."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def plan(self, geometry, budget, profile, attention_budget=None):
        return uniform_plan(geometry, budget, self.protocol)

    def identifying_steps(self, plan: Plan) -> range:
        return range(2, SIDE - 1)

    def head_evidence(self, view):
        evidence = super().head_evidence(view)
        self.seen[view.step, view.layer] = evidence.double()
        return evidence


def types(pipe: CodeClassPipeline, sequences: torch.Tensor):
    """How well early lines tell heads apart: rank correlations of the share of near attention."""
    method = Evidence()
    count = min(64, len(sequences))
    with head_attention(pipe.model):
        next_token_nll(
            pipe.model,
            sequences[:count],
            lambda: HeadKVCache((SIDE, SIDE), (SIDE - 1) * SIDE - 1, method),
            num_codes=pipe.model.config.num_codes,
            progress=True,
        )
    layers = sorted({layer for _, layer in method.seen})

    def local(lines: range) -> torch.Tensor:
        near, everything = sum(torch.stack([method.seen[line, layer] for layer in layers]) for line in lines).unbind(
            -1
        )
        return near / everything

    early, late = local(range(2, 5)), local(range(SIDE - 6, SIDE - 1))
    mean_early = early.mean(1)
    print(
        "| layer | early with late lines, same picture | early with the mean over pictures | share of near attention by head |"
    )
    print("| --- | --- | --- | --- |")
    columns = []
    for layer in layers:
        own = [rank_correlation(a, b) for a, b in zip(early[layer], late[layer])]
        others = [rank_correlation(a, mean_early[layer]) for a in early[layer]]
        columns.append((sum(own) / count, sum(others) / count))
        shares = ", ".join(f"{share:.2f}" for share in late[layer].mean(0))
        print(f"| {layer} | {columns[-1][0]:.3f} | {columns[-1][1]:.3f} | {shares} |")
    print(f"mean: {sum(a for a, _ in columns) / len(layers):.3f}, {sum(b for _, b in columns) / len(layers):.3f}")


def main():
    """Measure, and write tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of the raster model (default: the demo's)")
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="held-out codes (default: the demo's)")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--pictures", type=int, help="how many held-out pictures (default: all)")
    parser.add_argument("--types", action="store_true", help="how well early lines tell heads apart, and nothing else")
    parser.add_argument("--output", type=Path, default=Path("results/raster_quality"))
    args = parser.parse_args()
    pipe = NextTokenPipeline.from_pretrained(args.model)
    held_out = {name: tensor[: args.pictures].long() for name, tensor in load_file(args.data).items()}
    sequences = torch.cat((class_tokens(pipe.model, held_out["labels"])[:, None], held_out["tokens"]), dim=1)
    if args.types:
        return types(pipe, sequences)
    args.output.mkdir(parents=True, exist_ok=True)
    ways = [(FULL, None), *((method, budget) for budget in args.budgets for method in args.methods)]
    rows = quality(pipe, sequences, ways, args.output)
    plot(rows, args.output / "raster_quality.png")
    sheet(rows, args.output).quantize(256).save(args.output / "raster_pictures.png", optimize=True)
    full = next(row for row in rows if row["method"] == FULL)
    print(f"full cache: {full['nll']} nats per token, {full['pictures']} pictures\n")
    for name, spec in (("rise", ".3f"), ("rise_se", ".3f"), ("psnr", ".1f"), ("agreement", ".2f")):
        print(f"{name}\n\n{table(rows, name, spec)}\n")


if __name__ == "__main__":
    main()
