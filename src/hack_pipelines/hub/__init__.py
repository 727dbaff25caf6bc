"""Where models come from, and whether their files are whole."""

from typing import TYPE_CHECKING


# Loaded when asked for: profiles take their cards from here, and these modules import the models, which import profiles.
_EXPORTS = {"Source": "sources", "check_weights": "checks", "locate": "sources"}

__all__ = ["Source", "check_weights", "locate"]

if TYPE_CHECKING:
    from .checks import check_weights
    from .sources import Source, locate
else:

    def __getattr__(name):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
