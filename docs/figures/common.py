"""What the figures of the pages have in common."""

import argparse
from io import BytesIO
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from hack_pipelines import HackVARPipeline


INK, FAINT = "#20262e", "#6c7580"
# Light to dark, of the two kinds of heads as in the head map, and of neither.
BLUES, ORANGES, GREYS = ("#f4f8fb", "#16548e"), ("#fef8f1", "#aa4908"), ("#f6f7f8", "#20262e")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 130,
}
styled = rc_context(STYLE)
"""Decorates what draws a figure."""
IMAGES = Path(__file__).parents[1] / "images"


def parse(description: str | None, name: str, prompt: str | None = None) -> argparse.Namespace:
    """The arguments of a figure: where it goes, and what is drawn."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=IMAGES / name, help="PNG (default: the one of the page)")
    parser.add_argument("--model", default="demo", help="a text-to-image model (default: demo)")
    if prompt is not None:
        parser.add_argument("--prompt", default=prompt, help=f"what to draw (default: {prompt!r})")
    return parser.parse_args()


def open_pipeline(model: str) -> HackVARPipeline:
    """A model without progress bars."""
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    """The random numbers of a picture."""
    return torch.Generator().manual_seed(seed)


def ramp(colours: tuple[str, str]) -> LinearSegmentedColormap:
    """A colour map from light to dark."""
    return LinearSegmentedColormap.from_list("ramp", colours)


def new_figure(width: float, height: float) -> Figure:
    """A figure in the style of the pages; sizes in inches, 8 of which are the width of a page."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


@styled
def save(figure: Figure, path: Path, colours: int | None = None):
    """Write a figure, and say so; photographs in few colours are a third as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer)
    picture = Image.open(buffer).convert("RGB")
    if colours is not None:
        picture = picture.quantize(colours, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(path.name)
