"""What a process that draws a set of pictures tells on the way, all of it on standard error."""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from ..distributed import PictureFolder, Worker


SECONDS_BETWEEN_LINES = 60


def tell(folder: PictureFolder, text: str):
    """A line about a set."""
    print(f"{folder.path}: {text}", file=sys.stderr, flush=True)


def there(folder: PictureFolder) -> str:
    """How many pictures of a set are there."""
    total = len(folder.inputs)
    return f"{total - len(folder.missing()):,} of {counted(total, 'picture')}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 batch`, `1,024 batches`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def tell_start(folder: PictureFolder, batches: int, processes: int, model: str):
    """What is left to do, before the model is loaded, which may take minutes."""
    left = f"{counted(batches, 'batch', 'batches')} left for {counted(processes, 'process', 'processes')}"
    tell(folder, f"{there(folder)} are there, {left}")
    tell(folder, f"loading {model}")


def tell_share_done(folder: PictureFolder, worker: Worker):
    """A process has done its part, but pictures are missing."""
    if worker.count == 1:
        tell(folder, f"{there(folder)} are there; give the same command again")
    else:
        share = f"process {worker.index} of {worker.count}: its share is done"
        tell(folder, f"{share}, {there(folder)} are there; the others still draw")


def watched(folder: PictureFolder, batches: list[range], worker: Worker) -> Iterable[range]:
    """The batches of a process, while it tells how far they are: a bar on a terminal, elsewhere a line a minute."""
    from tqdm import tqdm

    if not worker.is_main:
        return batches
    if not has_room_for_bars():
        return told(folder, batches)
    share = "Drawing" if worker.count == 1 else f"Share of process {worker.index} of {worker.count}"
    return tqdm(batches, desc=share, unit="batch", disable=False)


def has_room_for_bars() -> bool:
    """Whether standard error is a terminal of some size. One that says it has none shows no bar."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return size.columns > 0 and size.lines > 0


def told(folder: PictureFolder, batches: list[range]) -> Iterator[range]:
    """The batches, and a line a minute about the whole set, which other processes draw, too."""
    total = len(folder.inputs)
    missing_before = len(folder.missing())
    began = last = time.monotonic()
    for batch in batches:
        yield batch
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            missing = len(folder.missing())
            pace = pace_text(missing_before - missing, missing, now - began)
            tell(folder, f"{total - missing:,} of {counted(total, 'picture')}{pace}")


def pace_text(drawn: int, missing: int, seconds: float) -> str:
    """How fast pictures appear, and how long the rest takes at that pace."""
    if drawn <= 0 or not missing:
        return ""
    a_second = drawn / seconds
    units = {"a second": 1, "a minute": 60, "an hour": 3600}
    unit = next((unit for unit, length in units.items() if a_second * length >= 1), "an hour")
    return f", {a_second * units[unit]:.1f} {unit}, about {duration_text(missing / a_second)} left"


def duration_text(seconds: float) -> str:
    """A length of time, roughly."""
    if seconds < 90:
        return counted(max(round(seconds), 1), "second")
    if seconds < 90 * 60:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"
