"""The web page, made with gradio."""

import html
import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..methods import METHODS
from .side_by_side import DEFAULT_BUDGET, MAX_PROMPT_CHARACTERS, Comparison, Drawing, SideBySide, method_names


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines import HackVARPipeline

try:
    import gradio as gr
    import pandas as pd
except ImportError as error:
    raise ImportError("The web page needs gradio: pip install 'hack_pipelines[app]'") from error


TITLE = "The same picture with less cache"
INTRODUCTION = (
    "A visual autoregressive model draws a picture scale by scale and keeps the keys and values of every scale. Here it draws one "
    "picture twice from the same seed: with all of them, and with no more than a budget allows."
)
NOTE = (
    "Bytes are measured from the tensors of one picture. The original keeps all tokens, with keys in float32; lossless leaves out "
    "those of the last scale, which nothing reads again. Both pictures are drawn for each click, one after the other."
)
SMALLEST_BUDGET = 0.02
# The largest whole number that a browser holds exactly is 2^53 - 1.
LARGEST_SEED = 2**32 - 1
# Visitors who may wait for their turn.
QUEUE_SIZE = 32
# Pictures lie in files until then.
KEPT_SECONDS = 3600
FULL, COMPRESSED, ALLOWED = "full cache", "with the budget", "budget"
# Later lines lie on earlier ones.
COLOURS = {ALLOWED: "#2563eb", FULL: "#71717a", COMPRESSED: "#ea580c"}
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
# Pictures of the small models fill their frames, too.
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.picture img {width: 100% !important; height: 100% !important; object-fit: contain !important}
.caption {font-size: var(--text-lg)}
.html-container {padding: 0 !important}
.facts dl {display: grid; grid-template-columns: auto auto; margin: 0}
.facts dt, .facts dd {margin: 0; padding: 4px 0; border-bottom: 1px solid var(--border-color-primary)}
.facts dd {text-align: right; font-variant-numeric: tabular-nums}
.note {color: var(--body-text-color-subdued); font-size: var(--text-sm)}
.notice {color: var(--error-text-color); overflow-wrap: anywhere}
"""


def launch(pipe: "HackVARPipeline", name: str, host: str | None = None, port: int | None = None):
    """
    Serve the page until the process is interrupted. The page asks nothing of any other server.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
        name (`str`):
            What the page calls it.
        host (`str`, *optional*):
            Address to listen at, `"0.0.0.0"` for all of the machine; by default that of the variable `GRADIO_SERVER_NAME`,
            else `"127.0.0.1"`.
        port (`int`, *optional*):
            By default that of `GRADIO_SERVER_PORT`, else the first that is free from 7860 on.

    Raises:
        `OSError`: if the port is taken.
        `ValueError`: if the model cannot draw from a text or a class.
    """
    page = make_page(pipe, name)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        quiet=True,
        prevent_thread_lock=True,
        # The theme's fonts are gradio's own files.
        theme=gr.themes.Default().set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
    )
    print(f"{url} is ready; Ctrl-C ends it", flush=True)
    page.block_thread()


def make_page(pipe: "HackVARPipeline", name: str) -> gr.Blocks:
    """
    The page of one model. Some pictures are drawn for it, so that no visitor is charged with what a first call sets up.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
        name (`str`):
            What the page calls it.

    Returns:
        `gradio.Blocks`
    """
    drawer = SideBySide(pipe)
    start = drawer.examples[0]
    drawer.compare(start)
    first = drawer.compare(start)
    where = f"Model: `{name}`, {str(pipe.transformer.dtype).removeprefix('torch.')}, on {pipe.device.type}."
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\n\n{INTRODUCTION}\n\n{where}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = add_controls(drawer, start)
                notice = gr.HTML(visible=False, elem_classes="notice", elem_id="notice")
            with gr.Column(scale=5, min_width=300):
                outputs = add_results(drawer, first)
        connect(drawer, controls, notice, outputs)
    return page.queue(max_size=QUEUE_SIZE)


@dataclass(frozen=True)
class Controls:
    """
    What a visitor sets.

    Args:
        inputs (`list`):
            Components for prompt or class, budget, method, storage in 8 bits, and seed.
        draw (`list`):
            Events that ask for a picture.
        examples (`gradio.Examples`):
            Fills in the prompt or class.
    """

    inputs: list[Any]
    draw: list[Any]
    examples: gr.helpers.Examples


def connect(drawer: SideBySide, controls: Controls, notice: gr.HTML, outputs: list[Any]):
    """Draw when a visitor asks for it, or chooses an example."""

    def draw(entry: str | int | None, budget: float, method: str, int8: bool, seed: float | None) -> list[Any]:
        try:
            if entry is None or seed is None:
                raise ValueError(f"The {'class' if entry is None else 'seed'} is missing.")
            compared = drawer.compare(entry, int(seed), budget, method, "int8" if int8 else None)
        except ValueError as error:
            message = f"Not drawn. {html.escape(str(error))}"
            return [gr.update(value=message, visible=True), *(gr.skip() for _ in outputs)]
        return [gr.update(visible=False), *results(compared)]

    filled_in = controls.examples.load_input_event
    # The pipeline draws one picture at a time, whatever asked for it.
    for listen, name in ((partial(gr.on, controls.draw), "draw"), (filled_in.then, "draw_example")):
        listen(
            draw,
            controls.inputs,
            [notice, *outputs],
            api_name=name,
            show_progress_on=[outputs[1], outputs[3]],
            concurrency_limit=1,
            concurrency_id="pipeline",
        )


def add_controls(drawer: SideBySide, start: int | str) -> Controls:
    """What a visitor sets, from top to bottom."""
    entry: gr.Dropdown | gr.Textbox
    labels, draw = None, []
    if drawer.classes:
        entry = gr.Dropdown(drawer.classes, value=start, label="Class", elem_id="entry")
        labels = [drawer.family.name(example) for example in drawer.examples]
    else:
        entry = gr.Textbox(str(start), label="Prompt", max_length=MAX_PROMPT_CHARACTERS, max_lines=4, elem_id="entry")
        draw.append(entry.submit)
    examples = gr.Examples([[example] for example in drawer.examples], entry, label="Examples", example_labels=labels)
    budget = gr.Slider(
        SMALLEST_BUDGET,
        1,
        DEFAULT_BUDGET,
        step=0.01,
        label="Budget",
        info="kv_budget: how much of the full cache may stay stored",
        elem_id="budget",
    )
    method = gr.Dropdown(
        method_names(), label="Method", info=method_summary(method_names()[0]), filterable=False, elem_id="method"
    )
    method.change(
        lambda name: gr.update(info=method_summary(name)), method, method, queue=False, show_progress="hidden"
    )
    int8 = gr.Checkbox(label="Store in 8 bits", info="kv_dtype=int8, for the picture with the budget", elem_id="int8")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
    button = gr.Button("Draw both", variant="primary", elem_id="draw")
    return Controls([entry, budget, method, int8, seed], [*draw, button.click], examples)


def add_results(drawer: SideBySide, first: Comparison) -> list[Any]:
    """What is shown of a comparison, in the order of [`results`]."""
    values = results(first)
    caption = gr.HTML(values[0], elem_classes="caption", elem_id="caption")
    with gr.Row():
        with gr.Column(min_width=280):
            full, full_facts = add_drawing("full", "Full cache", values[1], values[2])
        with gr.Column(min_width=280):
            compressed, compressed_facts = add_drawing("compressed", "With the budget", values[3], values[4])
    unit = chart_unit(first)
    chart = gr.LinePlot(
        values[5],
        x="scale",
        y="size",
        color="cache",
        color_map=COLOURS,
        sort=[str(number) for number in range(1, len(first.sizes))],
        title="Size of the cache after each scale",
        x_title="scale",
        y_title=f"{unit} stored",
        color_title=" ",
        x_label_angle=0,
        height=280,
        buttons=[],
        elem_id="chart",
    )
    gr.HTML(NOTE, elem_classes="note")
    return [caption, full, full_facts, compressed, compressed_facts, chart]


def add_drawing(name: str, label: str, image: "Image", costs: str) -> tuple[gr.Image, gr.HTML]:
    """A picture and below it what it cost."""
    # PNG keeps the pixels.
    picture = gr.Image(
        image,
        format="png",
        label=label,
        height=340,
        interactive=False,
        buttons=["download"],
        elem_classes="picture",
        elem_id=name,
    )
    return picture, gr.HTML(costs, elem_classes="facts", elem_id=f"{name}-facts")


def results(comparison: Comparison) -> list[Any]:
    """Values of the components of [`add_results`]."""
    how = f"{comparison.method}, kv_budget={comparison.kv_budget:g}"
    if comparison.kv_dtype is not None:
        how += f", {comparison.kv_dtype}"
    caption = f"{comparison.name}, seed {comparison.seed}: full cache and {how}"
    return [
        html.escape(caption),
        comparison.full.image,
        facts(comparison.full, comparison.total_tokens),
        comparison.compressed.image,
        facts(comparison.compressed, comparison.total_tokens),
        chart_data(comparison),
    ]


def facts(drawing: Drawing, total_tokens: int) -> str:
    """What a picture cost, as a list."""
    report = drawing.report
    stored = report.bytes_allocated_peak
    rows = {
        "Stored at most": f"{readable(stored)} ({stored:,} bytes)",
        "Less than the original": f"{report.bytes_full / stored:.2f} times",
        "Less than lossless": f"{report.bytes_full_cacheable / stored:.2f} times",
        "Tokens a head at most": f"{report.peak_tokens:.1f} of {total_tokens}",
        "Time": f"{drawing.seconds:.2f} s",
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in rows.items())}</dl>"


def chart_unit(comparison: Comparison) -> str:
    """The unit that suits the full cache, and so one model always."""
    largest = comparison.full.report.bytes_allocated_peak
    return next((unit for unit, size in UNITS.items() if largest >= 10 * size), "KiB")


def chart_data(comparison: Comparison) -> pd.DataFrame:
    """Bytes stored after each scale, and the budget, in [`chart_unit`]."""
    full, compressed = (each.report.bytes_by_step for each in (comparison.full, comparison.compressed))
    series = {ALLOWED: [comparison.allowed_bytes] * len(full), FULL: full, COMPRESSED: compressed}
    size = UNITS[chart_unit(comparison)]
    return pd.DataFrame(
        [
            {"scale": str(number), "size": stored / size, "cache": name}
            for name, values in series.items()
            for number, stored in enumerate(values, start=1)
        ]
    )


def readable(count: int) -> str:
    """Bytes in a unit that suits them."""
    unit = next((unit for unit, size in UNITS.items() if count >= size), "KiB")
    return f"{count / UNITS[unit]:.1f} {unit}"


def method_summary(name: str) -> str:
    """A method's first sentence."""
    return inspect.cleandoc(METHODS[name].__doc__ or "").split("\n\n")[0].replace("\n", " ")
