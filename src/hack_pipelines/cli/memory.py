"""`hack-pipelines memory`: what a model needs of a card, before anything is downloaded."""

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from .options import DTYPES, parse_budget, positive_int, torch_dtype


if TYPE_CHECKING:
    from ..memory import Fit, MemoryReport, Request


# The models of `hack_pipelines.memory`, which is imported only when the command runs.
MODELS = ("2b", "8b", "8b-512", "d16", "d20", "d24", "d30", "d36")
GB = 10**9


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "memory",
        help="tell what a model needs of a card",
        description="Compute what a released model needs of a card. Nothing is downloaded or measured; see docs/memory.md.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", choices=MODELS, default="2b", help="Infinity 2b, 8b, 8b-512 or VAR d16 to d36 (2b)")
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="pixels of the image (default: the model's own); Infinity draws the nearest size that it has",
    )
    parser.add_argument(
        "--kv-budget",
        type=parse_budget,
        metavar="BUDGET",
        help="a fraction of the full cache, tokens per head, bytes per image such as 64MB, or none (default)",
    )
    parser.add_argument("--method", default="hack++", metavar="NAME", help="how tokens are chosen (default: hack++)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="precision of weights and cache (bf16)")
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="images drawn together (1)")
    parser.add_argument("--no-guidance", action="store_true", help="one row an image instead of two")
    parser.add_argument(
        "--prompt-tokens", type=positive_int, default=512, metavar="N", help="text tokens of a prompt (512, the most)"
    )
    parser.add_argument(
        "--card", type=parse_bytes, metavar="BYTES", help="memory of a card, such as 12GB: does it fit?"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in bytes")
    form.add_argument(
        "--table",
        action="store_true",
        help="print what fits of all models instead, on cards of 8, 12, 16 and 24 GB or on that of `--card`",
    )
    return parser


def parse_size(text: str) -> tuple[int, int]:
    """A size as it is typed, for argparse: `"1024"` or `"1152x864"`, height first."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"must be a side such as 1024 or HEIGHTxWIDTH such as 1152x864 but is {text!r}"
        )
    return int(match[1]), int(match[2] or match[1])


def parse_bytes(text: str) -> int:
    """A card's memory as it is typed, for argparse."""
    from ..cache.budget import BYTES_PATTERN, UNITS

    match = BYTES_PATTERN.fullmatch(text)
    if match is None or match[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"must be bytes such as 12GB or 24GiB but is {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


def run(args: argparse.Namespace):
    """Print the report."""
    import torch

    from ..memory import Request, estimate, fit

    request = Request(
        model=args.model,
        size=args.size,
        kv_budget=args.kv_budget,
        method=args.method,
        dtype=torch_dtype(args.dtype) or torch.bfloat16,
        images=args.batch_size,
        guided=not args.no_guidance,
        prompt_tokens=args.prompt_tokens,
    )
    if args.table:
        print_table(args, request)
        return
    report = estimate(request)
    fitting = None if args.card is None else fit(request, args.card)
    if args.json:
        print(json.dumps(as_json(report, args.card, fitting), indent=2))
        return
    for line in report_lines(report, args.dtype):
        print(line)
    if fitting is not None:
        print()
        for line in fit_lines(request, args.card, fitting):
            print(line)


def print_table(args: argparse.Namespace, request: "Request"):
    """
    Print what fits of all models.

    Raises:
        `ValueError`: if an option is given that the table settles itself.
    """
    from .memory_table import CARDS, table_lines

    settled = {"--size": args.size, "--kv-budget": args.kv_budget, "--batch-size": None if args.batch_size == 1 else 1}
    given = [name for name, value in settled.items() if value is not None]
    if given:
        raise ValueError(f"`--table` goes through models, budgets and batches itself: leave {', '.join(given)} out.")
    for line in table_lines(request, CARDS if args.card is None else (args.card,)):
        print(line)


def report_lines(report: "MemoryReport", dtype: str) -> list[str]:
    """The report as a table."""
    request = report.request
    images = "1 image" if request.images == 1 else f"{request.images} images"
    guidance = "with guidance" if request.guided else "without guidance"
    family = "Infinity" if request.shape.family == "infinity" else "VAR"
    lines = [f"{family} {request.model}, {size_text(report.size)}, {images} {guidance}, {dtype}"]
    if report.size != request.wanted_size:
        lines.append(
            f"{size_text(request.wanted_size)} was asked for; {size_text(report.size)} is the nearest it draws"
        )
    rows = part_rows(report)
    wide = max(len(name) for name, _ in rows)
    lines.append("")
    lines += [name if count is None else f"{name:<{wide}}  {count / GB:7.3f} GB" for name, count in rows]
    if request.kv_budget is not None:
        lines += ["", f"{report.budget_tokens} tokens a head are allowed, {report.peak_tokens:.1f} are held at most"]
    return lines


def part_rows(report: "MemoryReport") -> list[tuple[str, int | None]]:
    """Parts by name with their bytes; a heading has none."""
    request = report.request
    rows: list[tuple[str, int | None]] = [
        ("weights", None),
        ("  transformer", report.transformer),
        ("  image tokenizer", report.tokenizer),
    ]
    if report.text_encoder:
        rows.append(("  text encoder, flan-t5-xl", report.text_encoder))
    rows += [
        ("cache", None),
        ("  as the original holds it", report.cache_original),
        ("  without a budget (lossless)", report.cache_lossless),
    ]
    if request.kv_budget is not None:
        rows.append((f"  {request.method}, kv_budget={request.kv_budget}", report.cache))
    rows.append(("activations", None))
    if report.text:
        rows.append((f"  text, {request.prompt_tokens} tokens a prompt", report.text))
    rows += [
        ("  work of the largest step", report.work),
        ("  decoder, after the cache is freed", report.decoder),
        ("peak", None),
        ("  all weights on the card", report.total),
        ("  with model offload", report.total_offload),
    ]
    return rows


def size_text(size: tuple[int, int]) -> str:
    """Height and width in short."""
    return f"{size[0]}x{size[1]}"


def fit_lines(request: "Request", card: int, fitting: "Fit") -> list[str]:
    """What a card makes possible."""
    ways = (
        ("all weights on it", fitting.spare, fitting.budget),
        ("with model offload (--offload model)", fitting.spare_offload, fitting.budget_offload),
    )
    lines = [f"a card of {card / GB:.1f} GB"]
    for way, spare, budget in ways:
        if spare >= 0:
            answer = f"fits, {spare / GB:.2f} GB to spare"
        elif budget is not None:
            answer = f"{-spare / GB:.2f} GB too much; {request.method} fits with kv_budget={budget} or less"
        else:
            answer = f"{-spare / GB:.2f} GB too much, with any kv_budget"
        lines.append(f"  {way}: {answer}")
    return lines


def as_json(report: "MemoryReport", card: int | None, fitting: "Fit | None") -> dict[str, Any]:
    """The report as JSON holds it, in bytes."""
    request = report.request
    result: dict[str, Any] = {
        "model": request.model,
        "size": report.size,
        "wanted_size": request.wanted_size,
        "kv_budget": request.kv_budget,
        "method": request.method,
        "dtype": str(request.dtype).removeprefix("torch."),
        "images": request.images,
        "guided": request.guided,
        "prompt_tokens": request.prompt_tokens,
    }
    parts = {name: value for name, value in vars(report).items() if name not in ("request", "size")}
    result |= parts | {"total": report.total, "total_offload": report.total_offload}
    if fitting is not None:
        result |= {"card": card, "fits": fitting.spare >= 0, "fits_with_offload": fitting.spare_offload >= 0}
        result |= {"largest_kv_budget": fitting.budget, "largest_kv_budget_with_offload": fitting.budget_offload}
    return result
