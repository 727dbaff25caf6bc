"""Calibrated facts on the heads of one model."""

from .head_profile import HeadProfile
from .statistics import LOCAL_RADII, TOP_COUNTS, statistic_shapes


__all__ = ["LOCAL_RADII", "TOP_COUNTS", "HeadProfile", "statistic_shapes"]
