"""Decoding a large image piece by piece, which bounds the memory that the decoder works in."""

from collections.abc import Callable

import torch


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, factor: int, tile: int, overlap: int
) -> torch.Tensor:
    """
    Decode overlapping squares of a latent and cross-fade where they overlap.

    Args:
        decode (`Callable`):
            Makes images `[batch, 3, height * factor, width * factor]` of latents `[batch, channels, height, width]`.
        latents (`torch.Tensor`):
            `[batch, channels, height, width]`.
        factor (`int`):
            Image pixels per side of a latent position.
        tile, overlap (`int`):
            Side of a square, and how many of its positions the next one repeats, in latent positions.

    Returns:
        `torch.Tensor`: `[batch, 3, height * factor, width * factor]` in float32. Squares are normalised on their own, so it
        differs a little from decoding the whole.
    """
    batch, _, height, width = latents.shape
    image = latents.new_zeros(batch, 3, height * factor, width * factor, dtype=torch.float32)
    weights = torch.zeros_like(image[:1, :1])
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            part = decode(latents[:, :, top : top + tile, left : left + tile])
            down, across = (fade(side, overlap * factor, part.device) for side in part.shape[2:])
            mask = down[:, None] * across
            rows = slice(top * factor, top * factor + len(down))
            columns = slice(left * factor, left * factor + len(across))
            image[:, :, rows, columns] += part * mask
            weights[:, :, rows, columns] += mask
    return image / weights


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where the squares along a side begin; the last one ends with the side."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def fade(side: int, overlap: int, device: torch.device) -> torch.Tensor:
    """Weights along a side of a square, rising from its edges."""
    distance = torch.arange(1, side + 1, device=device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp_max(max(overlap, 1))
