"""The tables of a comparison."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .folder import FULL


Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """
    A column of the Markdown table, which is left out where no row has a value.

    Args:
        title (`str`):
            Its heading.
        form (`str`):
            How a value is written, as in `format`.
        with_error (`bool`):
            Whether the standard error, in `<name>_se`, follows.
    """

    title: str
    form: str = ""
    with_error: bool = False


COLUMNS = {
    "method": Column("method"),
    "protocol": Column("protocol"),
    "budget": Column("budget", "g"),
    "keep": Column("keep", ".1%"),
    "bytes_allocated_peak": Column("bytes", ",d"),
    "metadata_bytes": Column("of them metadata", ",d"),
    "B": Column("B"),
    "b_N": Column("b_N", ".3f"),
    "b_c": Column("b_c", ".3f"),
    "eta_a": Column("eta_a", ".3f"),
    "peak_tokens": Column("peak tokens", ".1f"),
    "checkpoint_peak_tokens": Column("checkpoint peak", ".1f"),
    "nll_rise": Column("NLL rise", ".4f", True),
    "nll_rise_seen": Column("seen concepts", ".4f", True),
    "nll_rise_unseen": Column("unseen concepts", ".4f", True),
    "psnr": Column("PSNR, dB (full cache)", ".2f", True),
    "ssim": Column("SSIM (full cache)", ".4f", True),
    "lpips": Column("LPIPS (full cache)", ".4f", True),
    "clip": Column("CLIP score (prompts)", ".2f", True),
    "fid": Column("FID (reference images)", ".2f"),
    "agreement": Column("token agreement (full cache)", ".4f", True),
    "identical": Column("identical images", ".3f"),
    "first_differing_step": Column("first differing step", ".2f", True),
    "greedy_psnr": Column("greedy PSNR, dB (full cache)", ".2f", True),
    "greedy_ssim": Column("greedy SSIM (full cache)", ".4f", True),
    "greedy_lpips": Column("greedy LPIPS (full cache)", ".4f", True),
    "greedy_clip": Column("greedy CLIP score (prompts)", ".2f", True),
    "greedy_fid": Column("greedy FID (reference images)", ".2f"),
    "greedy_agreement": Column("greedy token agreement (full cache)", ".4f", True),
    "greedy_identical": Column("greedy identical images", ".3f"),
    "greedy_first_differing_step": Column("greedy first differing step", ".2f", True),
    "cuda_peak_delta": Column("CUDA peak", ",d"),
    "attention_flops": Column("attention FLOPs", ",d"),
    "seconds_per_image": Column("s per image", ".4f"),
}
# Measures that are shown first, on their own.
OVERVIEWS = ("nll_rise", "psnr", "agreement", "greedy_psnr", "greedy_agreement")
LESS_IS_BETTER = ("nll_rise",)
# What decides between methods at the same budget, the first that was measured; and whether less is better.
ORDER = {"nll_rise": True, "psnr": False, "greedy_psnr": False}


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The full cache, then large budgets before small ones, and at each the best method first."""
    name = next((name for name in ORDER if any(row.get(name) is not None for row in rows)), None)

    def place(row: Row) -> tuple:
        if row["method"] == FULL:
            return (-float("inf"), 0, "")
        value = 0 if name is None else row[name]
        return (-row["budget"], value if name is None or ORDER[name] else -value, row["method"])

    return sorted(rows, key=place)


def csv_text(rows: Sequence[Row]) -> str:
    """All that was measured, a row a run, with every column that any run has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return file.getvalue()


def overview(rows: Sequence[Row], name: str) -> list[str]:
    """
    One measure of all compressed runs, a row a method and a column a budget, the best method at the smallest budget that
    most methods have first; nothing where it was not measured.
    """
    values: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row["method"] != FULL and row.get(name) is not None:
            values.setdefault(row["method"], {})[row["budget"]] = row
    if not values:
        return []
    budgets = sorted({budget for own in values.values() for budget in own}, reverse=True)
    # The smallest of the budgets that most methods have.
    decisive = min(budgets, key=lambda budget: (-sum(budget in own for own in values.values()), budget))
    sign = 1 if name in LESS_IS_BETTER else -1

    def place(method: str) -> tuple:
        own = values[method].get(decisive)
        return (own is None, 0 if own is None else sign * own[name], method)

    lines = [f"{COLUMNS[name].title}, {'less' if sign > 0 else 'more'} is better:", ""]
    lines += [f"| method | {' | '.join(f'{budget:g}' for budget in budgets)} |", f"|{' --- |' * (len(budgets) + 1)}"]
    for method in sorted(values, key=place):
        cells = [
            cell(values[method][budget], name, COLUMNS[name]) if budget in values[method] else "" for budget in budgets
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def markdown_text(rows: Sequence[Row], skipped: Sequence[Row]) -> str:
    """What all rows share, the table, and what is missing from it and why."""
    columns = {
        name: column for name, column in COLUMNS.items() if any(row.get(name) not in (None, "") for row in rows)
    }
    lines = [shared(rows[0], rows), ""]
    for name in OVERVIEWS:
        lines += overview(rows, name)
    lines += [
        "Everything that was measured:",
        "",
        f"| {' | '.join(column.title for column in columns.values())} |",
        f"|{' --- |' * len(columns)}",
    ]
    lines += [f"| {' | '.join(cell(row, name, column) for name, column in columns.items())} |" for row in rows]
    if skipped:
        lines += ["", "Skipped:", ""]
        lines += [f"- {row['method']} at {row['budget']:g}: {row['skipped']}" for row in skipped]
    return "\n".join(lines) + "\n"


def shared(full: Row, rows: Sequence[Row]) -> str:
    """The settings of all runs, and what the columns mean."""
    versions = f"torch {full['torch']}, diffusers {full['diffusers']}, hack_pipelines {full['hack_pipelines']}"
    stored = next((row["kv_dtype"] for row in rows if row["kv_dtype"]), None)
    precision = f"{full['dtype']}, stored as {stored}," if stored else full["dtype"]
    parts = [f"Model {full['model']}, schedule {full['schedule']}, {precision} on {full['device']}, {versions}."]
    if full["nll_images"]:
        parts.append(
            f"NLL of {full['nll_images']} held-out pictures, {full['nll']:.4f} nats per token with the full cache; its "
            "rise is paired by picture."
        )
    if full["images"]:
        parts.append(
            f"{full['images']} pictures ({' and '.join(full['sampling'].split())}), seeds {full['seeds']}, in batches of "
            f"{full['batch_size']}; each shares its noise with that of the full cache."
        )
    rows_text = "with" if full["rows_per_image"] == 2 else "without"
    parts.append(
        f"± is the standard error over pictures. Bytes are of one image {rows_text} guidance, at the boundary between two "
        f"steps where they are most; `keep` is their share of {full['bytes_all_tokens']:,}, all tokens in {full['dtype']}. "
        f"The original holds {full['bytes_full_original']:,} (all tokens, keys in float32), a lossless cache "
        f"{full['bytes_full_lossless']:,} (the tokens that a later step reads). `budget` is the fraction of all tokens that "
        "every method gets in bytes, `B` the tokens per head that it holds in them, `b_N` and `b_c` their share of all "
        "tokens and of those that a later step reads, `eta_a` the largest share of all tokens that a step attends to. `peak "
        "tokens` is the most that a head holds between two steps, a mean over layers and heads; `checkpoint peak` the most "
        "after any layer of a step, when the layers behind it still hold what they did before."
    )
    return " ".join(parts)


def cell(row: Row, name: str, column: Column) -> str:
    """One entry of the table, empty where there is nothing."""
    value = row.get(name)
    if value is None:
        return ""
    text = format(value, column.form)
    error = row.get(f"{name}_se") if column.with_error else None
    return text if error is None else f"{text} ± {format(error, column.form)}"
