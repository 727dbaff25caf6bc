"""Token counts from weights: integers that keep the average."""

from collections.abc import Sequence
from itertools import chain


def allocate(
    counts: Sequence[int],
    weights: Sequence[float],
    caps: Sequence[int],
    floors: Sequence[int],
    total: int,
) -> list[int]:
    """
    Tokens of each head of some groups, in proportion to weights but within limits.

    Finds `lam` with `sum_g counts[g] * clamp(lam * weights[g], floors[g], caps[g]) = total`, rounds down, and gives what is
    left to the groups that lost most, one token a head. What groups with a positive weight cannot take goes to those of
    weight zero, in equal parts.

    Args:
        counts (`Sequence[int]`):
            Heads of each group.
        weights (`Sequence[float]`):
            At least 0.
        caps, floors (`Sequence[int]`):
            Most and fewest tokens of a head, `0 <= floors[g] <= caps[g]`.
        total (`int`):
            Tokens of all heads together.

    Returns:
        `list[int]`: tokens of a head of each group; `sum_g counts[g] * tokens[g] <= total`.

    Raises:
        `ValueError`: if a weight or limit is out of range, or the floors alone exceed the total.
    """
    groups = range(len(counts))
    for group in groups:
        if not weights[group] >= 0 or not 0 <= floors[group] <= caps[group]:
            raise ValueError(
                f"Group {group} needs a weight of at least 0 and 0 <= floor <= cap but has weight {weights[group]}, floor "
                f"{floors[group]} and cap {caps[group]}."
            )
    smallest = sum(count * floor for count, floor in zip(counts, floors))
    if smallest > total:
        raise ValueError(f"The floors alone take {smallest} head-tokens of {total}.")
    shares = [float(floor) for floor in floors]
    weighted = [group for group in groups if weights[group] > 0]
    others = [group for group in groups if weights[group] == 0]
    for members, own in ((weighted, weights), (others, [1.0] * len(counts))):
        rest = sum(counts[group] * shares[group] for group in groups if group not in set(members))
        for group, share in zip(members, proportional(members, counts, own, caps, floors, total - rest)):
            shares[group] = share
        if members and any(shares[group] < caps[group] for group in members):
            break
    # The epsilon keeps 67.99999999999999 at 68.
    tokens = [int(share + 1e-9) for share in shares]
    left = total - sum(count * number for count, number in zip(counts, tokens))
    for group in sorted(groups, key=lambda group: (tokens[group] - shares[group], group)):
        if left >= counts[group] and tokens[group] < caps[group]:
            tokens[group] += 1
            left -= counts[group]
    return tokens


def proportional(
    members: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[float],
    caps: Sequence[int],
    floors: Sequence[int],
    total: float,
) -> list[float]:
    """`clamp(lam * weight, floor, cap)` of some groups of positive weight, with the `lam` that adds up to `total`."""

    def shares(factor: float) -> list[float]:
        return [min(max(factor * weights[group], floors[group]), caps[group]) for group in members]

    def used(factor: float) -> float:
        return sum(counts[group] * share for group, share in zip(members, shares(factor)))

    # The sum is linear between two breakpoints, at which a group leaves its floor or reaches its cap.
    points = sorted({0.0, *chain(*((floors[g] / weights[g], caps[g] / weights[g]) for g in members))})
    if used(points[-1]) <= total:
        return [float(caps[group]) for group in members]
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if used(points[middle]) <= total else (low, middle)
    below, above = used(points[low]), used(points[high])
    part = (total - below) / (above - below)
    return shares(points[low] + part * (points[high] - points[low]))
