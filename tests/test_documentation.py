"""What the documents promise: blocks that run and print what is shown, links that lead somewhere, known commands."""

import re
import shlex

import pytest

from hack_pipelines.cli import build_parser

from .documentation.pages import PAGES, ROOT, Block, check, name_of, parse
from .documentation.reader import Reader, is_slow
from .documentation.stand_ins import provide
from .hub_server import HubServer


# Blocks that no test runs, a page each: another one has to be added here, in sight of who reviews it.
NOT_RUN: dict[str, int] = {
    "README.md": 1,
    "CONTRIBUTING.md": 2,
    "docs/adding-a-method.md": 3,
    "docs/command-line.md": 1,
    "docs/comparison.md": 1,
    "docs/converting.md": 3,
    "docs/diffusers.md": 2,
    "docs/faq.md": 1,
    "docs/hub.md": 1,
    "docs/many-gpus.md": 4,
    "docs/quick-start.md": 1,
    "docs/web-page.md": 2,
    "examples/many_gpus/README.md": 2,
    "examples/train_demo/README.md": 3,
}
PROGRAM = re.compile(r"(?:^|\s)(?:hack-pipelines|-m hack_pipelines\.cli)\s+(.+)$")
SCRIPT = re.compile(r"\bpython ((?:benchmarks|examples)/\S+\.py)(.*)$")


def with_blocks(pages: list) -> list:
    return [page for page in pages if "```" in page.read_text()]


def read(page, folder, hub: HubServer, monkeypatch, slow: bool):
    blocks = parse(page)
    check(blocks)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    provide("".join(block.text for block in blocks if not block.mark), hub, folder)
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    Reader(folder, environment).read(blocks, slow)


@pytest.mark.parametrize("page", with_blocks(PAGES), ids=name_of)
def test_page_runs_as_a_reader_would_paste_it(page, hub, tmp_path, monkeypatch):
    read(page, tmp_path, hub, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in with_blocks(PAGES) if any(map(is_slow, parse(page)))], ids=name_of)
def test_page_runs_with_its_slow_commands(page, hub, tmp_path, monkeypatch):
    read(page, tmp_path, hub, monkeypatch, slow=True)


def test_blocks_that_are_not_run_are_counted():
    counts = {name_of(page): sum(block.mark == "not run" for block in parse(page)) for page in PAGES}
    assert {name: count for name, count in counts.items() if count} == NOT_RUN


def commands_of(blocks: list[Block]) -> list[tuple[str, str]]:
    """Place and text of every command, those of slow and marked blocks too."""
    shells = [block for block in blocks if block.language in ("bash", "console")]
    return [(block.place, command.split(" #")[0]) for block in shells for command, _ in block.commands()]


@pytest.mark.parametrize("page", with_blocks(PAGES), ids=name_of)
def test_commands_are_understood(page):
    for place, command in commands_of(parse(page)):
        program, script = PROGRAM.search(command), SCRIPT.search(command)
        if program:
            words = [
                word for word in shlex.split(re.split(r" (?:&&|\|\||;|>|\||&)|;", program[1])[0]) if word != "..."
            ]
            try:
                build_parser().parse_args(words)
            except SystemExit as error:
                # Help and versions leave this way too.
                assert not error.code, f"{place}: the command line does not know {command!r}"
        if script:
            source = (ROOT / script[1]).read_text()
            for option in re.findall(r"(?<!\S)--[\w-]+", script[2]):
                assert option in source or "main(" in source, f"{place}: {script[1]} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target} is not there"
