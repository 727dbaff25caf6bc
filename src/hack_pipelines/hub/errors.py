"""The Hub's errors, said in the words of whoever asked for a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .client import asked_wait, http_error


FORBIDDEN = (401, 403)
TOO_MANY = 429


@contextmanager
def explained(name: str, revision: str | None, act: str = "read") -> Iterator[None]:
    """
    Raise what goes wrong on the way to the Hub with what to do about it.

    Args:
        name (`str`):
            The repo.
        revision (`str`, *optional*):
            Its revision.
        act (`str`, *optional*, defaults to `"read"`):
            What a token must allow, `"read"` or `"write to"`.

    Raises:
        `ValueError`: if there is no such repo, revision or file, or it may not be read or written to.
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
        cause = http_error(error)
        if isinstance(cause, HfHubHTTPError):
            raise refusal(cause, name, at, act) from error
        raise ConnectionError(
            f"There is no folder {name!r} here: check the path. If a Hub repo is meant, {name!r}{at} is not, or not completely, in "
            "the cache, and the Hub was not asked or not reached: connect, or unset HF_HUB_OFFLINE and `local_files_only`."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"The Hub repo {name!r}{at} lacks a file that is needed: {one_line(error)}") from error
    except HfHubHTTPError as error:
        raise refusal(error, name, at, act) from error
    except HTTPError as error:
        raise ConnectionError(
            f"The connection to the Hub was lost over {name!r}{at} ({one_line(error)}): call again, what is complete is kept."
        ) from error


def refusal(error: HfHubHTTPError, name: str, at: str, act: str) -> Exception:
    """What an answer of the Hub means, and what to do."""
    status = error.response.status_code
    if status in FORBIDDEN:
        return ValueError(
            f"The Hub does not let you {act} {name!r} ({status}): log in with `hf auth login`, or give a `token` that may."
        )
    asked = asked_wait(error.response.headers)
    later = "later" if asked is None else f"in {asked:g} seconds"
    if status == TOO_MANY:
        return ConnectionError(
            f"The Hub did not answer for {name!r}{at}, because it got too many requests from here (429): try again {later}, "
            "and log in with `hf auth login`, which raises the limit."
        )
    if status >= 500:
        return ConnectionError(
            f"The Hub did not answer for {name!r}{at}, because it has trouble of its own ({status}): try again {later}, or see "
            "https://status.huggingface.co."
        )
    return ConnectionError(f"The Hub did not answer for {name!r}{at}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """Text of an error without its line breaks."""
    return " ".join(str(error).split())
