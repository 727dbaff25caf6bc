"""A reader, who pastes the blocks of a page one after the other into Python and a shell, in one folder."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from hack_pipelines.cli import main
from hack_pipelines.methods import METHODS

from .outputs import compare, plain
from .pages import OUTPUT, ROOT, RUN, Block, PageError


# What a machine without an accelerator reads differently, and smaller runs that print the same. Nothing else is changed.
ON_THE_CPU = ((r"([\"'])cuda\1", r"\1cpu\1"), (r"--device cuda\b", "--device cpu"))
SMALLER = (
    ("--height 720 --width 720", "--height 96 --width 96"),
    # The quick shapes are too small for HeatKV.
    (r"(python benchmarks/(?:cache|memory)_shapes\.py)(?!.*heatkv)", r"\1 --quick"),
    ("--repeats 4 --methods", "--repeats 1 --methods"),
    (r"(python benchmarks/raster_quality\.py)", r"\1 --pictures 2"),
    (r"(python benchmarks/raster_steps\.py)", r"\1 --grid 12"),
    ("--images 256", "--images 2"),
    ("--budgets 0.5 0.3 0.2 0.1 0.05", "--budgets 0.3"),
)
# Blocks with these are run by the slow tests only: several processes, a compiler, or minutes.
SLOW = re.compile(
    r"\b(torchrun|accelerate launch|hack-pipelines compare|compile_repeated_blocks)\b|python (benchmarks/|examples/add_a_method)"
)
# What a clone has, and commands name.
CLONE = ("benchmarks", "docs", "examples", "src", "tests")
SHELL_SYNTAX = re.compile(r"[|&;<>$`*~]|^\w+=")
LONG_ENOUGH_SECONDS = 1200


def is_slow(block: Block) -> bool:
    return block.language in RUN and not block.mark and SLOW.search(block.text) is not None


class Reader:
    """
    Runs blocks and compares their output.

    Args:
        folder (`Path`):
            The current folder, which is as good as a clone.
        environment (`dict`, *optional*):
            Variables of the processes that it starts.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        self.folder = folder
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **(environment or {}), "PATH": programs, "OMP_NUM_THREADS": "1"}

    def read(self, blocks: list[Block], slow: bool = False):
        """
        Run the blocks in order. Raises [`PageError`] at the first that fails or prints something else than is shown.

        Args:
            blocks (`list`):
                Of one page, which [`check`] accepts.
            slow (`bool`):
                Whether to run slow blocks too, instead of passing them over with their output.
        """
        self.bring_what_is_named(blocks)
        with patch.dict(METHODS), patch.object(sys, "path", [*sys.path]), self.modules_of_the_folder():
            for block, after in zip(blocks, [*blocks[1:], None]):
                if block.mark or block.language in OUTPUT or is_slow(block) and not slow:
                    continue
                shown = after if after is not None and after.language in OUTPUT and not after.mark else None
                self.run(block, shown)

    @contextlib.contextmanager
    def modules_of_the_folder(self):
        """What is imported from the folder does not outlast it."""
        before = set(sys.modules)
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(self.folder):
                    del sys.modules[name]

    def bring_what_is_named(self, blocks: list[Block]):
        """Copies, since what a command writes may not end in the repository."""
        text = "".join(block.text for block in blocks if not block.mark)
        if re.search(rf"(?<![\w/])({'|'.join(CLONE)})/", text):
            for name in CLONE:
                shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, block: Block, shown: Block | None):
        if block.language == "python":
            made, failure = self.python(block)
            self.expect(block, shown, made, failure)
            return
        made, failure = "", None
        for command, own_output in block.commands():
            more, failure = self.shell(command)
            made += more
            if own_output is not None:
                self.expect(block, Block(block.page, block.line, "text", own_output), more, failure, command)
            elif failure and shown is None:
                raise failed(block, f"{command}\n{failure}\n{more}")
        if block.language == "bash":
            self.expect(block, shown, made, failure)

    def expect(self, block: Block, shown: Block | None, made: str, failure: str | None, command: str = ""):
        """What is shown was made; where nothing is shown, nothing failed."""
        if failure and (shown is None or not plain(shown.text)):
            raise failed(block, f"{command or block.text}\n{failure}\n{made}")
        if shown is not None:
            compare(shown.place, shown.text, made)

    def python(self, block: Block) -> tuple[str, str | None]:
        """What a block prints and, if it raises, the traceback; the last line of that counts as printed."""
        # The lines before the block are there so that tracebacks name the page's lines.
        code = "\n" * (block.line - 1) + adapted(block.text)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(ROOT / block.page), "exec"), self.namespace)
        except Exception as error:
            printed.write(traceback.format_exception_only(error)[-1])
            return printed.getvalue(), traceback.format_exc()
        return printed.getvalue(), None

    def shell(self, command: str) -> tuple[str, str | None]:
        """Both outputs of a command and, if it fails, its status. Plain commands are run in this process, which is faster."""
        command = adapted(command)
        words = shlex.split(command, comments=True)
        if not SHELL_SYNTAX.search(re.sub(r"'[^']*'|\"[^\"$`]*\"", "", command.split(" #")[0])):
            if words[0] == "hack-pipelines":
                return captured(lambda: main(words[1:]))
            if words[0] == "python" and words[1].endswith(".py"):
                return captured(lambda: run_script(self.folder / words[1], words[2:]))
        process = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LONG_ENOUGH_SECONDS,
        )
        # As bytes, since reading text would turn the carriage returns of progress bars into ends of lines.
        return process.stdout.decode(), None if process.returncode == 0 else f"exit status {process.returncode}"


def adapted(text: str) -> str:
    for pattern, replacement in SMALLER if torch.cuda.is_available() else (*SMALLER, *ON_THE_CPU):
        text = re.sub(pattern, replacement, text)
    return text


def failed(block: Block, what: str) -> PageError:
    return PageError(f"{block.place}: this {block.language} block fails, and no output that follows says so\n{what}")


def captured(program: Callable[[], int | None]) -> tuple[str, str | None]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = program()
        except SystemExit as error:
            status = error.code
        except Exception:
            traceback.print_exc()
            status = 1
    return printed.getvalue(), f"exit status {status}" if status else None


def run_script(path: Path, arguments: list[str]):
    """As `python PATH ARGUMENTS`."""
    with patch.object(sys, "argv", [str(path), *arguments]), patch.object(sys, "path", [str(path.parent), *sys.path]):
        runpy.run_path(str(path), run_name="__main__")
