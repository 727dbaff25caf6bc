"""What is recorded about a head's attention: names and shapes, shared by the recording and the profile."""

import torch


TOP_COUNTS = (1, 4, 16, 64)
LOCAL_RADII = (1, 2)
# On a map with fewer tokens everything is near everything.
LOCAL_MIN_TOKENS = 25


def statistic_shapes(num_layers: int, num_heads: int, num_scales: int) -> dict[str, tuple[int, ...]]:
    """
    Shapes of the recorded arrays by name. `A` is the attention of step `k`, `[n_k, T_k]`; all are means over its queries.

    - `mass[l, h, k, s]`: attention on scale `s`, zero for later scales. Sums to 1 over `s`.
    - `colvar[l, h, k]`: sum over the columns of `A` of their population variance over queries.
    - `topk_hist[l, h, k, c]`: attention on the `TOP_COUNTS[c]` tokens of earlier scales that a query looks at most.
    - `local[l, h, k, r]`: attention within `LOCAL_RADII[r]` cells of the query, on scales of at least 25 tokens.
    - `entropy[l, h, k]`: entropy of a row of `A`, in nats.
    - `vnorm[l, h, k]`: Euclidean norm of the values of scale `k`.
    """
    steps = (num_layers, num_heads, num_scales)
    return {
        "mass": (*steps, num_scales),
        "colvar": steps,
        "topk_hist": (*steps, len(TOP_COUNTS)),
        "local": (*steps, len(LOCAL_RADII)),
        "entropy": steps,
        "vnorm": steps,
    }


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of the entries of a vector from 0, in float64; entries that tie share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's rank correlation of two arrays of one shape; `nan` where one of them is constant."""
    ranks = torch.stack([average_ranks(values.flatten().cpu()) for values in (first, second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.square().sum(1).sqrt()
    return float(centred.prod(0).sum() / norms.prod())
