"""Where finished pictures go."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL.Image import Image


LONGEST_CAPTION = 100


@dataclass
class PictureWriter:
    """
    Saves pictures to one file, as a sheet if they are several.

    A context manager: pictures that are finished are saved also when an error or interrupt ends the drawing.

    Args:
        output (`Path`):
            The file.

    Raises:
        `ValueError`: if it is no name of a picture.
        `OSError`: if the place cannot be written to.
    """

    output: Path
    images: "list[Image]" = field(init=False, default_factory=list)
    captions: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        check_picture(self.output)

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, *error: object):
        if self.images:
            self._sheet().save(self.output)
            print(f"{self.output}: {self.captions[0] if len(self.images) == 1 else f'{len(self.images)} pictures'}")

    def add(self, image: "Image", name: str, seed: int):
        """Take a finished picture of a prompt or class."""
        short = name if len(name) <= LONGEST_CAPTION else f"{name[: LONGEST_CAPTION - 3].rstrip()}..."
        self.images.append(image)
        self.captions.append(f"{short}, seed {seed}")

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
