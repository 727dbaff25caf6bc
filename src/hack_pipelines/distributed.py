"""
One list of pictures drawn by many processes, on one machine or several, each of which may be killed at any time.

The unit of work is a batch, because a picture's last bits may depend on its batch. Batches are cut from the whole list
before it is known who draws which and what is there already, so pictures are the same for any number of processes and any
interruption. Processes talk to each other once, at the start: nobody waits for one that has died since.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .result_folder import ResultFolder, replace_file


if TYPE_CHECKING:
    from PIL.Image import Image


T = TypeVar("T")

LONGEST_NAME = 60
# What is read of a file's beginning and end to tell it from another one.
SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class Worker:
    """
    One of the processes of a launch.

    Args:
        index (`int`, *optional*, defaults to 0):
            Its number, from 0.
        count (`int`, *optional*, defaults to 1):
            How many there are.
        device (`str`, *optional*, defaults to `"cpu"`):
            The device that is its own.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether it is the one that speaks for all."""
        return self.index == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Its part of some work: every `count`-th entry, so that parts differ by one entry at most."""
        return list(work[self.index :: self.count])


def split_work(work: Sequence[T], device: str = "cpu") -> tuple[Worker, list[T]]:
    """
    Who this process is, and what it has to do. To be called once a process, by all processes of a launch.

    Args:
        work (`Sequence`):
            All there is to do. What the main process passes counts, since others may look later, when some is done already.
        device (`str`, *optional*, defaults to `"cpu"`):
            `"cpu"`, or `"cuda"` for a GPU of its own.

    Returns:
        `tuple[Worker, list]`: the process, and its part of the work.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=device == "cpu")
    try:
        [agreed] = broadcast_object_list([list(work)])
    finally:
        # From here on everybody works alone: with an open group the death of one could end or hold up others.
        state.destroy_process_group()
    own = str(state.device) if device == "cuda" and state.num_processes > 1 else device
    worker = Worker(state.process_index, state.num_processes, own)
    return worker, worker.share(agreed)


@dataclass(frozen=True)
class PictureFolder(ResultFolder):
    """
    A folder that gets a file for every picture of a list, and beside it a record of what it shows and how it was drawn.

    A picture appears under its name when it is complete, and after its record. `manifest.jsonl` holds all records in the
    order of the list; it is there if, and only if, the list is complete.

    Args:
        path (`Path`):
            The folder; it is made where it is missing.
        inputs (`Sequence`):
            Prompt or class of every picture, in a form that JSON can hold.
        batch_size (`int`, *optional*, defaults to 8):
            How many are drawn together; the last batch may be smaller.
        seed (`int`, *optional*, defaults to 0):
            Of the first picture; the next have the next ones.
    """

    inputs: Sequence[Any]
    batch_size: int = 8
    seed: int = 0

    @property
    def manifest(self) -> Path:
        """The file with all records."""
        return self.path / "manifest.jsonl"

    def start(self, settings: dict[str, Any]):
        """
        Note what is drawn and how. To be called before anything is drawn, and before the work is split.

        Args:
            settings (`dict[str, Any]`):
                All that a picture depends on besides what this object knows. When the folder is used again, they must be
                the same; the list may have become longer at its end, if no batch changes by that.

        Raises:
            `ValueError`: if the folder has pictures of another list, or with other settings.
        """
        own = {"batch_size": self.batch_size, "seed": self.seed, "inputs": list(self.inputs)}
        self.check_settings({**settings, **own})
        if self.missing():
            self.manifest.unlink(missing_ok=True)

    def has_results(self) -> bool:
        return bool(self._files()["json"])

    def may_become(self, name: str, earlier: dict[str, Any], wanted: dict[str, Any]) -> bool:
        """A list may grow at its end, by whole batches."""
        before, now = earlier.get("inputs"), wanted.get("inputs")
        if name != "inputs" or not before or not now or now[: len(before)] != before:
            return False
        rest = len(before) % self.batch_size
        if rest:
            raise ValueError(
                f"{self.path} holds a list of {len(before)} pictures. Its last batch has {rest} of {self.batch_size}, and "
                "would change if pictures were added to the list: draw the new ones into another folder."
            )
        return True

    def missing(self, indices: Iterable[int] | None = None) -> list[int]:
        """Those of some indices, or of all, whose picture or record is not there. Reads the whole folder's list of files."""
        files = self._files()
        wanted = range(len(self.inputs)) if indices is None else indices
        return [index for index in wanted if index not in files["png"] or index not in files["json"]]

    def unfinished_batches(self) -> list[range]:
        """Indices of every batch of which a picture is missing. It has to be drawn whole."""
        starts = sorted({index // self.batch_size * self.batch_size for index in self.missing()})
        return [range(start, min(start + self.batch_size, len(self.inputs))) for start in starts]

    def save(self, index: int, name: str, image: "Image", record: dict[str, Any]):
        """
        Keep a picture.

        Args:
            index (`int`):
                Its place in the list.
            name (`str`):
                What the file is named after, such as the prompt.
            image (`PIL.Image.Image`):
                The picture.
            record (`dict[str, Any]`):
                What it shows and how it was drawn.
        """
        seed = self.seed + index
        path = self.path / f"{index:05d}-{file_name(name)}-{seed}.png"
        # One line, as it stands in the manifest.
        line = json.dumps({"index": index, "file": path.name, "seed": seed, **record}, ensure_ascii=False) + "\n"
        replace_file(path.with_suffix(".json"), lambda new: new.write_text(line, encoding="utf-8"))
        replace_file(path, lambda new: image.save(new, format="PNG"))

    def write_manifest(self) -> bool:
        """
        Put all records into one file, if all pictures are there. Called by every process at its end, the last finds them.

        Returns:
            `bool`: whether this process has written it. Otherwise pictures are missing, or another process was faster.
        """
        if self.missing():
            return False
        lines = [path.read_text(encoding="utf-8") for _, path in sorted(self._files()["json"].items())]
        # Reading takes seconds where the list is long, and processes of equal shares end together.
        if self.manifest.is_file() and self.manifest.stat().st_size:
            return False
        replace_file(self.manifest, lambda new: new.write_text("".join(lines), encoding="utf-8"))
        return True

    def _files(self) -> dict[str, dict[int, Path]]:
        """The files of all pictures, `"png"`, and of all records, `"json"`."""
        found: dict[str, dict[int, Path]] = {"png": {}, "json": {}}
        with os.scandir(self.path) as entries:
            for entry in entries:
                match = re.fullmatch(r"(\d{5,})-.+\.(png|json)", entry.name)
                # A power failure can leave empty files, where a file system does not keep its promises.
                if match and entry.stat().st_size:
                    found[match[2]][int(match[1])] = Path(entry.path)
        return found


def fingerprint(folder: Path) -> str:
    """
    A short text that differs where the model in a folder does, made without reading all of it.

    Args:
        folder (`Path`):
            A model in diffusers layout.

    Returns:
        `str`: from names, sizes, beginnings and ends of all configurations and weights. Training changes every weight.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(size - SAMPLE_BYTES, 0))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def file_name(name: str) -> str:
    """A prompt or class name as part of a file name, cut after a word where it is long."""
    words = re.sub(r"\W+", "-", name).strip("-")
    # File systems count bytes.
    start = words.encode()[:LONGEST_NAME].decode(errors="ignore")
    if start != words and words[len(start)] != "-" and "-" in start:
        start = start[: start.rindex("-")]
    return start.strip("-") or "picture"
