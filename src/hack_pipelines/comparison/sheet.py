"""The sheet of pictures of a comparison: the same pictures at every budget, a row a method."""

from collections.abc import Sequence

import torch
from PIL import Image

from ..cli.sheet import Sheet
from .folder import FULL, FULL_RUN, ComparisonFolder, Run
from .table import Row


# Of small pictures four are shown together.
SMALL_SIDE, SHOWN = 128, 4


def picture_sheet(folder: ComparisonFolder, rows: Sequence[Row]) -> Image.Image:
    """
    The first pictures with every method and budget, beside those of the full cache.

    Args:
        folder ([`ComparisonFolder`]):
            The pictures.
        rows (`Sequence[dict]`):
            All runs, of which at least one is compressed.
    """
    name = "pictures" if "sampled" in rows[0]["sampling"].split() else "greedy_pictures"
    compressed = [row for row in rows if row["method"] != FULL]
    methods = sorted({row["method"] for row in compressed})
    budgets = sorted({row["budget"] for row in compressed}, reverse=True)
    full = mosaic(folder.first_pictures(FULL_RUN, name, SHOWN))
    blank = Image.new("RGB", full.size, "white")
    cells = {
        (row["method"], row["budget"]): mosaic(folder.first_pictures(Run(row["method"], row["budget"]), name, SHOWN))
        for row in compressed
    }
    pictures = [[full, *(cells.get((method, budget), blank) for budget in budgets)] for method in methods]
    return Sheet(pictures, left=methods, top=["full cache", *(f"{budget:g}" for budget in budgets)]).draw()


def mosaic(pictures: torch.Tensor) -> Image.Image:
    """Pictures `[count, 3, height, width]` in uint8: two by two where they are small, the first one alone otherwise."""
    if len(pictures) == SHOWN and pictures.shape[-1] <= SMALL_SIDE:
        rows = [torch.cat(tuple(pair), dim=2) for pair in pictures.split(2)]
        return to_image(torch.cat(rows, dim=1))
    return to_image(pictures[0])


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture `[3, height, width]` in uint8."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
