"""`hack-pipelines profile`: what head profiles hold, how they differ, and their way to the Hub and back."""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .output import check_picture


if TYPE_CHECKING:
    from ..profiles import HeadProfile

DIFFERENT = 1
TROUBLE = 2


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    text = "look at head profiles, compare, publish and fetch them"
    parser = subparsers.add_parser("profile", help=text, description=f"{text[0].upper()}{text[1:]}.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = add_show(actions)
    for action in (add_diff(actions), add_push(actions), add_pull(actions)):
        # As the caller does with the one that is returned.
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return show


def add_show(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `profile show`."""
    show = actions.add_parser("show", help="print what it holds", description="Print what a head profile holds.")
    show.set_defaults(run=run_show)
    show.add_argument("profile", metavar="PATH_OR_REPO", help="folder, or repository on the Hub")
    add_alpha(show)
    add_revision(show)
    show.add_argument("--map", type=Path, metavar="PICTURE", help="also draw the head types to this file")
    return show


def add_diff(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `profile diff`."""
    diff = actions.add_parser(
        "diff",
        help="print how two differ",
        description="Print how two head profiles differ. The exit status is that of diff: 0 if they are equal, 1 if they "
        "differ, 2 if something went wrong.",
    )
    diff.set_defaults(run=run_diff, status_of_errors=TROUBLE)
    for name in ("first", "second"):
        diff.add_argument(name, metavar=name.upper(), help="folder, or repository on the Hub as 'owner/name@revision'")
    add_alpha(diff)
    diff.add_argument("--map", type=Path, metavar="PICTURE", help="also draw both side by side to this file")
    return diff


def add_push(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `profile push`."""
    push = actions.add_parser(
        "push",
        help="upload one to the Hub",
        description="Upload a head profile with its card and picture to the Hub, in one commit. Log in with `hf auth login` "
        "or set HF_TOKEN.",
    )
    push.set_defaults(run=run_push)
    push.add_argument("profile", metavar="PATH_OR_REPO", help="folder, or repository on the Hub")
    push.add_argument("repo", metavar="REPO", help="repository to upload to; made where it is missing")
    push.add_argument("--license", metavar="ID", help="licence of the profile (default: apache-2.0)")
    push.add_argument("--results", type=Path, metavar="FOLDER", help="put the tables of a comparison into the card")
    push.add_argument("--message", default="Upload head profile", metavar="TEXT", help="what the commit is called")
    push.add_argument("--revision", metavar="BRANCH", help="branch to upload to; made where it is missing")
    push.add_argument("--tag", metavar="NAME", help="also tag the commit, so that others can pin it")
    push.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--replace-card", action="store_true", help="write over a card that somebody edited on the Hub")
    push.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and stop")
    return push


def add_pull(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `profile pull`."""
    pull = actions.add_parser(
        "pull",
        help="fetch one from the Hub",
        description="Fetch a head profile into the cache of the Hub's client, check it, and copy it where wanted.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("repo", metavar="REPO", help="repository on the Hub")
    add_revision(pull)
    pull.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="new folder for a copy (default: cache only)"
    )
    return pull


def add_alpha(parser: argparse.ArgumentParser):
    """The share of contextual heads that tells head types apart."""
    parser.add_argument(
        "--alpha", type=float, default=0.5, metavar="X", help="share of contextual heads (default: 0.5)"
    )


def add_revision(parser: argparse.ArgumentParser):
    """The revision of a repository."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a repository")


def run_show(args: argparse.Namespace):
    """Print facts and head types."""
    if args.map is not None:
        check_picture(args.map)
    from ..profiles import HeadProfile
    from ..profiles.model_card import facts

    profile = HeadProfile.from_pretrained(args.profile, revision=args.revision)
    types = type_lines(profile, args.alpha)
    for name, value in facts(profile).items():
        print(f"{name}: {value}")
    print()
    for line in types:
        print(line)
    if args.map is not None:
        profile.head_map(args.alpha).save(args.map)
        print(f"\n{args.map}: the same as a picture")


def run_diff(args: argparse.Namespace) -> int:
    """Print differing facts, arrays and head types."""
    if args.map is not None:
        check_picture(args.map)
    from ..profiles import HeadProfile
    from ..profiles.comparison import draw_both, fact_lines, statistic_lines, type_difference_lines

    first, second = (HeadProfile.from_pretrained(name) for name in (args.first, args.second))
    if first == second:
        print("The profiles are equal.")
    else:
        types = type_difference_lines(first, second, args.alpha)
        for line in (*fact_lines(first, second), *statistic_lines(first, second), *types):
            print(line)
    if args.map is not None:
        draw_both(first, second, args.alpha).save(args.map)
        print(f"{args.map}: both as a picture")
    return 0 if first == second else DIFFERENT


def run_push(args: argparse.Namespace):
    """Print what is uploaded, upload it, and print where it is."""
    from ..hub.cards import CARD_NAME, is_unedited
    from ..hub.upload import check_upload, upload
    from ..profiles import HeadProfile

    check_upload(args.repo, args.revision, args.create_pr, args.tag)
    profile = HeadProfile.from_pretrained(args.profile)
    with TemporaryDirectory() as name:
        folder, card = Path(name), Path(args.profile, CARD_NAME)
        # A card that somebody edited here is what they want to have there.
        if card.is_file() and not is_unedited(card.read_text(encoding="utf-8")):
            shutil.copyfile(card, folder / CARD_NAME)
        words = {"license": args.license, "results": args.results}
        place = {"repo_id": args.repo, "revision": args.tag or args.revision}
        profile.save_pretrained(folder, model_card_kwargs={**words, **place})
        print(f"head profile of {profile.title} to {args.repo}:")
        for path in sorted(folder.iterdir()):
            print(f"  {path.name:<20} {path.stat().st_size:>12,} bytes")
        if args.dry_run:
            return
        info = upload(
            folder,
            args.repo,
            args.message,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            tag=args.tag,
            replace_card=args.replace_card,
        )
    print(info.pr_url or info.commit_url)
    if not args.create_pr:
        pinned = f"{args.repo}@{args.tag or info.oid}"
        print(f'use it: pipe.load_head_profile("{pinned}")')


def run_pull(args: argparse.Namespace):
    """Fetch and check a profile, and say where it is."""
    from ..hub.client import snapshot
    from ..hub.errors import explained
    from ..hub.registry import split_reference
    from ..profiles import HeadProfile
    from ..profiles.head_profile import FILES

    if args.output is not None and args.output.exists():
        raise ValueError(f"{args.output} exists already: name a new folder.")
    profile = HeadProfile.from_pretrained(args.repo, revision=args.revision)
    name, pinned = split_reference(args.repo)
    revision = args.revision or pinned
    with explained(name, revision):
        folder = snapshot(name, list(FILES), [], {"revision": revision})
    print(f"head profile of {profile.title}, commit {folder.name}")
    if args.output is None:
        print(f"{folder}: in the cache")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.output.parent) as unfinished:
        copy = shutil.copytree(folder, Path(unfinished) / args.output.name)
        copy.rename(args.output)
    print(f"{args.output}: a copy")


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
