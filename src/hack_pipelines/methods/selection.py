"""Which tokens stay, decided the same way on every machine."""

from functools import lru_cache

import torch


GOLDEN_RATIO = 0.6180339887498949


def top(scores: torch.Tensor, count: int, tiers: torch.Tensor | None = None) -> torch.Tensor:
    """
    Positions of the best tokens: higher tier first, then higher score, then smaller position.

    Everything that decides is packed into one integer without ties, because `torch.topk` leaves ties undefined.

    Args:
        scores (`torch.Tensor`):
            `[..., tokens]` in float32, finite.
        count (`int`):
            How many to take.
        tiers (`torch.Tensor`, *optional*):
            `[tokens]` or `[..., tokens]`, integers from 0 to 7.

    Returns:
        `torch.Tensor`: `[..., count]`, ascending.
    """
    # Adding zero turns -0.0 into 0.0, which must tie. The bits of a float32 order like an integer once those of negative
    # numbers are flipped.
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31
    tokens = scores.shape[-1]
    places = torch.arange(tokens, device=scores.device)
    keys = (ordered << 24) + (tokens - 1 - places)
    if tiers is not None:
        keys = keys + (tiers.to(keys.device).long() << 56)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def count_before(position: int, count: int, present: int, tiers: torch.Tensor | None) -> int | None:
    """
    How many of the `count` best of `present` tokens lie before a position, or `None` where that depends on the scores.

    Tiers alone often tell: all of a higher tier stay, none of a lower one, and the one that stays in part may lie on one
    side only.
    """
    if position == 0:
        return 0
    if tiers is None or tiers.ndim > 1:
        return None
    before = tiers[:position].bincount(minlength=8).tolist()
    beyond = tiers[position:].bincount(minlength=8).tolist()
    result, room = 0, count
    for old, new in zip(reversed(before), reversed(beyond)):
        if old + new > room:
            if not old or not new:
                return result + (room if old else 0)
            return None if room else result
        result, room = result + old, room - old - new
    return result


@lru_cache(maxsize=256)
def lattice_positions(size: tuple[int, int], count: int) -> tuple[int, ...]:
    """
    Raster positions of `count` queries spread over a grid: equal steps down, golden-ratio steps across.

    Equidistant raster positions would be degenerate: on a 64 x 64 grid, 32 of them lie in one column.
    """
    height, width = size
    return tuple(
        int((i + 0.5) * height / count) * width + int(width * ((i + 0.5) * GOLDEN_RATIO % 1.0)) for i in range(count)
    )


@lru_cache(maxsize=256)
def linspace_positions(size: tuple[int, int], count: int) -> tuple[int, ...]:
    """Raster positions of `count` queries at equal distances along the sequence."""
    tokens = size[0] * size[1]
    return tuple(int((i + 0.5) * tokens / count) for i in range(count))


def observed_count(tokens: int, count: int) -> int:
    """How many queries of a scale score its keys: all of them while there are at most `2 * count`."""
    return tokens if tokens <= 2 * count else count


def observed_positions(size: tuple[int, int], count: int, sampling: str, device: torch.device) -> torch.Tensor:
    """
    Which queries of a scale score its keys: all of them while there are at most `2 * count`.

    Args:
        size (`tuple[int, int]`):
            Height and width of the token map.
        count (`int`):
            How many are wanted.
        sampling (`str`):
            `"lattice"`, spread over the map, or `"linspace"`, at equal distances along the sequence.
        device (`torch.device`):
            Where they are wanted.

    Returns:
        `torch.Tensor`: ids in the order of the map.
    """
    tokens = size[0] * size[1]
    if observed_count(tokens, count) == tokens:
        return torch.arange(tokens, device=device)
    positions = lattice_positions if sampling == "lattice" else linspace_positions
    return torch.tensor(positions(size, count), device=device)
