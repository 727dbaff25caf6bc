"""Repos of the original authors, and the files in them that make a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OriginalRepo:
    """
    A Hub repo with original files.

    Args:
        name (`str`):
            Its name on the Hub.
        tokenizer (`str`):
            File of the image tokenizer that all of its transformers share.
        transformers (`dict[str, str]`):
            File of the transformer, by variant.
    """

    name: str
    tokenizer: str
    transformers: dict[str, str]


ORIGINAL_REPOS = (
    OriginalRepo(
        name="FoundationVision/var",
        tokenizer="vae_ch160v4096z32.pth",
        transformers={variant: f"var_{variant}.pth" for variant in ("d16", "d20", "d24", "d30", "d36")},
    ),
)


def original_repo(name: str) -> OriginalRepo | None:
    """The repo of a name, which the Hub reads without regard to case."""
    return next((repo for repo in ORIGINAL_REPOS if repo.name.lower() == name.lower()), None)
