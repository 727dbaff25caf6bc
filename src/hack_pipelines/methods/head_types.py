"""The two types of heads that HACK and HACK++ tell apart."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


CONTEXTUAL, STRUCTURAL = "contextual", "structural"


def typed_heads(profile: "HeadProfile | None", alpha: float) -> list[dict[str, tuple[int, ...]]]:
    """
    Heads of every layer by their type; types that a layer lacks are left out.

    Args:
        profile ([`HeadProfile`], *optional*):
            Tells the types.
        alpha (`float`):
            Share of contextual heads.

    Raises:
        `ValueError`: if there is no profile.
    """
    layers = []
    for flags in needed(profile).contextual_heads(alpha).tolist():
        members = {
            CONTEXTUAL: tuple(head for head, flag in enumerate(flags) if flag),
            STRUCTURAL: tuple(head for head, flag in enumerate(flags) if not flag),
        }
        layers.append({label: heads for label, heads in members.items() if heads})
    return layers


def needed(profile: "HeadProfile | None") -> "HeadProfile":
    """
    The profile.

    Raises:
        `ValueError`: if there is none.
    """
    if profile is None:
        raise ValueError("A head profile is needed to tell contextual heads from structural ones, but there is none.")
    return profile
