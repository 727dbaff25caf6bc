"""`hack-pipelines generate`: pictures of classes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    add_model_arguments,
    check_method,
    class_name,
    load_pipeline,
    parse_budget,
    parse_class,
    parse_seed,
    positive_int,
    seeded,
)
from .output import PictureWriter, in_parts


if TYPE_CHECKING:
    from ..pipelines import HackVARClassPipeline, HackVARPipelineOutput


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="draw pictures",
        description="Draw pictures of classes, keeping as much of the key/value cache as the budget allows.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "classes", nargs="*", type=parse_class, metavar="CLASS", help="name or id; -1 is no class; none is any class"
    )
    parser.add_argument(
        "--class", dest="more", action="append", type=parse_class, default=[], metavar="CLASS", help="one more class"
    )
    parser.add_argument(
        "--num-images", type=positive_int, default=1, metavar="N", help="pictures of each (default: 1)"
    )
    parser.add_argument("--seed", type=parse_seed, default=0, help="of the first picture, the next have the next ones")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="drawn at a time (default: 8)")
    add_output_arguments(parser)
    add_cache_arguments(parser)
    add_sampling_arguments(parser)
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
        "--output-dir", type=Path, metavar="FOLDER", help="one file a picture, named by class and seed"
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
    group.add_argument("--method", default="hack", help="see `hack-pipelines methods` (default: hack)")


def add_sampling_arguments(parser: argparse.ArgumentParser):
    """How tokens are drawn."""
    group = parser.add_argument_group("sampling", "what is left out is the model's own default")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="weight of the class; 1 is no guidance")
    group.add_argument("--top-k", type=int, metavar="N", help="tokens to draw from; 0 is all, 1 is greedy")
    group.add_argument("--top-p", type=float, metavar="X", help="probability mass to draw from; 1 is all")
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="default: 1")
    group.add_argument("--more-smooth", action="store_true", help="smoother pictures, from mixtures of tokens")


def run(args: argparse.Namespace):
    """Draw the pictures, batch by batch."""
    check_method(args.method, args.kv_budget)
    with PictureWriter(args.output, args.output_dir) as writer:
        pipe = load_pipeline(args)
        labels = choose_classes(pipe, args)
        numbered = list(enumerate(labels, start=args.seed))
        for batch in in_parts(numbered, args.batch_size):
            output = draw(pipe, args, batch)
            for (seed, label), image in zip(batch, output.images):
                writer.add(image, class_name(pipe, label), seed)
    print(f"cache per picture: {output.cache_report}")


def choose_classes(pipe: "HackVARClassPipeline", args: argparse.Namespace) -> list[int]:
    """Class ids of all pictures; where no class was named, each picture's own seed draws one."""
    classes = args.classes + args.more
    generators = seeded(range(args.seed, args.seed + args.num_images))
    ids = pipe.encode_class_labels(classes or None, args.num_images, generators).tolist()
    return [-1 if entry == pipe.transformer.config["num_classes"] else entry for entry in ids]


def draw(
    pipe: "HackVARClassPipeline", args: argparse.Namespace, batch: list[tuple[int, int]]
) -> "HackVARPipelineOutput":
    """Draw a batch of seeds and class ids."""
    import torch

    try:
        return pipe(
            [label for _, label in batch],
            guidance_scale=args.guidance_scale,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            more_smooth=args.more_smooth,
            generator=seeded(seed for seed, _ in batch),
            kv_budget=args.kv_budget,
            method=args.method,
        )
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"The device is out of memory with {len(batch)} pictures at a time: use a smaller `--batch-size` or "
            "`--kv-budget`, or `--dtype bf16`."
        ) from error
