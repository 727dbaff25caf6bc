"""Draws what one contextual and one structural head attend to while the last scale is drawn, and the map of all heads.

python docs/figures/head_types.py
"""

from dataclasses import dataclass

import torch
from common import BLUES, FAINT, ORANGES, new_figure, open_pipeline, parse, ramp, save, seeded, styled
from matplotlib.figure import Figure

from hack_pipelines import FullCache, HackVARPipeline
from hack_pipelines.schedule import Schedule


@dataclass
class Head:
    """
    One head at the last scale.

    Args:
        kind (`str`):
            `"contextual"` or `"structural"`.
        layer, index (`int`):
            Where it is.
        variance (`float`):
            Of its attention over queries, from the head profile.
        attention (`torch.Tensor`):
            `[queries, tokens]` of one picture; a query's row sums to 1.
    """

    kind: str
    layer: int
    index: int
    variance: float
    attention: torch.Tensor


class WatchedCache(FullCache):
    """Keeps the attention of all heads at the last scale, of the rows with the prompt."""

    def reset(self):
        super().reset()
        self.attention: list[torch.Tensor] = []

    def _attend(self, layer_idx, step, query, key, value, call):
        if step == len(self.schedule) - 1:
            keys = torch.cat((self.keys[layer_idx], key), dim=2)
            self.attention.append((query[0] @ keys[0].transpose(-1, -2) * call.scale).softmax(-1))
        return super()._attend(layer_idx, step, query, key, value, call)


def two_heads(pipe: HackVARPipeline, prompt: str) -> list[Head]:
    """The heads whose attention varies least and most over queries, by the head profile, in one picture."""
    settings = pipe.prepare_settings()
    cache = WatchedCache(pipe.schedule, pipe.geometry().num_layers, settings.guided)
    with torch.no_grad():
        pipe.draw_scales(pipe.encode_inputs([prompt], settings.guided), cache, settings, [seeded()])
    scores = pipe.head_profile.scores
    heads = []
    for kind, place in (("contextual", scores.argmin()), ("structural", scores.argmax())):
        layer, index = divmod(int(place), scores.shape[1])
        heads.append(Head(kind, layer, index, float(scores[layer, index]), cache.attention[layer][index]))
    return heads


@styled
def draw(schedule: Schedule, heads: list[Head]) -> Figure:
    """The attention matrix of each head, its columns grouped by scale."""
    figure = new_figure(8, 3.0 * len(heads) + 0.2)
    for axes, head in zip(figure.subplots(len(heads), 1), heads):
        # The square root lets weights be seen that are small but not nothing.
        shown = head.attention.sqrt().numpy()
        colours = ramp(BLUES if head.kind == "contextual" else ORANGES)
        picture = axes.imshow(shown, aspect="auto", cmap=colours, vmin=0, interpolation="nearest")
        for start in schedule.prefixes[1:]:
            axes.axvline(start - 0.5, color=FAINT, lw=0.6)
        middles = [start + (length - 1) / 2 for start, length in zip(schedule.prefixes, schedule.lengths)]
        # The columns of the first scales are too narrow for a name.
        labels = [f"{high}x{wide}" if high * wide >= 9 else "" for high, wide in schedule.sizes]
        axes.set_xticks(middles, labels)
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel=f"query, 1 to {len(shown)}")
        axes.set_yticks([0, len(shown) - 1], [1, len(shown)])
        axes.set_title(
            f"{head.kind}: layer {head.layer}, head {head.index}; variance over queries {head.variance:.2g}",
            loc="left",
        )
        bar = figure.colorbar(picture, ax=axes, pad=0.01)
        ticks = [weight for weight in (0.01, 0.05, 0.2, 0.5, 0.9) if weight**0.5 <= float(shown.max())]
        bar.set_ticks([weight**0.5 for weight in ticks], labels=[f"{weight:g}" for weight in ticks])
        bar.set_label("attention")
        bar.outline.set_visible(False)
    axes.set_xlabel("token attended to, by scale")
    return figure


def main():
    """Draw the figure."""
    args = parse(__doc__, "concepts_heads.png", "a smiling cat")
    pipe = open_pipeline(args.model)
    save(draw(pipe.schedule, two_heads(pipe, args.prompt)), args.output)
    head_map = args.output.with_name("concepts_head_map.png")
    pipe.head_profile.head_map().save(head_map, optimize=True)
    print(head_map.name)


if __name__ == "__main__":
    main()
