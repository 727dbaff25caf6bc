"""What the cards of models and of head profiles share."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


CARD_NAME = "README.md"
SEAL = "<!-- Written by hack_pipelines {version}; {digest} tells whether it was edited since. -->"
SEAL_PATTERN = re.compile(r"<!-- Written by hack_pipelines \S+; (\w+) tells whether it was edited since\. -->\s*$")


def sealed_card(metadata: dict[str, Any], text: str) -> ModelCard:
    """
    A card that can be told from one that somebody edited.

    Args:
        metadata (`dict`):
            Of its YAML block; what is `None` is left out.
        text (`str`):
            Markdown below it.
    """
    from .. import __version__

    # From text, since the client's own way through a template needs Jinja2.
    content = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text.strip()}\n"
    seal = SEAL.format(version=__version__, digest=digest(content))
    return ModelCard(f"{content}\n{seal}\n")


def is_unedited(content: str) -> bool:
    """Whether a card is as [`sealed_card`] wrote it."""
    match = SEAL_PATTERN.search(content)
    return match is not None and match[1] == digest(content[: match.start()])


def digest(content: str) -> str:
    """Of all words, so that line ends of another system change nothing."""
    return hashlib.sha256(" ".join(content.split()).encode()).hexdigest()[:16]


def as_base_model(name: str | None) -> str | None:
    """A model as the metadata may name it: the Hub links models by repository, and refuses other names."""
    return name if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def results_text(folder: str | Path) -> str:
    """
    The section with results of a comparison.

    Args:
        folder (`str` or `Path`):
            What `hack-pipelines compare` left.

    Raises:
        `ValueError`: if there is no finished comparison.
    """
    from ..comparison.folder import FULL, ComparisonFolder
    from ..comparison.table import OVERVIEWS, ordered, overview, shared

    path = Path(folder)
    rows = ordered(ComparisonFolder(path).rows()) if (path / "runs").is_dir() else []
    if len(rows) < 2 or rows[0]["method"] != FULL:
        raise ValueError(
            f"`results` must be the folder of a `hack-pipelines compare` that has measured the full cache and a method, but "
            f"{folder} is not."
        )
    tables = [line for name in OVERVIEWS for line in overview(rows, name)]
    return "\n".join(
        ["## Results", "", "By method and by `kv_budget`, against the full cache.", "", *tables, shared(rows[0], rows)]
    )
