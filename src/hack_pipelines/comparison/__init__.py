"""Comparisons of compression methods at equal budgets, see `hack-pipelines compare`."""

from .folder import ComparisonFolder
from .study import HeldOut, Settings, Study


__all__ = ["ComparisonFolder", "HeldOut", "Settings", "Study"]
