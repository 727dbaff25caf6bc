"""The scales of an image and how many tokens each of them adds."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Schedule:
    """
    The token maps that a next-scale model draws, coarse to fine.

    Args:
        sizes (`tuple[tuple[int, int], ...]`):
            Height and width of the token map of every scale.
        raster (`bool`, *optional*, defaults to `False`):
            Whether these are the lines of one map that is drawn token by token.

    Raises:
        `ValueError`: if there is no scale or a side is not a positive whole number.
    """

    sizes: tuple[tuple[int, int], ...]
    raster: bool = False

    def __post_init__(self):
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise ValueError(f"A schedule needs at least one scale and sides of at least 1 but is {self.sizes}.")

    @classmethod
    def from_sides(cls, sides: Iterable[int]) -> "Schedule":
        """The schedule of square token maps, `patch_nums` in the original VAR."""
        return cls(tuple((int(side), int(side)) for side in sides))

    @classmethod
    def from_lines(cls, height: int, width: int) -> "Schedule":
        """An image that is drawn token by token, line by line: what a scale is elsewhere, a line of `width` tokens is here."""
        return cls(((1, int(width)),) * int(height), raster=True)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every scale, `n_k`."""
        return tuple(height * width for height, width in self.sizes)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Tokens before every scale, `P_k`: what an uncompressed model has cached when the step starts."""
        return (0, *accumulate(self.lengths[:-1]))

    @property
    def total(self) -> int:
        """All tokens, `N`: the full cache."""
        return sum(self.lengths)

    @property
    def cacheable(self) -> int:
        """Tokens that any step ever reads from a cache, `N_c`: all but those of the last scale."""
        return self.total - self.lengths[-1]
