"""The picture of a model's head types."""

import math

import torch
from PIL import Image, ImageDraw, ImageFont


INK, FAINT, PAPER = (32, 38, 46), (108, 117, 128), (255, 255, 255)
# From the cut outwards. Blue and orange stay apart for colour-blind eyes, and the dots tell the types without colour.
CONTEXTUAL_RAMP = ((214, 230, 242), (111, 168, 211), (22, 84, 142))
STRUCTURAL_RAMP = ((253, 231, 206), (243, 164, 83), (170, 73, 8))
MARGIN = 36
BAR_WIDTH = 18
LEGEND_HEIGHT = 52


def draw_head_map(scores: torch.Tensor, contextual: torch.Tensor, title: str, alpha: float) -> Image.Image:
    """
    A cell a head, layers across and heads down, coloured by its variance on a logarithmic scale around the cut.

    Args:
        scores (`torch.Tensor`):
            Variance of every head, `[layers, heads]`.
        contextual (`torch.Tensor`):
            Boolean `[layers, heads]`.
        title (`str`):
            Name of the model.
        alpha (`float`):
            Share of contextual heads, for the caption.
    """
    layers, heads = scores.shape
    cell = max(12, min(40, 880 // max(layers, heads)))
    colours = Colours(scores, contextual)
    left, top = MARGIN + 42, MARGIN + 74
    right, bottom = left + layers * cell, top + heads * cell
    bar_height = max(heads * cell, 160)
    # Room for the title and the legend also where there are few layers.
    heading = f"Head types of {title}"
    width = max(right + 130, MARGIN * 2 + round(font(22).getbbox(heading)[2]), 600)
    height = max(bottom + 56, top + bar_height + 24) + LEGEND_HEIGHT + MARGIN - 12
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 12), heading, fill=INK, font=font(22))
    subtitle = f"variance of attention over queries at the last scale; {alpha:.0%} of the heads contextual"
    draw.text((MARGIN, MARGIN + 20), subtitle, fill=FAINT, font=font(14))
    for layer in range(layers):
        for head in range(heads):
            corner = left + layer * cell, top + head * cell
            draw_cell(draw, corner, cell, colours(float(scores[layer, head])), bool(contextual[layer, head]))
    draw_axes(draw, (left, top), cell, layers, heads)
    draw_bar(draw, (right + 34, top), bar_height, colours)
    draw_legend(draw, (left, height - MARGIN + 12 - LEGEND_HEIGHT), contextual)
    return image


class Colours:
    """Colour of a variance: light at the cut, darker to either side, each side stretched over its own range."""

    def __init__(self, scores: torch.Tensor, contextual: torch.Tensor):
        positive = scores[scores > 0]
        # Zero has no logarithm, so heads that never vary share the colour of the smallest variance above it.
        self.floor = float(positive.min()) if positive.numel() else 1.0
        values = scores.clamp_min(self.floor)
        self.low, self.high = float(values.min()), float(values.max())
        if contextual.all():
            self.cut = self.high
        elif not contextual.any():
            self.cut = self.low
        else:
            self.cut = math.sqrt(float(values[contextual].max()) * float(values[~contextual].min()))

    def __call__(self, value: float) -> tuple[int, ...]:
        value = max(value, self.floor)
        below = value < self.cut or self.cut == self.high
        end = self.low if below else self.high
        span = math.log(end / self.cut)
        share = math.log(value / self.cut) / span if span else 0.0
        return blend(CONTEXTUAL_RAMP if below else STRUCTURAL_RAMP, share)

    def at(self, height: float) -> float:
        """The value at a height of the colour bar, from 0 at the bottom over the cut at 1/2 to 1 at the top."""
        if height < 0.5:
            return self.low * (self.cut / self.low) ** (2 * height)
        return self.cut * (self.high / self.cut) ** (2 * height - 1)


def blend(ramp: tuple[tuple[int, ...], ...], share: float) -> tuple[int, ...]:
    """The colour at a share, from 0 to 1, of a ramp."""
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    index = min(int(place), len(ramp) - 2)
    return tuple(
        round(first + (second - first) * (place - index)) for first, second in zip(ramp[index], ramp[index + 1])
    )


def draw_cell(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, colour: tuple[int, ...], contextual: bool
):
    """One head; a dot marks a contextual one."""
    x, y = corner
    draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
    if contextual:
        radius = max(2, cell // 9)
        middle_x, middle_y = x + (cell - 2) / 2, y + (cell - 2) / 2
        dark = sum(colour) < 390
        draw.ellipse(
            (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius), fill=PAPER if dark else INK
        )


def draw_axes(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, layers: int, heads: int):
    """Numbers of layers below and of heads to the left, from 0, as many as have room."""
    left, top = corner
    bottom = top + heads * cell
    step = next(count for count in (1, 2, 4, 5, 10, 20, 50) if count * cell >= 22)
    for layer in range(0, layers, step):
        middle = left + layer * cell + (cell - 2) / 2
        draw.text((middle, bottom + 6), str(layer), fill=FAINT, font=font(13), anchor="mt")
    for head in range(0, heads, step):
        middle = top + head * cell + (cell - 2) / 2
        draw.text((left - 8, middle), str(head), fill=FAINT, font=font(13), anchor="rm")
    draw.text((left + layers * cell / 2, bottom + 28), "layer", fill=INK, font=font(15), anchor="mt")
    label = Image.new("L", (60, 20))
    ImageDraw.Draw(label).text((30, 10), "head", fill=255, font=font(15), anchor="mm")
    label = label.rotate(90, expand=True)
    draw.bitmap((left - 50, top + heads * cell // 2 - label.height // 2), label, fill=INK)


def draw_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], height: int, colours: Colours):
    """The colour bar, with the smallest and largest variance and the cut between the types."""
    x, y = corner
    for line in range(height):
        value = colours.at(1 - (line + 0.5) / height)
        draw.line((x, y + line, x + BAR_WIDTH - 1, y + line), fill=colours(value))
    marks = ((0, f"{colours.high:.2g}"), (height // 2, f"cut {colours.cut:.2g}"), (height - 1, f"{colours.low:.2g}"))
    for line, text in marks:
        draw.line((x + BAR_WIDTH, y + line, x + BAR_WIDTH + 4, y + line), fill=FAINT)
        draw.text((x + BAR_WIDTH + 10, y + line), text, fill=FAINT, font=font(13), anchor="lm")


def draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], contextual: torch.Tensor):
    """What the two kinds of cells mean, and how many there are."""
    x, y = corner
    count = int(contextual.sum())
    entries = (
        (CONTEXTUAL_RAMP, True, f"contextual ({count}): all queries look at the same tokens"),
        (STRUCTURAL_RAMP, False, f"structural ({contextual.numel() - count}): follows position"),
    )
    for ramp, marked, text in entries:
        draw_cell(draw, (x, y), 20, ramp[1], marked)
        draw.text((x + 26, y + 9), text, fill=INK, font=font(14), anchor="lm")
        y += LEGEND_HEIGHT // 2


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow carries, at a size in pixels."""
    return ImageFont.load_default(size)
