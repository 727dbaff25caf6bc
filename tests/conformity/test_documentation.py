"""The list in docs/diffusers.md is that of the tests."""

import ast
import re
from pathlib import Path


TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "diffusers.md"


def named_in(file: Path) -> set[str]:
    return {f"{file.name}::{node.name}" for node in ast.parse(file.read_text()).body if is_test(node)}


def is_test(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def test_every_row_has_a_test_and_every_test_a_row():
    named = set(re.findall(r"`(test_\w+\.py::test_\w+)`", PAGE.read_text()))
    here = named_in(TESTS / "conformity" / "test_pipelines.py") | named_in(TESTS / "conformity" / "test_models.py")
    elsewhere = set().union(*map(named_in, TESTS.glob("test_*.py")))
    # Files here go before files of the same name above.
    assert here <= named, here - named
    assert named <= here | elsewhere, named - here - elsewhere


def test_rows_have_three_cells():
    rows = re.findall(r"^\|.*test_\w+\.py::.*\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 50 and {row.count(" | ") for row in rows} == {2}
