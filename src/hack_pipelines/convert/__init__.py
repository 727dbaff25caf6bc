"""From the files that the original authors published to this package's models and folders."""

from .pipeline import Original, convert_original, load_original


__all__ = ["Original", "convert_original", "load_original"]
