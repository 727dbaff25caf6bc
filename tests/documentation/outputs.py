"""Output that a page shows against output that was made."""

import re
from difflib import unified_diff

from .pages import PageError


# What differs from run to run or from machine to machine, and what both sides have in its place. Nothing else may differ.
VARYING = (
    # A commit, and the port of a server on this machine.
    (r"\b[0-9a-f]{40}\b", "COMMIT"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
    (r"\bpid: \d+", "pid: PID"),
    (r"\b(hack_pipelines|torch|diffusers|transformers|gradio) \d+\.[\w.+]+", r"\1 VERSION"),
    # Times: "3.1 s", "0.54 seconds", and the column of the demo's table that comes last.
    (r"\b\d+(\.\d+)? (s|ms|seconds|minutes)\b", r"TIME \2"),
    (r"(x less +)\d+\.\d\d$", r"\1TIME"),
    # Files that are compressed, or that name versions of libraries.
    (r"(\.png|README\.md|config\.json) +[\d,]+ bytes", r"\1 SIZE bytes"),
    # What the log puts before a message.
    (r"^\[?\d{4}-\d\d-\d\d[T ][\d:,.]+\]? ", "DATE "),
    (r" +$", ""),
)
ELLIPSIS = "..."
PROGRESS_BAR = re.compile(r"\r[^|]*\d+%\|")


def plain(text: str) -> list[str]:
    """Lines with names in the place of what varies, without progress bars and without empty lines around the whole."""
    lines = [line for line in text.split("\n") if not PROGRESS_BAR.search(line)]
    lines = "\n".join(lines).strip("\n").splitlines()
    for pattern, replacement in VARYING:
        lines = [re.sub(pattern, replacement, line) for line in lines]
    return lines


def same(shown: str, made: str) -> bool:
    """Whether what is shown was made; `...` on a line of its own is any lines, and at a line's end any characters."""
    pattern = ""
    for line in plain(shown):
        if line == ELLIPSIS:
            pattern += r"(?:[^\n]*\n)*"
        elif line.endswith(ELLIPSIS):
            pattern += re.escape(line.removesuffix(ELLIPSIS)) + r"[^\n]*\n"
        else:
            pattern += re.escape(line) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in plain(made))) is not None


def compare(place: str, shown: str, made: str):
    """Raises [`PageError`] with the difference unless what is shown was made."""
    if not same(shown, made):
        difference = "\n".join(unified_diff(plain(shown), plain(made), "shown", "made", lineterm="", n=2))
        raise PageError(f"{place}: the output is not what the page shows\n{difference}\n\nAll that was made:\n{made}")
