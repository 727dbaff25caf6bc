"""Arguments that several subcommands share, and what they stand for."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

    from ..integrations.next_token import NextTokenPipeline
    from ..methods import Method
    from ..pipelines import HackVARPipeline


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("auto", "cpu", "cuda")
DEVICE_MAPS = ("balanced",)
OFFLOADS = ("model", "group")
NULL_CLASS = -1


def parse_budget(text: str) -> float | int | str | None:
    """
    A budget as it is typed: `"none"`, a whole number of tokens, a fraction, or bytes such as `"64MB"`.

    Everything else stays a string, which the pipeline refuses in its own words.
    """
    if text.strip().lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_class(text: str) -> int | str:
    """A class as it is typed: digits are an id, everything else is a name."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def positive_int(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 but is {text!r}")
    return value


def parse_seed(text: str) -> int:
    """A seed that `torch.Generator` takes, for argparse."""
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1 but is {text!r}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, head_profile: bool = True):
    """Which model, where and in which precision."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME_OR_PATH",
        help='"demo" for a small text-to-image model inside the package (default), "demo-class" for one that draws classes, a '
        "folder or Hub repository, or an original repository",
    )
    group.add_argument(
        "--variant", help="model of an original repository, such as 2b or d16, or variant of the weight files"
    )
    group.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: fp32)")
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto (default) takes a GPU where there is one"
    )
    group.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the parts of the model over all GPUs of the machine, for models larger than one",
    )
    group.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="keep weights in main memory and bring them to the GPU when they are needed: one part of the model after the "
        "other (model), or layer by layer, which needs least and takes longest (group)",
    )
    if head_profile:
        group.add_argument(
            "--head-profile",
            metavar="PATH_OR_REPO",
            help="profile to use instead of the one that belongs to the model",
        )


def add_size_arguments(group: argparse._ActionsContainer):
    """The size of a picture."""
    nearest = "in pixels, such as 256, 512 or 1024; the nearest that the model draws is taken"
    group.add_argument("--height", type=positive_int, metavar="N", help=nearest)
    group.add_argument("--width", type=positive_int, metavar="N", help="likewise")


def add_prompts_file_argument(parser: argparse.ArgumentParser):
    """Prompts or classes from a file."""
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="prompts or classes, one a line; blank lines are skipped"
    )


def read_prompts_file(path: Path | None) -> list[str]:
    """
    Prompts or classes of a file, one a line; none where there is no file.

    Raises:
        `ValueError`: if it holds none, or no text.
        `OSError`: if it cannot be read.
    """
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"`--prompts-file` must be a text file in UTF-8, but {path} is none: {error}.") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"`--prompts-file` must hold a prompt or class a line, but {path} holds none.")
    return texts


def dtype_option(name: str | None) -> str:
    """How to type a choice of `--dtype` again, in an advice; nothing for the default."""
    return "" if name in (None, "fp32") else f" --dtype {name}"


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of a choice of `--dtype`."""
    import torch

    return None if name is None else getattr(torch, DTYPES[name])


def choose_device(name: str) -> str:
    """
    The device of a choice of `--device`.

    Raises:
        `ValueError`: if there is no such device.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("`--device cuda` was asked for, but torch sees no CUDA device: use `--device cpu`.")
    return ("cuda" if available else "cpu") if name == "auto" else name


def check_device_map(args: argparse.Namespace):
    """
    Refuse a device map that cannot be meant.

    Raises:
        `ValueError`: if a device or an offload is given as well, or several processes would each spread over the same GPUs.
    """
    if args.device_map is None:
        return
    if args.offload:
        raise ValueError(
            f"`--device-map {args.device_map}` keeps all weights on the GPUs: leave it out, or leave out `--offload {args.offload}`."
        )
    if args.device != "auto":
        raise ValueError(
            f"`--device-map {args.device_map}` chooses the devices itself: leave out `--device {args.device}`."
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(
            f"`--device-map {args.device_map}` spreads one model over all GPUs of a machine, but {processes} processes were "
            "started on this one: start one on each machine, or leave out `--device-map`."
        )


def load_pipeline(args: argparse.Namespace, device: str | None = None) -> "HackVARPipeline":
    """
    The pipeline that [`add_model_arguments`] describes. Progress bars show on terminals only.

    Args:
        args (`argparse.Namespace`):
            What was typed.
        device (`str`, *optional*):
            Where it goes; by default what `--device` says. A device map goes its own ways.
    """
    import torch

    from ..pipelines import HackVARPipeline

    check_device_map(args)
    device = device or choose_device(args.device)
    device_map = {} if args.device_map is None else {"device_map": args.device_map}
    quiet_unless_watched()
    pipe = HackVARPipeline.from_pretrained(
        args.model,
        args.variant,
        torch_dtype(args.dtype),
        head_profile=getattr(args, "head_profile", None),
        **device_map,
    )
    pipe.set_progress_bar_config(disable=None, leave=False)
    if args.offload and device == "cpu":
        print(
            f"`--offload {args.offload}` brings weights to a GPU, but none is used: it only takes time.",
            file=sys.stderr,
        )
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "group":
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level")
    return pipe if args.offload or device_map else pipe.to(device)


def load_next_token_pipeline(args: argparse.Namespace, device: str | None = None) -> "NextTokenPipeline":
    """As [`load_pipeline`], with `--backend transformers`."""
    from ..integrations.next_token import NextTokenPipeline

    device = device or choose_device(args.device)
    quiet_unless_watched()
    pipe = NextTokenPipeline.from_pretrained(args.model, torch_dtype(args.dtype))
    pipe.set_progress_bar_config(disable=None, leave=False)
    return pipe.to(device)


def quiet_unless_watched():
    """Bars of libraries show on terminals only."""
    import diffusers.utils.logging
    import transformers.utils.logging

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def check_method(
    method: str,
    budget: float | int | str | None,
    attention_budget: float | int | str | None = None,
    kv_dtype: str | None = None,
    methods: "Mapping[str, type[Method]] | None" = None,
):
    """
    Refuse what no model could make sense of, before one is loaded.

    Raises:
        `ValueError`: if there is no such method or storage type, or a budget is not written as one.
    """
    from ..cache.budget import TokenBytes, budget_tokens
    from ..cache.storage import get_storage
    from ..methods import METHODS, Geometry, get_method
    from ..schedule import Schedule

    get_method(method, METHODS if methods is None else methods)
    get_storage(kv_dtype)
    for name, value in (("kv_budget", budget), ("attention_budget", attention_budget)):
        if value is not None:
            # Only the form is looked at: whether the budget suffices is for the model to say.
            budget_tokens(value, Geometry(Schedule(((1, 1),)), 1, 1, 1), TokenBytes(1, 1), name)


def seeded(seeds: Iterable[int]) -> "list[torch.Generator]":
    """One generator a picture. They live on the CPU, so that a seed means the same picture on every device."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]
