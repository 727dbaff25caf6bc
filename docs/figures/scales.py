"""Draws how a picture comes about: the picture after every scale.

python docs/figures/scales.py
"""

from common import FAINT, new_figure, open_pipeline, parse, save, seeded, styled
from matplotlib.figure import Figure
from PIL import Image

from hack_pipelines import HackVARPipeline
from hack_pipelines.schedule import Schedule


PROMPTS = ("a smiling cat", "a red heart", "a green tree")


def pictures_by_scale(pipe: HackVARPipeline, prompt: str) -> list[Image.Image]:
    """The picture after every scale, decoded from the latents that have been summed so far."""
    pictures = []

    def keep(pipe, step, size, tensors):
        pictures.extend(pipe.postprocess(tensors["latents"], "pil"))
        return {}

    pipe(prompt, generator=seeded(), callback_on_step_end=keep)
    return pictures


@styled
def draw(schedule: Schedule, rows: dict[str, list[Image.Image]]) -> Figure:
    """A row a prompt, a column a scale."""
    figure = new_figure(8, 1.1 * len(rows) + 0.7)
    panels = figure.subplots(len(rows), len(schedule), squeeze=False)
    for number, (line, (prompt, pictures)) in enumerate(zip(panels, rows.items())):
        for step, (axes, picture) in enumerate(zip(line, pictures)):
            axes.imshow(picture.resize((128, 128), Image.Resampling.LANCZOS))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if number == 0:
                height, width = schedule.sizes[step]
                axes.set_title(f"scale {step + 1}\n{height} x {width}")
            if number == len(rows) - 1:
                tokens = schedule.prefixes[step] + schedule.lengths[step]
                axes.set_xlabel(f"{tokens} tokens" if tokens > 1 else "1 token", color=FAINT, fontsize=9)
        line[0].set_ylabel(prompt, fontsize=9)
    return figure


def main():
    """Draw the figure."""
    args = parse(__doc__, "concepts_scales.png")
    pipe = open_pipeline(args.model)
    rows = {prompt: pictures_by_scale(pipe, prompt) for prompt in PROMPTS}
    save(draw(pipe.schedule, rows), args.output, colours=256)


if __name__ == "__main__":
    main()
