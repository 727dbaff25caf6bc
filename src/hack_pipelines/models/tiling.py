"""Decoding a large image piece by piece, which bounds the memory that the decoder works in."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.utils.accelerate_utils import apply_forward_hook


class PiecewiseDecoder(AutoencoderMixin):
    """
    A tokenizer whose images can be decoded one at a time (`enable_slicing()`) and a square at a time (`enable_tiling()`).

    Slicing changes nothing but the memory. Squares are normalised, and attend, on their own, so tiling changes the image a
    little; one that is no larger than a square is decoded whole.
    """

    tile_sample_min_size = 512
    """Image pixels per side of a square."""
    tile_overlap_factor = 0.25
    """The share of a square that the next one repeats."""
    use_slicing = False
    use_tiling = False

    @property
    @abstractmethod
    def downscale_factor(self) -> int:
        """Image pixels per side of a latent position."""

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Images of latents.

        Args:
            latents (`torch.Tensor`):
                `[batch, latent_channels, height, width]`, as `accumulate` leaves them.

        Returns:
            `torch.Tensor`: `[batch, 3, height * downscale_factor, width * downscale_factor]` in [-1, 1].
        """
        parts = latents.split(1) if self.use_slicing else (latents,)
        return torch.cat([self._decode_part(part) for part in parts])

    def _decode_part(self, latents: torch.Tensor) -> torch.Tensor:
        tile = self.tile_sample_min_size // self.downscale_factor
        if not self.use_tiling or max(latents.shape[2:]) <= tile:
            return self._decode_whole(latents)
        overlap = round(tile * self.tile_overlap_factor)
        return decode_in_tiles(self._decode_whole, latents, self.downscale_factor, tile, overlap)

    @abstractmethod
    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, in one piece."""


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
