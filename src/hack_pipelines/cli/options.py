"""Arguments that several subcommands share, and what they stand for."""

import argparse
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

    from ..pipelines import HackVARClassPipeline


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("auto", "cpu", "cuda")
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
        help='"demo" for the small model inside the package (default), a folder or Hub repository in diffusers layout, '
        "or an original repository",
    )
    group.add_argument(
        "--variant", help="model of an original repository, such as d16, or variant of the weight files"
    )
    group.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: fp32)")
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto (default) takes a GPU where there is one"
    )
    if head_profile:
        group.add_argument(
            "--head-profile",
            metavar="PATH_OR_REPO",
            help="profile to use instead of the one that belongs to the model",
        )


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


def load_pipeline(args: argparse.Namespace) -> "HackVARClassPipeline":
    """The pipeline that [`add_model_arguments`] describes, on its device. Progress bars show on terminals only."""
    from diffusers.utils import logging

    from ..pipelines import HackVARClassPipeline

    device = choose_device(args.device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    pipe = HackVARClassPipeline.from_pretrained(
        args.model, args.variant, torch_dtype(args.dtype), head_profile=getattr(args, "head_profile", None)
    )
    pipe.set_progress_bar_config(disable=None, leave=False)
    return pipe.to(device)


def check_method(method: str, budget: float | int | str | None):
    """
    Refuse what no model could make sense of, before one is loaded.

    Raises:
        `ValueError`: if there is no such method, or the budget is not written as one.
    """
    from ..cache.budget import TokenBytes, budget_tokens
    from ..methods import Geometry, get_method
    from ..schedule import Schedule

    get_method(method)
    if budget is not None:
        # Only the form is looked at: whether the budget suffices is for the model to say.
        budget_tokens(budget, Geometry(Schedule(((1, 1),)), 1, 1, 1), TokenBytes(1, 1))


def seeded(seeds: Iterable[int]) -> "list[torch.Generator]":
    """One generator a picture. They live on the CPU, so that a seed means the same picture on every device."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def class_name(pipe: "HackVARClassPipeline", class_id: int) -> str:
    """What to call a class: the first of its names, or its number where the model has no names."""
    if class_id == NULL_CLASS:
        return "no class"
    names = pipe.config["id2label"].get(str(class_id))
    return names.split(",")[0].strip() if names else f"class {class_id}"
