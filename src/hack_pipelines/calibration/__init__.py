"""Recording what a model's heads attend to."""

from .calibrate import calibrate, split_half_correlation


__all__ = ["calibrate", "split_half_correlation"]
