"""Calls of the Hub's client that outlast a busy Hub and a connection that is cut."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

# The base of the errors of the HTTP library below the client, which is not the same one in all of its releases.
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers


logger = logging.get_logger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT = 1.0
# The Hub counts requests in windows of five minutes.
LONGEST_WAIT = 300.0
BUSY_STATUS = (408, 429, 500, 502, 503, 504)


def patient(call: Callable[[], Result]) -> Result:
    """
    Make a call again where the Hub is busy, or where the connection was cut while it answered.

    The client itself does so for most requests, but not for the first of a download, which asks for the commit of a
    revision, nor for a file whose server has trouble, nor for the making of repos, branches and tags. What a call has
    downloaded is in the cache at the next attempt.

    Args:
        call (`Callable`):
            What can be made again.

    Raises:
        `Exception`: what the last of 4 attempts raised; at once what another attempt would not change, or where the Hub
        asks for more than 300 seconds.
    """
    attempt = 1
    while True:
        try:
            return call()
        except Exception as error:
            wait = wait_after(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                raise
            reason = " ".join(str(http_error(error)).split())
        logger.warning(f"{reason}. Attempt {attempt + 1} of {ATTEMPTS} in {wait:g} s.")
        time.sleep(wait)
        attempt += 1


def wait_after(error: Exception, attempt: int) -> float | None:
    """Seconds before another attempt; `None` where it would be in vain."""
    cause = http_error(error)
    if not isinstance(cause, HfHubHTTPError):
        # Of a Hub that cannot be reached at all, the client has said so and looked into the cache.
        return FIRST_WAIT * 2 ** (attempt - 1) if cause is error else None
    if cause.response.status_code not in BUSY_STATUS:
        return None
    asked = asked_wait(cause.response.headers)
    if asked is None:
        return FIRST_WAIT * 2 ** (attempt - 1)
    return asked if asked <= LONGEST_WAIT else None


def http_error(error: Exception) -> BaseException | None:
    """The error of a request: this one, or the one that the client wrapped in it."""
    return error if isinstance(error, HTTPError) else error.__cause__


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None


def snapshot(name: str, allowed: list[str], ignored: list[str], options: dict[str, Any]) -> Path:
    """
    Files of one commit of a Hub repo, in the cache of the Hub's client; the folder is named after the commit.

    Args:
        name (`str`):
            The repo.
        allowed, ignored (`list[str]`):
            Patterns of the files' names.
        options (`dict[str, Any]`):
            `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`.
    """
    if options.get("force_download"):
        if options.get("local_files_only"):
            raise ValueError("`force_download` asks the Hub, which `local_files_only` forbids: give one of them.")
        # Where the Hub does not answer, the client hands out what is in the cache, also if that is to be fetched again.
        patient(lambda: HfApi(token=options.get("token")).model_info(name, revision=options.get("revision")))
    return Path(
        patient(lambda: snapshot_download(name, allow_patterns=allowed, ignore_patterns=ignored or None, **options))
    )


def download(name: str, file: str, options: dict[str, Any]) -> Path:
    """A file of a Hub repo, in the cache of the Hub's client."""
    return Path(patient(lambda: hf_hub_download(name, file, **options)))
