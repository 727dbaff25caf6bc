"""
The head profiles that belong to the released models.

No profile of a released model has been published yet. Until one is, opening such a model says so in a warning and draws without
it. Tags can be moved: replace one by the commit when a profile is there.
"""

import re


# A repo and a revision after `@`, as `HeadProfile.from_pretrained` takes them.
RELEASED_PROFILES = {
    ("FoundationVision/Infinity", "2b"): "hack-pipelines/infinity-2b-head-profile@v1",
    ("FoundationVision/Infinity", "8b"): "hack-pipelines/infinity-8b-head-profile@v1",
    ("FoundationVision/Infinity", "8b-512"): "hack-pipelines/infinity-8b-512-head-profile@v1",
    ("FoundationVision/var", "d16"): "hack-pipelines/var-d16-head-profile@v1",
    ("FoundationVision/var", "d20"): "hack-pipelines/var-d20-head-profile@v1",
    ("FoundationVision/var", "d24"): "hack-pipelines/var-d24-head-profile@v1",
    ("FoundationVision/var", "d30"): "hack-pipelines/var-d30-head-profile@v1",
    ("FoundationVision/var", "d36"): "hack-pipelines/var-d36-head-profile@v1",
}


REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def split_reference(reference: str) -> tuple[str, str | None]:
    """
    Repo and revision of `"owner/name"` or `"owner/name@revision"`; anything else is a name as it stands.

    Args:
        reference (`str`):
            What names a repo.
    """
    match = REFERENCE.fullmatch(reference)
    return (match[1], match[2]) if match else (reference, None)


def checked_reference(name: str, reference: str | None) -> str | None:
    """
    A reference that names a Hub repo, never a folder of this machine.

    Args:
        name (`str`):
            Of the argument.
        reference (`str`, *optional*):
            Its value.

    Raises:
        `ValueError`: if it does not.
    """
    if reference is not None and (not isinstance(reference, str) or not REFERENCE.fullmatch(reference)):
        raise ValueError(f"`{name}` must be 'owner/name' or 'owner/name@revision' of a Hub repo but is {reference!r}.")
    return reference
