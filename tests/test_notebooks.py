"""The notebooks run from the top, and what is stored in them is what their cells give."""

import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from hack_pipelines.comparison import HeldOut
from hack_pipelines.methods import METHODS, register_method


FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_source(path, name):
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.id == name)


@pytest.fixture
def methods():
    """What a test registers is forgotten after it."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def assert_same_text(stored, text):
    """Words and whole numbers are equal; measured numbers may differ in rounding from processor to processor."""
    assert NUMBER.sub("#", stored) == NUMBER.sub("#", text)
    for old, new in zip(NUMBER.findall(stored), NUMBER.findall(text), strict=True):
        if "." in old or "." in new:
            assert float(new.replace(",", "")) == pytest.approx(float(old.replace(",", "")), rel=0.02, abs=0.005), text
        else:
            assert old == new, text


def assert_same_picture(stored, image):
    stored, image = (Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in (stored, image))
    # Fonts decide on a few pixels.
    assert image.size == pytest.approx(stored.size, rel=0.05)
    pixels = [np.asarray(picture.resize(stored.size), dtype=float) for picture in (stored, image)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2


def assert_same_output(stored, output):
    assert stored.output_type == output.output_type
    if stored.output_type == "stream":
        assert stored.name == output.name
        return assert_same_text(stored.text, output.text)
    assert stored.data.keys() == output.data.keys()
    for kind, data in stored.data.items():
        (assert_same_picture if kind.startswith("image/") else assert_same_text)(data, output.data[kind])


@every_notebook
def test_stored_outputs_are_those_of_a_run(path):
    stored = nbformat.read(path, as_version=4)
    executed = load_runner().run(path)
    for before, after in zip(code_cells(stored), code_cells(executed), strict=True):
        assert before.execution_count == after.execution_count
        assert len(before.outputs) == len(after.outputs), before.id
        for old, new in zip(before.outputs, after.outputs):
            assert_same_output(old, new)


@every_notebook
def test_what_is_stored_is_small_and_says_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 700_000
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    for cell in notebook.cells:
        assert not cell.metadata
        # Longer lines of code are cut where notebooks are shown.
        assert cell.cell_type == "markdown" or max(map(len, cell.source.splitlines())) <= 110, cell.id
        for output in cell.get("outputs", ()):
            assert not output.get("metadata") and output.get("name") != "stderr" and output.output_type != "error"
            texts = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
            assert not re.search(
                r"/(?:work|tmp|home|usr|root)/|\b0x[0-9a-f]{6}", json.dumps([texts, output.get("text")])
            )


@every_notebook
def test_links_lead_to_files(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (path.parent / target).exists(), target


def test_a_picture_that_changed_is_noticed():
    def encoded(level):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (level, level, level)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    assert_same_picture(encoded(100), encoded(101))
    with pytest.raises(AssertionError):
        assert_same_picture(encoded(100), encoded(104))


@pytest.mark.parametrize(
    "stored, text, same",
    [
        ("0.329 of 1,024 B", "0.331 of 1,024 B", True),
        ("0.329 of 1,024 B", "0.429 of 1,024 B", False),
        ("0.329 of 1,024 B", "0.329 of 1,025 B", False),
        ("0.329 of 1,024 B", "-0.329 of 1,024 B", False),
        ("all of it", "none of it", False),
    ],
)
def test_a_text_that_changed_is_noticed(stored, text, same):
    if same:
        assert_same_text(stored, text)
    else:
        with pytest.raises(AssertionError):
            assert_same_text(stored, text)


# -- the notebook on methods, piece by piece ---------------------------------------------------------------------------


@pytest.fixture
def cells(methods, tmp_path, monkeypatch):
    """The names that the first cells define, as if the notebook lay alone in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path, names = FOLDER / "add_a_method.ipynb", {"__name__": "__main__"}
    for cell in ("imports", "method"):
        source = re.sub(r"^%.*$", "", cell_source(path, cell), flags=re.MULTILINE)
        exec(compile(source, cell, "exec"), names)
    return path, names


def test_a_cell_with_a_method_can_be_run_again(cells, methods):
    path, names = cells
    first = names["KeyDiff"]
    assert methods["key_diff"] is first
    exec(cell_source(path, "method"), names)
    assert methods["key_diff"] is names["KeyDiff"] is not first


def test_another_class_cannot_take_a_name(cells):
    _, names = cells
    impostor = type("Impostor", (names["KeyDiff"],), {"name": "random"})
    with pytest.raises(ValueError, match="There is a method 'random' already, Random: choose another name."):
        register_method(impostor)
    with pytest.raises(ValueError, match="There is a method 'key_diff' already"):
        register_method(type("Impostor", (names["KeyDiff"],), {}))


def test_without_a_clone_the_model_draws_what_is_measured(cells):
    path, names = cells
    generators, _ = cell_source(path, "draw").split("\n\n\n", 1)
    helper, _ = cell_source(path, "held-out").split("\n\n\nheld_out =", 1)
    exec(f"{generators}\n\n\n{helper}", names)
    drawn = names["held_out_pictures"](names["pipe"], "demo_text_heldout", count=2)
    assert isinstance(drawn, HeldOut)
    assert drawn.tokens.shape == (2, 155, 12) and set(drawn.tokens.unique().tolist()) == {0, 1}
    assert drawn.inputs == names["pipe"].calibration_inputs(2)
