"""`hack-pipelines profile show`: what a head profile holds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .output import check_picture


if TYPE_CHECKING:
    from ..profiles import HeadProfile


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser("profile", help="look at a head profile", description="Look at a head profile.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print what it holds", description="Print what a head profile holds.")
    show.set_defaults(run=run)
    show.add_argument("profile", metavar="PATH_OR_REPO", help="folder, or repository on the Hub")
    show.add_argument("--alpha", type=float, default=0.5, metavar="X", help="share of contextual heads (default: 0.5)")
    show.add_argument("--map", type=Path, metavar="PICTURE", help="also draw the head types to this file")
    return show


def run(args: argparse.Namespace):
    """Print facts and head types."""
    if args.map is not None:
        check_picture(args.map)
    from ..profiles import HeadProfile
    from ..profiles.model_card import facts

    profile = HeadProfile.from_pretrained(args.profile)
    types = type_lines(profile, args.alpha)
    for name, value in facts(profile).items():
        print(f"{name}: {value}")
    print()
    for line in types:
        print(line)
    if args.map is not None:
        profile.head_map(args.alpha).save(args.map)
        print(f"\n{args.map}: the same as a picture")


def type_lines(profile: "HeadProfile", alpha: float) -> list[str]:
    """Head types as the picture has them: layers across, heads down."""
    if not profile.has_types:
        return [f"no head types: it holds {', '.join(sorted(profile.mean))} only"]
    contextual = profile.contextual_heads(alpha)
    count, total = int(contextual.sum()), contextual.numel()
    lines = [f"{count} of {total} heads are contextual (C), the others structural (.); layers from left to right"]
    if 0 < count < total:
        lines.append(f"variance just above the cut over that just below it: {profile.gap(alpha):.3f}")
    for head, flags in enumerate(contextual.T.tolist()):
        lines.append(f"head {head:>2}  " + " ".join("C" if flag else "." for flag in flags))
    return lines
