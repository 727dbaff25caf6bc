"""Code blocks of the pages, and what each of them is: run, the output of the block before it, or marked."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TESTS_OF_EXAMPLES = ROOT / "tests" / "integrations" / "test_examples.py"
RUN = ("python", "bash", "console")
OUTPUT = ("text",)
MARK = re.compile(r"<!--\s*(not run|from):\s*(.*?)\s*-->", re.DOTALL)


class PageError(AssertionError):
    """A page that does not keep what it promises; the message names the page and the line."""


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    Args:
        page (`str`):
            The page's path from the root of the repository.
        line (`int`):
            Where the text begins in the page, from 1.
        language (`str`):
            What the fence says.
        text (`str`):
            What is between the fences.
        mark (`str`, *optional*):
            `"not run"` or `"from"`, where a comment before the fence says so.
        reason (`str`):
            The rest of that comment: why it is not run, or the file that it is a part of.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str | None = None
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[tuple[str, str | None]]:
        """Lines to type into a shell, and what the page shows after each; a `bash` block shows nothing by itself."""
        lines = self.text.splitlines()
        if self.language != "console":
            return [(line, None) for line in lines if line and not line.startswith("#")]
        if not lines or not lines[0].startswith("$ "):
            raise PageError(f"{self.place}: a console block begins with '$ ' and a command")
        starts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
        parts = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)])]
        return [(part[0][2:], "\n".join(part[1:])) for part in parts]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def parse(page: Path) -> list[Block]:
    """The blocks of a page in order. A fence or a mark that is lost in other text is an error."""
    text, name = page.read_text(), name_of(page)
    tokens = MarkdownIt().parse(text)
    blocks, fenced, marked = [], set(), set()
    for before, token in zip([None, *tokens], tokens):
        if token.type != "fence":
            continue
        first, end = token.map
        fenced |= {first + 1, end}
        mark = before is not None and before.type == "html_block" and MARK.fullmatch(before.content.strip())
        if mark:
            marked.add(before.map[0] + 1)
        kind, reason = mark.groups() if mark else (None, "")
        blocks.append(Block(name, first + 2, token.info.strip(), token.content, kind, reason))
    for number, line in enumerate(text.splitlines(), start=1):
        inside = any(block.line <= number < block.line + len(block.text.splitlines()) for block in blocks)
        if line.lstrip().startswith("```") and number not in fenced and not inside:
            raise PageError(f"{name}:{number}: a fence that Markdown does not see as one: check its indentation")
        if MARK.search(line) and number not in marked and not inside:
            raise PageError(f"{name}:{number}: a mark stands right before the block that it is about")
    return blocks


def check(blocks: list[Block]):
    """Raises [`PageError`] unless every block is run, the output of the block before it, or marked."""
    for before, block in zip([None, *blocks], blocks):
        if not block.language:
            raise PageError(f"{block.place}: a block has a language; output is 'text', a session is 'console'")
        if block.mark == "not run":
            if not block.reason:
                raise PageError(f"{block.place}: a mark says why the block is not run")
        elif block.mark == "from":
            check_part(block, blocks)
        elif block.language in OUTPUT:
            if before is None or before.mark or before.language not in RUN:
                raise PageError(f"{block.place}: output follows the block that makes it; mark whatever else this is")
        elif block.language not in RUN:
            raise PageError(f"{block.place}: {block.language!r} is not run here: mark the block, with the reason")


def check_part(block: Block, blocks: list[Block]):
    """Raises [`PageError`] unless the block is a part of the file that its mark names, and something runs this file."""
    file = ROOT / block.reason
    if not file.is_file():
        raise PageError(f"{block.place}: there is no file {block.reason!r}")
    runs = [other for other in blocks if other.language in ("bash", "console") and not other.mark]
    on_the_page = any(block.reason in command for other in runs for command, _ in other.commands())
    if not on_the_page and f'"{file.stem}"' not in TESTS_OF_EXAMPLES.read_text():
        raise PageError(
            f"{block.place}: neither a command of this page nor {TESTS_OF_EXAMPLES.name} runs {block.reason}"
        )
    part, whole = block.text.rstrip().splitlines(), file.read_text().splitlines()
    windows = (whole[start : start + len(part)] for start in range(len(whole) - len(part) + 1))
    if not any(dedented(window) == dedented(part) for window in windows):
        raise PageError(f"{block.place}: these are not lines of {block.reason}:\n{block.text}")


def dedented(lines: list[str]) -> list[str]:
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[depth:] for line in lines]
