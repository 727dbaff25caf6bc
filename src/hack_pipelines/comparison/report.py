"""Tables, plot and sheet of all runs that a folder holds, whichever process made them."""

import sys

from ..result_folder import replace_file
from .folder import FULL, ComparisonFolder
from .plot import can_plot, quality_plot
from .sheet import picture_sheet
from .table import csv_text, markdown_text, ordered


def write_tables(folder: ComparisonFolder) -> str:
    """
    Write `results.csv` and `results.md`.

    Returns:
        `str`: the Markdown table; empty while the full cache was not measured.
    """
    rows = ordered(folder.rows())
    if not rows or rows[0]["method"] != FULL:
        return ""
    text = markdown_text(rows, folder.skipped())
    replace_file(folder.path / "results.csv", lambda new: new.write_text(csv_text(rows), encoding="utf-8"))
    replace_file(folder.path / "results.md", lambda new: new.write_text(text, encoding="utf-8"))
    return text


def write_plots(folder: ComparisonFolder):
    """Write `quality.png`, where matplotlib is there, and `pictures.png`, where pictures were drawn."""
    rows = ordered(folder.rows())
    if len(rows) < 2 or rows[0]["method"] != FULL:
        return
    if can_plot():
        figure = quality_plot(rows)
        replace_file(folder.path / "quality.png", lambda new: figure.savefig(new, dpi=150, format="png"))
    if rows[0]["images"]:
        sheet = picture_sheet(folder, rows)
        replace_file(folder.path / "pictures.png", lambda new: sheet.save(new, format="PNG"))


def write_reports(folder: ComparisonFolder) -> str:
    """
    Write all of them. Whatever goes wrong with a plot is told, but must not end runs that take hours.

    Returns:
        `str`: the Markdown table.
    """
    text = write_tables(folder)
    try:
        write_plots(folder)
    except Exception as error:
        print(f"The plots could not be drawn: {error!r}", file=sys.stderr)
    return text
