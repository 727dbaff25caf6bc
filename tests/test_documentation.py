"""What the documents promise: snippets that run, links that lead somewhere, numbers that a file in the repository holds."""

import re
from pathlib import Path

import pytest

from hack_pipelines.cli import build_parser


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_first_python_of_the_readme_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "face.png").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_are_understood(page):
    parser = build_parser()
    for line in re.findall(r"^(?:\$ )?hack-pipelines (.+?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE):
        if re.match(r"[A-Z]|\w+\s{2,}", line):
            continue
        words = re.findall(r'"[^"]*"|\S+', line)
        parser.parse_args([word.strip('"') for word in words])
