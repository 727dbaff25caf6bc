"""The card of a head profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ..hub.cards import as_base_model, results_text, sealed_card


if TYPE_CHECKING:
    from .head_profile import HeadProfile


CARD = """# Head profile of {title}

What the {num_heads_total} self-attention heads of {title} look at, {origin}.
The Python package `hack_pipelines` plans with it which keys and values each head may forget.

{types}

## Use

```python
from hack_pipelines import HackVARPipeline

pipe = HackVARPipeline.from_pretrained("{base_model}")
pipe.load_head_profile({reference})
image = pipe({arguments}).images[0]
```

## How it was made

| | |
| --- | --- |
{facts}

{ending}

{results}
"""

TYPES = """![Head types by layer and head](head_map.png)

Heads whose attention hardly varies from query to query are *contextual*: all queries look at the same few tokens. The
others are *structural*: where they look follows the query's position. The variance is taken at the last scale of an
uncompressed run. {gap}"""
NO_TYPES = """It comes from an order file of HeatKV, which says for each scale which heads lose it first, and serves the method
`heatkv` only. The attention in it is made up from these ranks."""
ENDING = """`profile.safetensors` holds mean and variance over the samples of each array, by layer, head and step; `config.json` holds
every input and seed, so that the run can be repeated."""
NO_TYPES_ENDING = """`profile.safetensors` holds the array that gives these orders; `config.json` names the file that they were read from."""


def profile_card(
    profile: "HeadProfile",
    metadata: dict[str, Any],
    repo_id: str | None = None,
    revision: str | None = None,
    results: str | Path | None = None,
) -> ModelCard:
    """
    The card of a head profile.

    Args:
        profile ([`HeadProfile`]):
            What it describes.
        metadata (`dict`):
            Of every head profile: library, licence, tags.
        repo_id (`str`, *optional*):
            Where it is going to be.
        revision (`str`, *optional*):
            Its tag or branch there.
        results (`str` or `Path`, *optional*):
            Folder of a comparison that was drawn with it.
    """
    base_model = as_base_model(profile.base_model)
    first = profile.inputs[0]
    argument = f"prompt={first!r}" if isinstance(first, str) else f"class_labels={first}"
    samples = "one image" if profile.num_samples == 1 else f"{profile.num_samples} images"
    if profile.has_types:
        parts = {
            "origin": f"recorded while it drew {samples}",
            "types": TYPES.format(gap=gap_text(profile)),
            "arguments": f"{argument}, kv_budget=0.3",
            "ending": ENDING,
        }
    else:
        parts = {
            "origin": "by rank",
            "types": NO_TYPES,
            "arguments": 'prompt="a lighthouse", kv_budget=0.1, method="heatkv"',
            "ending": NO_TYPES_ENDING,
        }
    pinned = "" if revision is None else f', revision="{revision}"'
    text = CARD.format(
        title=profile.title,
        num_heads_total=profile.num_layers * profile.num_heads,
        base_model=profile.base_model or "the model",
        reference=f'"{repo_id or "folder or repository of this profile"}"{pinned}',
        facts="\n".join(f"| {name} | {value} |" for name, value in facts(profile).items()),
        results="" if results is None else results_text(results),
        **parts,
    )
    return sealed_card({**metadata, "base_model": base_model}, text)


def gap_text(profile: "HeadProfile") -> str:
    """A sentence on how clear the cut between head types is."""
    try:
        gap = profile.gap(0.5)
    except ValueError:
        return "A single head has no type beside others."
    return (
        f"Half of the heads are taken as contextual here; the variance just above the cut is {gap:.3g} times that just "
        "below it."
    )


def facts(profile: "HeadProfile") -> dict[str, str]:
    """Rows of the card's table."""
    from .head_profile import sizes_text

    seeds = profile.seeds
    samples = f"{profile.num_samples}, seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"1, seed {seeds[0]}"
    return {
        "model": profile.title,
        "revision": profile.base_revision or "not recorded",
        "layers, heads a layer, channels a head": f"{profile.num_layers}, {profile.num_heads}, {profile.head_dim}",
        "sides of the token maps": sizes_text(profile.schedule),
        "samples": samples if profile.has_types else f"none, read from {profile.inputs[0]}",
        "dtype of queries and keys": profile.dtype,
        **{f"sampling: {name.replace('_', ' ')}": setting_text(value) for name, value in profile.sampling.items()},
        "software": ", ".join(f"{name} {version}" for name, version in profile.software.items()),
    }


def setting_text(value: Any) -> str:
    """A sampling setting in short: one number where all scales share it."""
    if not isinstance(value, list):
        return str(value)
    if len(set(value)) == 1:
        return f"{value[0]:g}"
    return ", ".join(f"{entry:.3g}" for entry in value) + " by scale"
