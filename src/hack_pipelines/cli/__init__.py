"""The command line `hack-pipelines`, one file a subcommand."""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import app, calibrate, compare, convert, demo, generate, memory, methods, profile


# Modules of subcommands import torch only when they run, so that help and typing mistakes are answered at once.
SUBCOMMANDS = (generate, demo, app, convert, calibrate, profile, methods, compare, memory)
INTERRUPTED = 130
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            What comes after the program's name; that of the process by default.

    Returns:
        `int`: exit status: what the subcommand returned or 0, 2 after bad input, 130 after an interrupt.
    """
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        if args.debug:
            raise
        print(f"{program()}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return status or 0


def program() -> str:
    """The program's name before a message, with the number of the process where a launcher has started several."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return f"hack-pipelines, process {os.environ.get('RANK', 0)} of {processes}" if processes > 1 else "hack-pipelines"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="hack-pipelines",
        description="Visual autoregressive image generation with a compressed key/value cache.",
    )
    parser.add_argument("--version", action="version", version=f"hack_pipelines {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in SUBCOMMANDS:
        added = module.add_parser(subparsers)
        # Also after the command; suppressed there, since its default would undo a --debug before the command.
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser
