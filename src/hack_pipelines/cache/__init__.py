"""Caches for keys and values: the attention layer hands over a scale and gets its output back."""

from .cache import Cache, FullCache
from .head_group import HeadGroupCache
from .report import CacheReport


__all__ = ["Cache", "CacheReport", "FullCache", "HeadGroupCache"]
