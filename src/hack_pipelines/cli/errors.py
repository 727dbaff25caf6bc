"""What the command line says about an error, and the exit status that it ends with."""

import argparse
import errno
import os
import shlex

from ..result_folder import OtherSettings


FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
# What is wrong with a path that was typed. All else that the operating system reports may be gone at the next try.
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PATH_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
EXPECTED = (ValueError, TypeError, ImportError, OSError, MemoryError)


def program() -> str:
    """The program's name before a message, with the number of the process where a launcher has started several."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return f"hack-pipelines, process {os.environ.get('RANK', 0)} of {processes}" if processes > 1 else "hack-pipelines"


def status_of(error: Exception) -> int:
    """2 where the same command fails again, 1 where it may go better the next time."""
    if isinstance(error, OSError):
        return BAD_INPUT if isinstance(error, PATH_ERRORS) or error.errno in PATH_NUMBERS else FAILED
    return FAILED if isinstance(error, MemoryError) else BAD_INPUT


def message_of(error: Exception, args: argparse.Namespace) -> str:
    """An error in one line."""
    text = other_settings_text(error, args) if isinstance(error, OtherSettings) else str(error)
    return " ".join(text.split())


def other_settings_text(error: OtherSettings, args: argparse.Namespace) -> str:
    """How a folder that has results with other settings is gone on with, in terms of what can be typed."""
    name, earlier = error.name, error.earlier
    if name == "omp_num_threads":
        threads = "1 thread" if earlier == 1 else f"{earlier} threads"
        return (
            f"{error.path} was drawn with {threads} a process, here it is {error.wanted}, which changes last bits: set "
            f"OMP_NUM_THREADS={earlier} and give the command again."
        )
    if name == "fingerprint":
        return (
            f"{error.path} holds results of other files under the name {args.model}: weights, a configuration, or a head "
            "profile in the model's folder changed. Bring them back to go on with it, or name another folder."
        )
    if name == "inputs":
        return f"{error.fact} Give the earlier list to go on with it, or name another folder."
    if not hasattr(args, name):
        return str(error)
    option = f"--{name.replace('_', '-')}"
    if earlier is None:
        return f"{error.fact} Leave out `{option}` to go on with it, or name another folder."
    values = [] if earlier is True else earlier if isinstance(earlier, list) else [earlier]
    return f"{error.fact} Give `{shlex.join([option, *map(str, values)])}` to go on with it, or name another folder."
