"""Structural similarity of images."""

import torch
import torch.nn.functional as F

from .fidelity import check_images


WINDOW, SIGMA = 11, 1.5
# (K L)^2 of the paper for values in [0, 1].
LUMINANCE_CONSTANT, CONTRAST_CONSTANT = 0.01**2, 0.03**2


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of each image with its reference (Wang et al. 2004, equation 13): in a Gaussian window of 11 by
    11 pixels with a deviation of 1.5, at every place where the window lies inside, averaged over places and channels.

    Args:
        images, reference (`torch.Tensor`):
            `[images, channels, height, width]` in [0, 1], at least 11 pixels a side, as `output_type="pt"` returns them.

    Returns:
        `torch.Tensor`: `[images]` in float64; 1 for an image that equals its reference.

    Raises:
        `ValueError`: if the shapes differ, a side is shorter than the window, or values lie outside [0, 1].
    """
    check_images(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"`images` must have at least {WINDOW} pixels a side, the window of SSIM, but are {images.shape[-2]} by "
            f"{images.shape[-1]}."
        )
    x, y = (tensor.double().flatten(0, 1).unsqueeze(1) for tensor in (images, reference.to(images.device)))
    mean_x, mean_y, square_x, square_y, product = (blur(part) for part in (x, y, x * x, y * y, x * y))
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + LUMINANCE_CONSTANT) / (mean_x**2 + mean_y**2 + LUMINANCE_CONSTANT)
    structure = (2 * covariance + CONTRAST_CONSTANT) / (variance_x + variance_y + CONTRAST_CONSTANT)
    return (luminance * structure).mean(dim=(1, 2, 3)).unflatten(0, images.shape[:2]).mean(1)


def blur(images: torch.Tensor) -> torch.Tensor:
    """Weighted means in the window, `[count, 1, height, width]` without the places where it sticks out."""
    distance = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = (-(distance**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(images, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
