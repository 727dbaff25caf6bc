"""Draws which tokens of one picture are still stored when its last scale is drawn.

python docs/figures/kept_tokens.py
"""

import torch
from common import BLUES, ORANGES, new_figure, open_pipeline, parse, ramp, save, seeded, styled
from matplotlib.figure import Figure

from hack_pipelines import HackVARPipeline, HeadGroupCache
from hack_pipelines.schedule import Schedule


BUDGETS = (0.3, 0.1)
KINDS = {"contextual": BLUES, "structural": ORANGES}


def held_counts(cache: HeadGroupCache) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which tokens each head of a running picture holds, `[layers, heads, N_c]`, true where it does, of the row with the
    prompt; and whether each head is contextual, `[layers, heads]`.
    """
    heads = sum(len(group.heads) for group in cache.groups[0])
    held = torch.zeros(cache.num_layers, heads, cache.schedule.cacheable, dtype=torch.bool)
    contextual = torch.zeros(cache.num_layers, heads, dtype=torch.bool)
    for layer, groups in enumerate(cache.groups):
        for group in groups:
            # As long as a group has lost nothing it stores no ids.
            everything = torch.arange(group.held.key[0].shape[2]).expand(len(group.heads), -1)
            ids = group.held.ids[0][0].squeeze(-1).long() if group.held.ids else everything
            index = torch.tensor(group.heads)
            held[layer, index] = torch.zeros_like(held[layer, index]).scatter(-1, ids, True)
            contextual[layer, index] = group.label == "contextual"
    return held, contextual


def kept(pipe: HackVARPipeline, prompt: str, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`held_counts`] finds before the last scale of a picture."""
    settings = pipe.prepare_settings()
    cache = pipe.prepare_cache(kv_budget=budget, guided=settings.guided)
    found = []

    def look(pipe, step, size, tensors):
        if step == len(pipe.schedule) - 2:
            found.extend(held_counts(cache))
        return {}

    with torch.no_grad():
        condition = pipe.encode_inputs([prompt], settings.guided)
        pipe.draw_scales(condition, cache, settings, [seeded()], callback_on_step_end=look)
    return found[0], found[1]


@styled
def draw(schedule: Schedule, found: dict[float, tuple[torch.Tensor, torch.Tensor]]) -> Figure:
    """A row for each budget and kind of head, a map for each scale."""
    sizes, starts = schedule.sizes[:-1], schedule.prefixes[:-1]
    rows = [(budget, kind) for budget in found for kind in KINDS]
    figure = new_figure(8, 1.15 * len(rows) + 0.3)
    panels = figure.subplots(len(rows), len(sizes) + 2, width_ratios=[1.5, *(1 for _ in sizes), 0.08])
    for number, ((text, *maps, bar), (budget, kind)) in enumerate(zip(panels, rows)):
        held, contextual = found[budget]
        chosen = held[contextual if kind == "contextual" else ~contextual].float()
        text.axis("off")
        words = f"kv_budget={budget}\n{kind}\n{chosen.sum(-1).mean():.1f} of {schedule.cacheable}\ntokens a head"
        text.text(0, 0.5, words, va="center", transform=text.transAxes, fontsize=9)
        for axes, (high, wide), start in zip(maps, sizes, starts):
            share = chosen.mean(0)[start : start + high * wide].view(high, wide)
            picture = axes.imshow(share.numpy(), cmap=ramp(KINDS[kind]), vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(True)
            if number == 0:
                axes.set_title(f"{high}x{wide}")
        figure.colorbar(picture, cax=bar).set_ticks([0, 1], labels=["no head", "all heads"])
        bar.spines[:].set_visible(False)
    return figure


def main():
    """Draw the figure."""
    args = parse(__doc__, "concepts_kept.png", "a smiling cat")
    pipe = open_pipeline(args.model)
    save(draw(pipe.schedule, {budget: kept(pipe, args.prompt, budget) for budget in BUDGETS}), args.output)


if __name__ == "__main__":
    main()
