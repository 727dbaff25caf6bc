"""The command line `hack-pipelines`, one file a subcommand."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import app, calibrate, compare, convert, demo, generate, memory, methods, profile
from .errors import EXPECTED, INTERRUPTED, message_of, program, status_of


# Modules of subcommands import torch only when they run, so that help and typing mistakes are answered at once.
SUBCOMMANDS = (generate, demo, app, convert, calibrate, profile, methods, compare, memory)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            What comes after the program's name; that of the process by default.

    Returns:
        `int`: exit status: what the subcommand returned or 0, 2 after bad input, 1 after an error that the machine or the
        network is to blame for, 130 after an interrupt.
    """
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
    except KeyboardInterrupt as interrupt:
        # A subcommand may say what there is by now.
        print(": ".join((program(), "interrupted", *map(str, interrupt.args))), file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        if args.debug:
            raise
        print(f"{program()}: error: {message_of(error, args)}", file=sys.stderr)
        # Where 1 has a meaning of its own, the subcommand says what stands for all errors.
        return getattr(args, "status_of_errors", status_of(error))
    return status or 0


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
