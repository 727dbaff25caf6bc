"""Sheets of pictures with labels, drawn with pillow alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont


MARGIN, GAP = 14, 6
FONT_SIZE, LINE_HEIGHT = 14, 18
LABEL_WIDTH = 150
BACKGROUND, INK, FAINT_INK = "#ffffff", "#1f2328", "#6e7781"
SMALLEST_SIDE = 128

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Lines = list[str]


@dataclass
class Sheet:
    """
    Pictures of one size as a table with labels.

    Args:
        rows (`Sequence[Sequence[PIL.Image.Image]]`):
            The pictures; the last row may be shorter.
        left (`Sequence[str]`, *optional*):
            A label for each row.
        top (`Sequence[str]`, *optional*):
            A heading for each column; what follows a line break is faint.
        below (`Sequence[Sequence[str]]`, *optional*):
            A caption for each picture.
    """

    rows: Sequence[Sequence[Image.Image]]
    left: Sequence[str] = ()
    top: Sequence[str] = ()
    below: Sequence[Sequence[str]] = ()
    font: Font = field(init=False)

    def __post_init__(self):
        self.font = ImageFont.load_default(FONT_SIZE)
        # Small pictures are enlarged by a whole number, so that they can be looked at.
        scale = max(1, SMALLEST_SIDE // self.rows[0][0].width)
        self.width, self.height = (side * scale for side in self.rows[0][0].size)
        self.labels = [wrap(text, self.font, LABEL_WIDTH) for text in self.left]
        # The heading itself, as many lines as it needs, and what is faint.
        self.headings = [(wrap(text.split("\n")[0], self.font, self.width), text.split("\n")[1:]) for text in self.top]
        self.captions = [[wrap(text, self.font, self.width) for text in row] for row in self.below]
        widest = max((self.font.getlength(line) for lines in self.labels for line in lines), default=-MARGIN)
        self.left_edge = MARGIN + round(widest) + MARGIN
        self.top_edge = MARGIN + block_height([name + faint for name, faint in self.headings])
        self.row_height = self.height + GAP + block_height([lines for row in self.captions for lines in row])

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and upper edge of a picture."""
        return self.left_edge + column * (self.width + GAP), self.top_edge + row * self.row_height

    def draw(self) -> Image.Image:
        """The sheet as a picture."""
        right, bottom = self.corner(len(self.rows), max(len(row) for row in self.rows))
        sheet = Image.new("RGB", (right - GAP + MARGIN, bottom - GAP + MARGIN), BACKGROUND)
        pen = ImageDraw.Draw(sheet)
        for row, pictures in enumerate(self.rows):
            for column, picture in enumerate(pictures):
                enlarged = picture.convert("RGB").resize((self.width, self.height), Image.Resampling.BICUBIC)
                sheet.paste(enlarged, self.corner(row, column))
        for column, (name, faint) in enumerate(self.headings):
            x = self.corner(0, column)[0] + self.width // 2
            self.write(pen, name, x, MARGIN, "ma", INK)
            self.write(pen, faint, x, MARGIN + len(name) * LINE_HEIGHT, "ma", FAINT_INK)
        for row, lines in enumerate(self.labels):
            y = self.corner(row, 0)[1] + (self.height - len(lines) * LINE_HEIGHT) // 2
            self.write(pen, lines, self.left_edge - MARGIN, y, "ra", INK)
        for row, captions in enumerate(self.captions):
            for column, lines in enumerate(captions):
                x, y = self.corner(row, column)
                self.write(pen, lines, x + self.width // 2, y + self.height + GAP // 2, "ma", INK)
        return sheet

    def write(self, pen: ImageDraw.ImageDraw, lines: Lines, x: int, y: int, anchor: str, ink: str):
        """Write lines below each other."""
        for index, line in enumerate(lines):
            pen.text((x, y + index * LINE_HEIGHT), line, fill=ink, font=self.font, anchor=anchor)


def block_height(blocks: Sequence[Lines]) -> int:
    """Height of the tallest block of lines and the gap after it; 0 where there is none."""
    return max((len(lines) * LINE_HEIGHT + GAP for lines in blocks), default=0)


def wrap(text: str, font: Font, width: int) -> Lines:
    """Lines of a text that are no wider than `width` pixels, as far as spaces and hyphens allow; its own breaks stay."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for piece in re.findall(r"\S+?(?:-|\s+|$)", paragraph):
            if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]
