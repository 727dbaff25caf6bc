"""Which head profile belongs to a pipeline."""

from pathlib import Path
from typing import Any

from diffusers.utils import logging

from ..hub.registry import RELEASED_PROFILES
from ..hub.sources import Source
from ..profiles.head_profile import HeadProfile


logger = logging.get_logger(__name__)

PROFILE_FOLDER = "head_profile"


def find_head_profile(
    asked: str | Path | HeadProfile | bool | None, source: Source, default: str | None, hub_options: dict[str, Any]
) -> HeadProfile | None:
    """
    The profile of a pipeline: the one that was asked for, else the one in its folder, else the one that its configuration
    names, else the one that is registered for a released model.

    Args:
        asked (`str`, `Path`, [`HeadProfile`] or `False`, *optional*):
            What the caller wants; `False` is none.
        source ([`Source`]):
            The pipeline.
        default (`str`, *optional*):
            Repo that its configuration names.
        hub_options (`dict[str, Any]`):
            What the caller gave for the Hub. Its `revision` is one of the pipeline's own repo.

    Raises:
        `ValueError`: if a profile that was asked for, or that the pipeline brings or names, is not there or damaged.
        `ConnectionError`: if it could not be fetched.
    """
    if asked is False:
        return None
    if isinstance(asked, HeadProfile):
        return asked
    options = {name: value for name, value in hub_options.items() if name != "revision"}
    if isinstance(asked, (str, Path)):
        return HeadProfile.from_pretrained(asked, **options)
    if asked is not None:
        raise ValueError(f"`head_profile` must be a folder, a Hub repo, a `HeadProfile` or `False` but is {asked!r}.")
    if (source.folder / PROFILE_FOLDER).is_dir():
        return HeadProfile.from_pretrained(source.folder / PROFILE_FOLDER)
    if default is not None:
        way_out = f"{source.folder} names {default!r} as its head profile: give another as `head_profile`, or `False` for none."
        try:
            return HeadProfile.from_pretrained(default, **options)
        except ConnectionError as error:
            raise ConnectionError(f"{error} {way_out}") from error
        except ValueError as error:
            raise ValueError(f"{error} {way_out}") from error
    return registered_profile(source, options)


def registered_profile(source: Source, options: dict[str, Any]) -> HeadProfile | None:
    """The profile that is registered for a released model; where it cannot be had, a warning says so."""
    if source.original is None or source.original_variant is None:
        return None
    reference = RELEASED_PROFILES.get((source.original.name, source.original_variant))
    if reference is None:
        return None
    try:
        return HeadProfile.from_pretrained(reference, **options)
    except (ConnectionError, ValueError) as error:
        logger.warning(
            f"The head profile of {source.original.name} {source.original_variant} cannot be had: {error} Where a method "
            "needs one, it is made on the spot; `hack-pipelines calibrate` makes a better one."
        )
        return None
