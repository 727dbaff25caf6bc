"""What a comparison leaves behind: a folder with two files a run, from which all tables and pictures are made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..result_folder import ResultFolder, replace_file, write_json


FULL = "full"


@dataclass(frozen=True)
class Run:
    """
    A method at a budget.

    Args:
        method (`str`):
            As it was written, with its options.
        budget (`float`, *optional*):
            Fraction of the full cache's tokens; `None` for the full cache.
    """

    method: str
    budget: float | None = None

    @property
    def name(self) -> str:
        """A name for its files, different for every run."""
        method = quote(self.method, safe="=,").replace("%3A", "+")
        return method if self.budget is None else f"{method}@{self.budget:g}"

    @property
    def title(self) -> str:
        """A name for readers."""
        return f"{self.method} cache" if self.budget is None else f"{self.method} at {self.budget:g}"


FULL_RUN = Run(FULL)


@dataclass(frozen=True)
class ComparisonFolder(ResultFolder):
    """
    The files of a comparison. A run's `.json` appears after its `.safetensors`, so that what is there can be read.

    Args:
        path (`Path`):
            The folder; it and `runs/` in it are made where they are missing.
    """

    def __post_init__(self):
        super().__post_init__()
        self.runs.mkdir(parents=True, exist_ok=True)

    @property
    def runs(self) -> Path:
        """Where the files of the runs lie."""
        return self.path / "runs"

    def has_results(self) -> bool:
        return any(self.runs.glob("*.json"))

    def save(self, run: Run, row: dict[str, Any], tensors: dict[str, torch.Tensor]):
        """Keep what a run has measured, and its figures of every image."""
        replace_file(self.runs / f"{run.name}.safetensors", lambda new: save_file(tensors, new))
        self._save_row(run, row)

    def skip(self, run: Run, reason: str):
        """Note why a run could not be made. It is tried again next time."""
        self._save_row(run, {"method": run.method, "budget": run.budget, "skipped": reason})

    def finished(self, run: Run) -> bool:
        """Whether there is nothing left to do for a run."""
        path = self.runs / f"{run.name}.json"
        return path.exists() and "skipped" not in read_row(path)

    def rows(self) -> list[dict[str, Any]]:
        """All that was measured, in no particular order."""
        return [row for row in self._entries() if "skipped" not in row]

    def skipped(self) -> list[dict[str, Any]]:
        """`method`, `budget` and the reason, `skipped`, of all runs that could not be made, large budgets first."""
        rows = [row for row in self._entries() if "skipped" in row]
        return sorted(rows, key=lambda row: (-row["budget"], row["method"]))

    def tensors(self, run: Run) -> dict[str, torch.Tensor]:
        """The figures of every image of a run, its pictures and its tokens."""
        return load_file(self.runs / f"{run.name}.safetensors")

    def first_pictures(self, run: Run, name: str, count: int) -> torch.Tensor:
        """The first `count` of the pictures that are called `name`, without reading the others."""
        with safe_open(self.runs / f"{run.name}.safetensors", framework="pt") as file:
            return file.get_slice(name)[:count]

    def _save_row(self, run: Run, row: dict[str, Any]):
        write_json(self.runs / f"{run.name}.json", row)

    def _entries(self) -> list[dict[str, Any]]:
        return [read_row(path) for path in sorted(self.runs.glob("*.json"))]


def read_row(path: Path) -> dict[str, Any]:
    """What a run has measured."""
    return json.loads(path.read_text(encoding="utf-8"))
