"""Draws what the cache holds scale by scale, and what a scale attends to, at several budgets.

python docs/figures/cache_by_scale.py
"""

from common import FAINT, INK, new_figure, open_pipeline, parse, save, seeded, styled
from matplotlib.figure import Figure

from hack_pipelines import CacheReport, HackVARPipeline
from hack_pipelines.schedule import Schedule


BUDGETS = (None, 0.3, 0.1)
COLOURS = {None: INK, 0.3: "#2f78b7", 0.1: "#d9791f"}


def reports(pipe: HackVARPipeline, prompt: str) -> dict[float | None, CacheReport]:
    """What the cache held at each budget for the same picture."""
    return {budget: pipe(prompt, generator=seeded(), kv_budget=budget).cache_report for budget in BUDGETS}


def original_tokens(schedule: Schedule) -> list[int]:
    """What the original holds after each scale: everything, the last scale too."""
    return [start + length for start, length in zip(schedule.prefixes, schedule.lengths)]


@styled
def draw(schedule: Schedule, found: dict[float | None, CacheReport]) -> Figure:
    """What is stored on the left, what is attended to on the right."""
    figure = new_figure(8, 3.6)
    stored, attended = figure.subplots(1, 2, sharey=True)
    scales = range(1, len(schedule) + 1)
    stored.plot(scales, original_tokens(schedule), color=FAINT, ls=":", marker="o", ms=4, label="the original")
    for budget, report in found.items():
        name = "lossless" if budget is None else f"kv_budget={budget}"
        # Nothing stays stored after the last scale.
        stored.plot(scales, [*report.tokens_by_step, 0], color=COLOURS[budget], marker="o", ms=4, label=name)
        attended.plot(scales, report.attended_by_step, color=COLOURS[budget], marker="o", ms=4)
    labels = [f"{height}x{width}" for height, width in schedule.sizes]
    for axes, title in ((stored, "stored after a scale"), (attended, "attended to while a scale is drawn")):
        axes.set_xticks(scales, labels)
        axes.set(title=title, xlabel="scale, by its token map")
        axes.grid(axis="y", alpha=0.25)
        axes.set_ylim(0)
    stored.set_ylabel("tokens a head, mean over layers and heads")
    stored.legend(loc="upper left")
    return figure


def main():
    """Draw the figure."""
    args = parse(__doc__, "concepts_cache.png", "a smiling cat")
    pipe = open_pipeline(args.model)
    found = reports(pipe, args.prompt)
    save(draw(pipe.schedule, found), args.output)
    for budget, report in found.items():
        print(f"{budget}: {report}")


if __name__ == "__main__":
    main()
