"""`hack-pipelines calibrate`: a head profile of a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .families import Family, TextFamily, family_of
from .options import (
    add_model_arguments,
    add_prompts_file_argument,
    add_size_arguments,
    dtype_option,
    load_pipeline,
    parse_seed,
    positive_int,
    read_prompts_file,
)
from .output import check_folder


if TYPE_CHECKING:
    from ..profiles import HeadProfile
    from ..schedule import Schedule


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="make the head profile of a model",
        description="Draw pictures of prompts or classes without compression, record what the heads attend to, and save it "
        "as a head profile.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the profile goes")
    parser.add_argument("--num-samples", type=positive_int, default=50, metavar="N", help="pictures (default: 50)")
    add_prompts_file_argument(parser)
    add_size_arguments(parser)
    parser.add_argument("--seed", type=parse_seed, default=0, help="of the first picture, the next have the next ones")
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="drawn at a time (default: 1)")
    parser.add_argument(
        "--check", action="store_true", help="calibrate again with other seeds and say how well both agree"
    )
    add_model_arguments(parser, head_profile=False)
    return parser


def run(args: argparse.Namespace):
    """Calibrate, save, and say how clear the head types are."""
    texts = read_prompts_file(args.prompts_file)
    check_output(args.output)
    family = family_of(load_pipeline(args))
    inputs, schedule = family.parse(texts) if texts else None, chosen_schedule(family, args)
    profile = record(family, args, args.seed, inputs, schedule)
    profile.save_pretrained(args.output)
    print(f"{args.output}: head profile of {profile.title} from {args.num_samples} pictures")
    print(f"{args.output / 'head_map.png'}: its head types as a picture")
    if profile.scores.numel() > 1:
        print(f"variance just above the cut in the middle over that just below it: {profile.gap(0.5):.3f}")
    if args.check:
        from ..calibration import split_half_correlation

        again = record(family, args, args.seed + args.num_samples, inputs, schedule)
        print(f"rank correlation with another {args.num_samples} seeds: {split_half_correlation(profile, again):.3f}")
    # There it is attached whenever the model is opened.
    belongs = args.output.resolve() == (Path(args.model) / "head_profile").resolve()
    profile_option = "" if belongs else f" --head-profile {args.output}"
    model = f"--model {args.model}{dtype_option(args.dtype)}{profile_option}"
    print(f"draw with it: hack-pipelines generate {family.example} {model} --kv-budget 0.3")


def chosen_schedule(family: Family, args: argparse.Namespace) -> "Schedule | None":
    """
    The scales of the size that was typed; the model's own where none was.

    Raises:
        `ValueError`: if the model draws one size only.
    """
    size = {name: value for name in ("height", "width") if (value := getattr(args, name)) is not None}
    if size and not isinstance(family, TextFamily):
        raise ValueError(
            f"`--{next(iter(size))}` is for {TextFamily.kind} models, but {args.model} is a {family.kind} model: leave it out."
        )
    return family.pipe.resolve_schedule(**size) if size else None


def record(
    family: Family, args: argparse.Namespace, seed: int, inputs: list[int | str] | None, schedule: "Schedule | None"
) -> "HeadProfile":
    """Record a profile from seeds that start at `seed`, of the built-in prompts or classes where no others are given."""
    from ..calibration import calibrate

    return calibrate(
        family.pipe,
        num_samples=args.num_samples,
        seed=seed,
        batch_size=args.batch_size,
        inputs=inputs,
        schedule=schedule,
        # What the user calls the model; a path would only mean something on this machine.
        base_model=None if Path(args.model).exists() else args.model,
        progress=sys.stderr.isatty(),
    )


def check_output(folder: Path):
    """
    Make sure that a profile can be written to a folder later. It is not made yet: beside a model, a folder without a
    profile in it would be taken for a damaged one.

    Raises:
        `ValueError`: if it holds something else, whose config.json and README.md would be lost.
        `OSError`: if it cannot be written to.
    """
    if not folder.exists():
        check_folder(folder.parent)
        return
    check_folder(folder)
    if any(folder.iterdir()) and not (folder / "profile.safetensors").is_file():
        raise ValueError(f"{folder} holds files that are no head profile: name a new folder.")
