"""The distance between two sets of pictures, in the features of a network."""

import numpy as np
import torch


Features = torch.Tensor | np.ndarray


def frechet_distance(features: Features, reference: Features) -> float:
    """
    Squared Fréchet distance between the Gaussians with the means and covariances of two sets (arXiv 1706.08500, the FID
    where the features are Inception's): `|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`.

    The trace of the root is that of `(C_1^(1/2) C_2 C_1^(1/2))^(1/2)`, which is symmetric, so that two eigendecompositions
    give it and no part of it is imaginary. Sets with fewer members than features have singular covariances, which is no
    obstacle; the estimate is biased upwards, the more so the fewer members there are.

    Args:
        features, reference (`torch.Tensor` or `np.ndarray`):
            `[members, channels]`, at least two members each. The number of members may differ.

    Returns:
        `float`: at least 0, computed in float64.

    Raises:
        `ValueError`: if the shapes do not fit, or a value is not finite.
    """
    sets = [torch.as_tensor(entry).detach().to("cpu", torch.float64) for entry in (features, reference)]
    shapes = [list(entry.shape) for entry in sets]
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            "`features` and `reference` must be [members, channels] with at least two members and the same channels, but "
            f"are {shapes[0]} and {shapes[1]}."
        )
    if not all(entry.isfinite().all() for entry in sets):
        raise ValueError("`features` and `reference` must be finite, but hold infinities or NaN.")
    means = [entry.mean(0) for entry in sets]
    # `cov` drops the dimension where there is one channel.
    first, second = (torch.cov(entry.T).reshape(len(mean), len(mean)) for entry, mean in zip(sets, means))
    root = symmetric_root(first)
    overlap = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
