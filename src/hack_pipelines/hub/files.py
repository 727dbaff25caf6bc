"""Files that came from elsewhere."""

import json
from pathlib import Path
from typing import Any


DOWNLOAD_AGAIN = "download it again, with `force_download=True` where it came from the Hub"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): {DOWNLOAD_AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object; {DOWNLOAD_AGAIN}.")
    return content
