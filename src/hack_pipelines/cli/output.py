"""Where finished pictures go."""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL.Image import Image


LONGEST_CAPTION = 100
LONGEST_NAME = 60


@dataclass
class PictureWriter:
    """
    Saves pictures to one file, as a sheet if they are several, or to a folder, one file each as soon as it is there.

    A context manager: pictures that are finished are saved also when an error or interrupt ends the drawing.

    Args:
        output (`Path`):
            The one file.
        folder (`Path`, *optional*):
            The folder, which is used instead when it is given.

    Raises:
        `ValueError`: if `output` is no name of a picture.
        `OSError`: if the place cannot be written to.
    """

    output: Path
    folder: Path | None = None
    images: "list[Image]" = field(init=False, default_factory=list)
    captions: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        if self.folder is not None:
            check_folder(self.folder)
        else:
            check_picture(self.output)

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, *error: object):
        if self.folder is None and self.images:
            self._sheet().save(self.output)
            print(f"{self.output}: {self.captions[0] if len(self.images) == 1 else f'{len(self.images)} pictures'}")

    def add(self, image: "Image", name: str, seed: int):
        """Take a finished picture of a prompt or class."""
        short = name if len(name) <= LONGEST_CAPTION else f"{name[: LONGEST_CAPTION - 3].rstrip()}..."
        caption = f"{short}, seed {seed}"
        if self.folder is not None:
            path = free_path(self.folder, f"{file_name(name)}-{seed}")
            image.save(path)
            print(f"{path}: {caption}")
            return
        self.images.append(image)
        self.captions.append(caption)

    def _sheet(self) -> "Image":
        from .sheet import Sheet

        if len(self.images) == 1:
            return self.images[0]
        columns = math.ceil(math.sqrt(len(self.images)))
        return Sheet(in_parts(self.images, columns), below=in_parts(self.captions, columns)).draw()


def check_folder(folder: Path):
    """
    Make a folder that will be written to later, so that nothing is computed in vain.

    Raises:
        `OSError`: if it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_picture(path: Path):
    """
    Make sure that a picture can be written to a path later.

    Raises:
        `ValueError`: if the path is a folder or does not end as a picture's does.
        `OSError`: if the place cannot be written to.
    """
    from PIL import Image

    known = [extension for extension, name in Image.registered_extensions().items() if name in Image.SAVE]
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, where the name of a picture such as 'out.png' was expected.")
    if path.suffix.lower() not in known:
        raise ValueError(
            f"{str(path)!r} must end in .png, .jpg, .webp or the like, to say what kind of picture it is."
        )
    check_folder(path.parent)
    if path.exists():
        with path.open("ab"):
            pass


def in_parts(entries: Sequence, size: int) -> list:
    """Entries in parts of `size`, the last one shorter."""
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def file_name(name: str) -> str:
    """A prompt or class name as part of a file name, cut after a word where it is long."""
    words = re.sub(r"\W+", "-", name).strip("-")
    # File systems count bytes.
    start = words.encode()[:LONGEST_NAME].decode(errors="ignore")
    if start != words and words[len(start)] != "-" and "-" in start:
        start = start[: start.rindex("-")]
    return start.strip("-") or "picture"


def free_path(folder: Path, stem: str) -> Path:
    """The first of `stem.png`, `stem-2.png`, ... that does not exist, so that no earlier picture is lost."""
    path, count = folder / f"{stem}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.png"
    return path
