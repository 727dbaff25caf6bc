"""Where models come from, and whether their files are whole."""

from .checks import check_weights
from .sources import Source, locate


__all__ = ["Source", "check_weights", "locate"]
