"""Where models come from, and whether their files are whole."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checks import check_weights
    from .sources import Source, locate


# Loaded when asked for: profiles, which models' caches read, take their cards from here, and these modules import the models.
_EXPORTS = {"Source": "sources", "check_weights": "checks", "locate": "sources"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Source", "check_weights", "locate"]
