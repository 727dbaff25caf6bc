"""The plot of a comparison: quality against bytes. Needs matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec

from .folder import FULL
from .table import Row


AXES = {
    "nll_rise": "rise of NLL, nats per token",
    "psnr": "PSNR to the full cache's picture, dB",
    "greedy_psnr": "greedy PSNR to the full cache's picture, dB",
    "agreement": "token agreement with the full cache",
    "greedy_agreement": "greedy token agreement with the full cache",
}
NO_MATPLOTLIB = "quality.png is left out, because matplotlib is missing: `pip install 'hack_pipelines[plots]'`."
MARKERS = "os^vDPX*"
COLOURS = 20
# Nats per token.
SMALL_RISE = 0.02
# Of a logarithmic axis, times its largest value.
ROOM_ABOVE = 1.3


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def quality_plot(rows: Sequence[Row]):
    """
    The two sharpest measures that there are against the bytes that were stored, a line a method, with standard errors.

    Args:
        rows (`Sequence[dict]`):
            All runs.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    compressed = [row for row in rows if row["method"] != FULL]
    shown = [name for name in AXES if all(row.get(name) is not None for row in compressed)][:2]
    methods = sorted({row["method"] for row in compressed})
    ticks = sorted({row["bytes_asked"] / 2**20 for row in compressed})
    figure = Figure(figsize=(6 * len(shown) + 3, 5), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, name in zip(panels, shown):
        for number, method in enumerate(methods):
            points = sorted(
                (row["bytes_allocated_peak"] / 2**20, row[name], row[f"{name}_se"] or 0)
                for row in compressed
                if row["method"] == method
            )
            sizes, means, errors = zip(*points)
            axes.errorbar(
                sizes,
                means,
                errors,
                label=method,
                marker=MARKERS[number % len(MARKERS)],
                ms=4,
                lw=1,
                color=colormaps["tab20"](number % COLOURS),
                capsize=2,
            )
        axes.set(xlabel="stored at most, MiB per image", ylabel=AXES[name], xscale="log")
        if name == "nll_rise":
            # Rises differ by factors of ten; near nothing their ratio means nothing.
            axes.set_yscale("symlog", linthresh=SMALL_RISE)
            highest = max(row[name] + (row[f"{name}_se"] or 0) for row in compressed)
            lowest = min(row[name] for row in compressed)
            axes.set_ylim(min(-SMALL_RISE / 4, lowest), ROOM_ABOVE * max(SMALL_RISE, highest))
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure
