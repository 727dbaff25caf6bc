"""How two head profiles differ."""

from os.path import commonprefix
from typing import Any

import torch
from PIL import Image

from ..schedule import Schedule
from .head_map import PAPER
from .head_profile import FACTS, HeadProfile, sizes_text
from .statistics import rank_correlation


LONGEST_VALUE = 80
MOST_HEADS = 40


def fact_lines(first: HeadProfile, second: HeadProfile) -> list[str]:
    """A line for each fact that differs."""
    facts = [flat({name: getattr(profile, name) for name in FACTS}) for profile in (first, second)]
    return [
        f"{name}: {' | '.join(around_difference(*texts))}"
        for name in dict.fromkeys((*facts[0], *facts[1]))
        if (texts := [own.get(name, "nothing") for own in facts])[0] != texts[1]
    ]


def statistic_lines(first: HeadProfile, second: HeadProfile) -> list[str]:
    """A line for each array that differs, with the rank correlation of its means."""
    lines = []
    for name in sorted(first.mean.keys() | second.mean.keys()):
        if name not in first.mean or name not in second.mean:
            lines.append(f"{name}: in the {'first' if name in first.mean else 'second'} only")
            continue
        mine, other = first.mean[name], second.mean[name]
        if mine.shape != other.shape:
            lines.append(f"{name}: {list(mine.shape)} | {list(other.shape)}")
        elif not torch.equal(mine, other):
            lines.append(f"{name}: means rank the same to {rank_correlation(mine, other):.3f}")
        elif not torch.equal(first.variance[name], second.variance[name]):
            lines.append(f"{name}: equal means, other variances over samples")
    return lines


def type_difference_lines(first: HeadProfile, second: HeadProfile, alpha: float) -> list[str]:
    """
    How far head types agree, and the heads that change sides.

    Args:
        first, second ([`HeadProfile`]):
            What is compared; profiles without head types, or of models with other heads, give one line that says so.
        alpha (`float`):
            Share of contextual heads.
    """
    if not first.has_types or not second.has_types:
        return ["head types cannot be compared: not both hold them"]
    if first.scores.shape != second.scores.shape:
        return ["head types cannot be compared: the models have other layers or heads"]
    mine, other = first.contextual_heads(alpha), second.contextual_heads(alpha)
    changed = (mine != other).nonzero().tolist()
    lines = [f"variances that tell types apart rank the same to {rank_correlation(first.scores, second.scores):.3f}"]
    lines.append(f"{len(changed)} of {mine.numel()} heads change type at alpha {alpha:g}")
    for layer, head in changed[:MOST_HEADS]:
        sides = "contextual | structural" if mine[layer, head] else "structural | contextual"
        lines.append(f"  layer {layer}, head {head}: {sides}")
    if len(changed) > MOST_HEADS:
        lines.append(f"  and {len(changed) - MOST_HEADS} more")
    return lines


def draw_both(first: HeadProfile, second: HeadProfile, alpha: float) -> Image.Image:
    """The head maps of both, side by side."""
    pictures = [profile.head_map(alpha) for profile in (first, second)]
    size = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (pictures[0].width, 0))
    return sheet


def flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Facts as text, those in dictionaries by `name.key`."""
    texts: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            texts |= flat(value, f"{prefix}{name}.")
        else:
            texts[prefix + name] = sizes_text(value) if isinstance(value, Schedule) else str(value)
    return texts


def around_difference(*texts: str) -> list[str]:
    """Values that fit a line; of long ones what is around the place where they part."""
    parting = len(commonprefix(texts))
    start = 0 if parting < LONGEST_VALUE // 2 else parting - LONGEST_VALUE // 4
    return [
        f"{'...' if start else ''}{text[start : start + LONGEST_VALUE]}{'...' if len(text) > start + LONGEST_VALUE else ''}"
        for text in texts
    ]
