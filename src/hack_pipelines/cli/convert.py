"""`hack-pipelines convert`: original checkpoints become a pipeline folder."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .families import ClassFamily, TextFamily
from .options import DTYPES, dtype_option, torch_dtype


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="turn original checkpoints into a pipeline folder",
        description="Turn the files that the original authors published into a folder in diffusers layout, one tensor at "
        "a time.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("transformer", type=Path, metavar="TRANSFORMER", help=".pth, .safetensors or folder of shards")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="the image tokenizer, likewise")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the new folder")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="JSON_FILE",
        help='{"transformer": {...}, "tokenizer": {...}} in the original\'s field names, for models of unusual shape',
    )
    parser.add_argument(
        "--text-encoder",
        metavar="REPO_OR_FOLDER",
        help="T5 encoder of a text-to-image model, saved into the folder (google/flan-t5-xl for Infinity)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: fp32)")
    parser.add_argument("--max-shard-size", default="1GB", metavar="SIZE", help="of a weight file (default: 1GB)")
    return parser


def run(args: argparse.Namespace):
    """Convert and say how to use the result."""
    config = None if args.config is None else read_json(args.config)
    from ..convert import convert_original

    folder = convert_original(
        args.transformer,
        args.tokenizer,
        args.output,
        config,
        torch_dtype(args.dtype),
        args.max_shard_size,
        progress=sys.stderr.isatty(),
        text_encoder=args.text_encoder,
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    print(advice(folder, args.dtype))


def advice(folder: Path, dtype: str | None) -> str:
    """What to do with a converted folder, whose weights are opened in float32 where nothing else is said."""
    # Classes of components by name; a pipeline that takes no text has no entry for its encoder, `[null, null]` is left out.
    text_encoder = read_json(folder / "model_index.json").get("text_encoder", "none needed")
    if text_encoder == [None, None]:
        return "it draws from text features only: convert with --text-encoder to draw from prompts"
    family = ClassFamily if text_encoder == "none needed" else TextFamily
    return f"draw with it: hack-pipelines generate --model {folder}{dtype_option(dtype)} {family.example}"


def read_json(path: Path) -> Any:
    """
    What a JSON file holds.

    Raises:
        `ValueError`: if it is no JSON.
        `OSError`: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
