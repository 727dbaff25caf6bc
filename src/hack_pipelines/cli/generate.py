"""`hack-pipelines generate`: pictures of prompts or classes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    Family,
    add_model_arguments,
    add_prompts_file_argument,
    check_method,
    family_of,
    load_pipeline,
    parse_budget,
    parse_seed,
    positive_int,
    read_prompts_file,
    seeded,
)
from .output import PictureWriter, in_parts


if TYPE_CHECKING:
    from ..pipelines import HackVARPipelineOutput


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="draw pictures",
        description="Draw pictures of prompts or classes, keeping as much of the key/value cache as the budget allows.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="PROMPT_OR_CLASS",
        help="what to draw: a prompt for a text-to-image model; name or id for a class-conditional one, where -1 is no "
        "class and without any each seed draws one",
    )
    add_prompts_file_argument(parser)
    parser.add_argument(
        "--num-images", type=positive_int, default=1, metavar="N", help="pictures of each (default: 1)"
    )
    parser.add_argument("--seed", type=parse_seed, default=0, help="of the first picture, the next have the next ones")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="drawn at a time (default: 8)")
    add_output_arguments(parser)
    add_cache_arguments(parser)
    add_sampling_arguments(parser)
    add_text_arguments(parser)
    add_class_arguments(parser)
    add_model_arguments(parser)
    return parser


def add_output_arguments(parser: argparse.ArgumentParser):
    """Where pictures go."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help="file; several pictures make a sheet (default: out.png)",
    )
    output.add_argument(
        "--output-dir", type=Path, metavar="FOLDER", help="one file a picture, named by prompt or class and seed"
    )


def add_cache_arguments(parser: argparse.ArgumentParser):
    """What is kept of the cache."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--kv-budget",
        type=parse_budget,
        metavar="BUDGET",
        help="what may stay stored: a fraction (0.3), tokens per head (100), bytes per picture (64MB), or none (default)",
    )
    group.add_argument(
        "--method", default="hack++", help="name[:option=value,...], see `hack-pipelines methods` (default: hack++)"
    )
    group.add_argument(
        "--attention-budget",
        type=parse_budget,
        metavar="BUDGET",
        help="what a step may attend to, written the same way, for methods that tell it from what is stored",
    )
    group.add_argument(
        "--kv-dtype", metavar="TYPE", help="int8 stores keys and values in 8 bits (default: as computed)"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser):
    """How tokens are drawn."""
    group = parser.add_argument_group("sampling", "what is left out is the model's own default")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="weight of prompt or class; 1 is no guidance")
    group.add_argument(
        "--top-k", type=int, metavar="N", help="tokens, or values of a bit, to draw from; 0 is all, 1 is greedy"
    )
    group.add_argument("--top-p", type=float, metavar="X", help="probability mass to draw from; 1 is all")
    group.add_argument("--temperature", type=float, metavar="X", help="larger is more varied, smaller more certain")


def add_text_arguments(parser: argparse.ArgumentParser):
    """What only text-to-image models take."""
    group = parser.add_argument_group("text-to-image models only")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance steers away from")
    group.add_argument(
        "--height", type=positive_int, metavar="N", help="in pixels; the nearest that the model draws is taken"
    )
    group.add_argument("--width", type=positive_int, metavar="N", help="likewise")


def add_class_arguments(parser: argparse.ArgumentParser):
    """What only class-conditional models take."""
    group = parser.add_argument_group("class-conditional models only")
    group.add_argument("--class", dest="classes", action="append", metavar="CLASS", help="one more class")
    group.add_argument(
        "--more-smooth", action="store_true", default=None, help="smoother pictures, from mixtures of tokens"
    )


def run(args: argparse.Namespace):
    """Draw the pictures, batch by batch."""
    check_method(args.method, args.kv_budget, args.attention_budget, args.kv_dtype)
    texts = args.inputs + (args.classes or []) + read_prompts_file(args.prompts_file)
    with PictureWriter(args.output, args.output_dir) as writer:
        family = family_of(load_pipeline(args))
        arguments = family.call_arguments(args)
        entries = choose_inputs(family, texts, args)
        numbered = list(enumerate(entries, start=args.seed))
        for batch in in_parts(numbered, args.batch_size):
            output = draw(family, arguments, batch)
            for (seed, entry), image in zip(batch, output.images):
                writer.add(image, family.name(entry), seed)
    print(f"cache per picture: {output.cache_report}")


def choose_inputs(family: Family, texts: list[str], args: argparse.Namespace) -> list[int | str]:
    """Prompts or class ids of all pictures."""
    if not texts:
        return family.choose(range(args.seed, args.seed + args.num_images))
    return [entry for entry in family.parse(texts) for _ in range(args.num_images)]


def draw(family: Family, arguments: dict[str, Any], batch: list[tuple[int, int | str]]) -> "HackVARPipelineOutput":
    """Draw a batch of seeds and inputs."""
    import torch

    try:
        return family.pipe([entry for _, entry in batch], generator=seeded(seed for seed, _ in batch), **arguments)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"The device is out of memory with {len(batch)} pictures at a time: use a smaller `--batch-size` or "
            "`--kv-budget`, or `--dtype bf16`."
        ) from error
