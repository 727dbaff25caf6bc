"""`hack-pipelines generate`: pictures of prompts or classes."""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..distributed import PictureFolder, Worker, fingerprint, split_work
from .backends import BACKENDS
from .families import COMMON_ARGUMENTS, FAMILIES, Family
from .options import (
    DTYPES,
    add_model_arguments,
    add_prompts_file_argument,
    add_size_arguments,
    check_device_map,
    check_method,
    choose_device,
    parse_budget,
    parse_seed,
    positive_int,
    read_prompts_file,
    seeded,
)
from .output import PictureWriter, check_folder, in_parts
from .progress import tell_share_done, tell_start, there, watched


if TYPE_CHECKING:
    from ..cache.report import CacheReport
    from ..integrations.next_token import NextTokenOutput
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
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="diffusers",
        help="library that the model is of: diffusers (default) for next-scale models, transformers for next-token ones: "
        "Janus, Emu3, Llama models of codes",
    )
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
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="one file a picture with its record; what is there already is not drawn again, and several processes of "
        "`torchrun` or `accelerate launch` share the work",
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
        "--method",
        help="name[:option=value,...], see `hack-pipelines methods` (default: hack++; of next-token models headkv_ar)",
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
    add_size_arguments(group)


def add_class_arguments(parser: argparse.ArgumentParser):
    """What only class-conditional models take."""
    group = parser.add_argument_group("class-conditional models only")
    group.add_argument("--class", dest="classes", action="append", metavar="CLASS", help="one more class")
    group.add_argument(
        "--more-smooth", action="store_true", default=None, help="smoother pictures, from mixtures of tokens"
    )


def run(args: argparse.Namespace):
    """Draw the pictures, batch by batch."""
    backend = BACKENDS[args.backend]
    backend.check(args)
    args.method = backend.default_method if args.method is None else args.method
    check_method(args.method, args.kv_budget, args.attention_budget, args.kv_dtype, backend.methods())
    check_device_map(args)
    texts = args.inputs + (args.classes or []) + read_prompts_file(args.prompts_file)
    if args.output_dir is None:
        draw_file(args, texts)
    else:
        draw_folder(args, texts)


def draw_file(args: argparse.Namespace, texts: list[str]):
    """Draw all pictures into one file."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(
            f"{processes} processes were started, which cannot write one file together: give `--output-dir FOLDER`."
        )
    with PictureWriter(args.output) as writer:
        family = BACKENDS[args.backend].load(args, None)
        arguments = family.call_arguments(args)
        entries = choose_inputs(family, texts, args)
        numbered = list(enumerate(entries, start=args.seed))
        for batch in in_parts(numbered, args.batch_size):
            output = draw(family, arguments, batch)
            for (seed, entry), image in zip(batch, output.images):
                writer.add(image, family.name(entry), seed)
    print_reports(family.reports(output))


def draw_folder(args: argparse.Namespace, texts: list[str]):
    """Draw what a folder lacks, as one of perhaps several processes that share the work."""
    check_folder(args.output_dir)
    # Without any, each seed draws a class.
    given: list[str | None] = [*texts] or [None]
    typed = [text for text in given for _ in range(args.num_images)]
    folder = PictureFolder(args.output_dir, typed, args.batch_size, args.seed)
    try:
        draw_share(folder, args, texts)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"{there(folder)} are there; give the same command again to go on") from interrupt


def draw_share(folder: PictureFolder, args: argparse.Namespace, texts: list[str]):
    """Draw this process' part of what a folder lacks, and list the pictures if it is the last."""
    device = choose_device(args.device)
    folder.start(picture_settings(args, device))
    unfinished, listed = folder.unfinished_batches(), folder.manifest.exists()
    worker, batches = split_work(unfinished, device)
    if worker.is_main and unfinished:
        tell_start(folder, len(unfinished), worker.count, args.model)
    reports = draw_batches(folder, batches, worker, args, texts) if batches else {}
    if folder.write_manifest() or (worker.is_main and listed):
        print(f"{folder.path}: {len(folder.inputs)} pictures, listed in {folder.manifest.name}")
    elif folder.missing():
        tell_share_done(folder, worker)
    if worker.is_main:
        print_reports(reports)


def print_reports(reports: "dict[str, CacheReport]"):
    """What the caches of a batch held."""
    for name, report in reports.items():
        print(f"{name.replace('_', ' ')} per picture: {report}")


def picture_settings(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What pictures depend on besides their inputs and seeds, as far as it is known before the model is loaded."""
    import torch

    options = (*COMMON_ARGUMENTS, *(name for family in FAMILIES.values() for name in family.arguments))
    return {
        "model": args.model,
        "variant": args.variant,
        "fingerprint": fingerprint(BACKENDS[args.backend].find(args)),
        "head_profile": args.head_profile,
        "dtype": args.dtype or "fp32",
        "device": device,
        # Products on the CPU are summed up in parts, one a thread.
        "omp_num_threads": torch.get_num_threads() if device == "cpu" else None,
        **{name: getattr(args, name) for name in options},
    }


def draw_batches(
    folder: PictureFolder, batches: list[range], worker: Worker, args: argparse.Namespace, texts: list[str]
) -> "dict[str, CacheReport]":
    """Draw some batches, save those of their pictures that are missing, and tell what the caches held."""
    family = BACKENDS[args.backend].load(args, worker.device)
    family.pipe.set_progress_bar_config(disable=True)
    arguments = family.call_arguments(args)
    entries = choose_inputs(family, texts, args)
    common = common_record(family, arguments, args, worker.device)
    # Nobody else draws these, and looking again at every batch would take longer the more pictures there are.
    missing = set(folder.missing())
    for batch in watched(folder, batches, worker):
        output = draw(family, arguments, [(args.seed + index, entries[index]) for index in batch])
        images: Any = output.images
        for index in sorted(missing.intersection(batch)):
            name = family.name(entries[index])
            record = {
                family.input_name: entries[index],
                "name": name,
                "batch": [batch.start, batch.stop],
                **common,
                **{cache: asdict(report) for cache, report in family.reports(output).items()},
            }
            folder.save(index, name, images[index - batch.start], record)
    return family.reports(output)


def common_record(family: Family, arguments: dict[str, Any], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the records of all pictures of a process share."""
    import diffusers
    import torch
    import transformers

    on_gpu = torch.device(device).type == "cuda"
    return {
        "settings": family.resolved(arguments),
        "model": {
            "name": args.model,
            "variant": args.variant,
            "fingerprint": fingerprint(family.folder),
            "head_profile": args.head_profile or family.head_profile(arguments),
            "dtype": DTYPES[args.dtype or "fp32"],
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "threads": torch.get_num_threads(),
        "software": {
            "hack_pipelines": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def choose_inputs(family: Family, texts: list[str], args: argparse.Namespace) -> list[int | str]:
    """Prompts or class ids of all pictures."""
    if not texts:
        return family.choose(range(args.seed, args.seed + args.num_images))
    return [entry for entry in family.parse(texts) for _ in range(args.num_images)]


def draw(
    family: Family, arguments: dict[str, Any], batch: list[tuple[int, int | str]]
) -> "HackVARPipelineOutput | NextTokenOutput":
    """Draw a batch of seeds and inputs."""
    import torch

    try:
        return family.pipe([entry for _, entry in batch], generator=seeded(seed for seed, _ in batch), **arguments)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"The device is out of memory with {len(batch)} pictures at a time: use a smaller `--batch-size` or "
            "`--kv-budget`, or `--dtype bf16`."
        ) from error
