"""`hack-pipelines compare`: compression methods at equal budgets, against the full cache."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import Family, family_of
from .options import (
    add_model_arguments,
    add_prompts_file_argument,
    choose_device,
    load_pipeline,
    parse_budget,
    parse_seed,
    positive_int,
    read_prompts_file,
)
from .output import check_folder


if TYPE_CHECKING:
    from ..comparison import HeldOut


BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
# Names out of `hack_pipelines.comparison`, which is imported only when the command runs.
SAMPLING = ("sampled", "greedy")
METRICS = ("fid", "lpips", "clip")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="measure compression methods against the full cache",
        description="Measure what compression methods lose at equal bytes. A run that was interrupted goes on where it "
        "stopped, and several processes may share a folder when each has methods or budgets of its own.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="PROMPT_OR_CLASS",
        help="what the pictures show, in turn; those of the held-out pictures (prompts) or all classes by default",
    )
    add_prompts_file_argument(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["hack++", "hack", "scale_window", "random"],
        metavar="METHOD",
        help='names, also with options: "hack:rules=contextual,alpha=0.4" (default: hack++ hack scale_window random)',
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=parse_fraction,
        default=list(BUDGETS),
        metavar="X",
        help="fractions of the full cache, which all methods get in bytes (default: 0.5 0.3 0.2 0.1 0.05)",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="pictures whose likelihood is measured: a .safetensors file with `tokens`, `labels` or prompts in a .json "
        "file of the same name, and perhaps `seen`",
    )
    parser.add_argument(
        "--held-out-images",
        type=positive_int,
        metavar="N",
        help="so many of them, spread evenly over the file (default: all)",
    )
    parser.add_argument("--images", type=positive_int, default=64, metavar="N", help="pictures in all (default: 64)")
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=SAMPLING,
        default=["sampled"],
        help="draw as the model does, take the most likely token, or both one after the other (default: sampled)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        help="more measures of the pictures, which need `pip install 'hack_pipelines[eval]'` and download networks",
    )
    parser.add_argument("--reference-images", type=Path, metavar="FOLDER", help="real images for `--metrics fid`")
    parser.add_argument("--no-pictures", action="store_true", help="measure the likelihood only")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="run together (default: 32)")
    parser.add_argument("--seed", type=parse_seed, default=0, help="of the first picture, the next have the next ones")
    parser.add_argument(
        "--attention-budget",
        type=parse_attention_budget,
        metavar="BUDGET",
        help="what a step may attend to, a fraction or tokens per head, for methods that separate it from what they store",
    )
    parser.add_argument("--kv-dtype", metavar="TYPE", help="storage type of the compressed runs, such as int8")
    add_model_arguments(parser)
    return parser


def parse_fraction(text: str) -> float:
    """A budget that means the same for every method, for argparse."""
    value = parse_budget(text)
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a fraction in (0, 1] but is {text!r}")
    return float(value)


def parse_attention_budget(text: str) -> float | int | None:
    """A budget that does not depend on guidance, for argparse."""
    value = parse_budget(text)
    if isinstance(value, str):
        raise argparse.ArgumentTypeError(f"must be a fraction or a number of tokens but is {text!r}")
    return value


def run(args: argparse.Namespace):
    """Check all that can be checked, then measure."""
    from ..cache.storage import get_storage
    from ..comparison import ComparisonFolder, Settings, Study
    from ..comparison.metrics import load_metrics
    from ..comparison.plot import NO_MATPLOTLIB, can_plot
    from ..comparison.report import write_tables
    from ..methods import get_method

    texts = args.inputs + read_prompts_file(args.prompts_file)
    for method in args.methods:
        get_method(method)
    get_storage(args.kv_dtype)
    held_out = choose_held_out(args)
    if args.metrics and args.no_pictures:
        raise ValueError("`--metrics` measures pictures, but `--no-pictures` has none drawn: leave one of them out.")
    check_folder(args.output)
    metrics = load_metrics(args.metrics or (), choose_device(args.device), args.reference_images)
    if not can_plot():
        print(NO_MATPLOTLIB, file=sys.stderr)
    family = family_of(load_pipeline(args))
    family.pipe.set_progress_bar_config(disable=True)
    settings = Settings(
        inputs=choose_inputs(family, texts, held_out, args.images),
        images=args.images,
        batch_size=args.batch_size,
        seed=args.seed,
        sampling=() if args.no_pictures else tuple(name for name in SAMPLING if name in args.sampling),
        attention_budget=args.attention_budget,
        kv_dtype=args.kv_dtype,
    )
    folder = ComparisonFolder(args.output)
    study = Study(family.pipe, folder, settings, held_out, metrics, identity(args))
    measure(study, args)
    print(write_tables(folder), end="")


def measure(study: Any, args: argparse.Namespace):
    """Make all runs."""
    import torch

    try:
        study.run(args.methods, args.budgets, tell)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"The device is out of memory with {args.batch_size} pictures at a time: use a smaller `--batch-size` in "
            "another folder, or `--dtype bf16`."
        ) from error


def tell(text: str):
    """A line of progress, for logs too: the tables are what standard output is for."""
    print(text, file=sys.stderr, flush=True)


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What belongs to the settings of a folder besides those of the study."""
    names = ("model", "variant", "dtype", "device", "head_profile", "held_out", "held_out_images", "metrics")
    values = {name: getattr(args, name) for name in (*names, "reference_images")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def choose_inputs(family: Family, texts: Sequence[str], held_out: "HeldOut | None", images: int) -> list[int | str]:
    """What is drawn: what was typed, or the held-out prompts, or built-in prompts or classes."""
    if texts:
        return family.parse(texts)
    if held_out is not None and isinstance(held_out.inputs[0], str):
        return list(held_out.inputs)
    classes = family.pipe.transformer.config.get("num_classes", images)
    return family.pipe.calibration_inputs(min(images, classes))


def choose_held_out(args: argparse.Namespace) -> "HeldOut | None":
    """
    The pictures of `--held-out`, or as many as `--held-out-images` says, spread evenly: files are often sorted.

    Raises:
        `ValueError`: if there are fewer, or none.
    """
    from ..comparison import HeldOut

    count = args.held_out_images
    if args.held_out is None:
        if count is not None:
            raise ValueError(
                f"`--held-out-images {count}` needs pictures: name a file with `--held-out`, or leave it out."
            )
        return None
    everything = read_held_out(args.held_out)
    total = len(everything.tokens)
    if count is None:
        return everything
    if count > total:
        raise ValueError(f"`--held-out-images` must be at most {total}, what {args.held_out} holds, but is {count}.")
    chosen = [number * total // count for number in range(count)]
    inputs = [everything.inputs[number] for number in chosen]
    seen = None if everything.seen is None else everything.seen[chosen]
    return HeldOut(everything.tokens[chosen], inputs, seen)


def read_held_out(path: Path) -> "HeldOut":
    """
    Held-out pictures of a file.

    Raises:
        `ValueError`: if something is missing from it.
        `OSError`: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..comparison import HeldOut
    from .convert import read_json

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`--held-out` must be a .safetensors file, but {path} is none: {error}.") from error
    if "tokens" not in tensors or not len(tensors["tokens"]):
        raise ValueError(f"`--held-out` must hold `tokens` of at least one picture, but {path} has {sorted(tensors)}.")
    prompts = path.with_suffix(".json")
    if "labels" in tensors:
        inputs = tensors["labels"].tolist()
    elif prompts.is_file():
        inputs = read_json(prompts)
    else:
        raise ValueError(
            f"`--held-out` needs what the pictures show: {path} has no `labels`, and there is no {prompts} with a list of "
            "prompts."
        )
    if not isinstance(inputs, list) or len(inputs) != len(tensors["tokens"]):
        raise ValueError(
            f"{prompts if 'labels' not in tensors else path} must name one class or prompt for each of the "
            f"{len(tensors['tokens'])} pictures of {path}."
        )
    seen = tensors.get("seen")
    return HeldOut(tensors["tokens"].long(), inputs, None if seen is None else seen.bool())
