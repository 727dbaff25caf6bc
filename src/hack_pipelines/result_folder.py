"""Folders that results are collected in, by several runs and several processes at once."""

import errno
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class OtherSettings(ValueError):
    """
    A folder has results that were made with other settings.

    Args:
        path (`Path`):
            The folder.
        name (`str`):
            The first setting that differs.
        earlier (`Any`):
            What it was.
        wanted (`Any`):
            What it would be now.
    """

    def __init__(self, path: Path, name: str, earlier: Any, wanted: Any):
        self.path, self.name, self.earlier, self.wanted = path, name, earlier, wanted
        self.fact = f"{path} holds results with other settings: {first_difference(name, earlier, wanted)}."
        super().__init__(f"{self.fact} Give the earlier value to go on with it, or name another folder.")


@dataclass(frozen=True)
class ResultFolder(ABC):
    """
    A folder with results that were all made with the same settings, which `settings.json` in it names.

    Processes and machines may share it, and any of them may be killed: every file appears under its name when it is
    complete.

    Args:
        path (`Path`):
            The folder; it is made where it is missing.
    """

    path: Path

    def __post_init__(self):
        self.path.mkdir(parents=True, exist_ok=True)

    def check_settings(self, settings: dict[str, Any]):
        """
        Note with which settings the results are made. What was noted before binds only where there are results.

        Args:
            settings (`dict[str, Any]`):
                Anything that JSON can hold, by name.

        Raises:
            `OtherSettings`: if there are results with others; the message names the first difference. It is a `ValueError`.
        """
        path = self.path / "settings.json"
        wanted = json.loads(json.dumps(settings))
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if earlier is not None and self.has_results():
            for name in (*wanted, *earlier):
                if earlier.get(name) != wanted.get(name) and not self.may_become(name, earlier, wanted):
                    raise OtherSettings(self.path, name, earlier.get(name), wanted.get(name))
        if earlier != wanted:
            write_json(path, wanted)

    @abstractmethod
    def has_results(self) -> bool:
        """Whether there is anything that was made with the settings."""

    def may_become(self, name: str, earlier: dict[str, Any], wanted: dict[str, Any]) -> bool:
        """Whether the setting `name` may change from what `earlier` has to what `wanted` has."""
        return False


def replace_file(path: Path, write: Callable[[Path], Any]):
    """
    Write a file elsewhere and move it to its name when it is complete, so that nobody reads half of it.

    Args:
        path (`Path`):
            The file.
        write (`Callable`):
            Writes to the path that it is given.

    Raises:
        `OSError`: if it cannot be written; the error names the file.
    """
    # Machines that share a folder have processes of the same number.
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        write(new)
        # Otherwise a power failure can leave the name without the contents.
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        if error.filename is None:
            # A full disk does not say whose.
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, value: Any):
    """Replace a JSON file."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def first_difference(name: str, earlier: Any, wanted: Any) -> str:
    """Where two settings, which differ, do so first: `inputs[3] was 'a cat' and is now 'a dog'`."""
    if isinstance(earlier, list) and isinstance(wanted, list):
        for index, (before, now) in enumerate(zip(earlier, wanted)):
            if before != now:
                return first_difference(f"{name}[{index}]", before, now)
        return f"{name} had {len(earlier)} entries and now has {len(wanted)}"
    return f"{name} was {shortened(earlier)} and is now {shortened(wanted)}"


def shortened(value: Any) -> str:
    """A setting in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
