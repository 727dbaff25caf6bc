"""The Hub's errors, said in the words of whoever asked for a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """
    Raise what goes wrong on the way to the Hub with what to do about it.

    Raises:
        `ValueError`: if there is no such repo, revision or file.
        `ConnectionError`: if the Hub cannot be reached, or must not be, and the cache does not have the files.
    """
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a folder here nor a name that a Hub repo can have (`owner/name`): check the path."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"The Hub repo {name!r} is gated: accept its terms on its page, then log in with `hf auth login` or give `token`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a folder here nor a Hub repo that you can see: check the name, and give `token` if it is "
            "private."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"The Hub repo {name!r} has no revision {revision!r}: give a branch, tag or commit of it."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{name!r}{at} is no folder here and not, or not completely, in the cache, and the Hub was not asked or not "
            "reached: connect, or unset HF_HUB_OFFLINE and `local_files_only`."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"The Hub repo {name!r}{at} lacks a file that is needed: {one_line(error)}") from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"The Hub did not give {name!r}{at}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Text of an error without its line breaks."""
    return " ".join(str(error).split())
