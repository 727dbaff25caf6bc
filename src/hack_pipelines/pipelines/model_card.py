"""The card of a pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard

from ..hub.cards import as_base_model, results_text, sealed_card
from ..profiles.head_profile import HEAD_MAP_NAME, sizes_text
from ..profiles.model_card import TYPES, gap_text, setting_text
from .head_profiles import PROFILE_FOLDER


if TYPE_CHECKING:
    from .pipeline_hack_var import HackVARPipeline


TEXT_TO_IMAGE = "text-to-image"
TAGS = ["visual-autoregressive", "kv-cache-compression", "diffusers"]

CARD = """# {title}

{summary} It draws an image scale by scale; the Python package `hack_pipelines` runs it with a key/value cache that is compressed
per attention head. Weights are safetensors, and no code comes with them.

## Use

```python
from hack_pipelines import HackVARPipeline

pipe = HackVARPipeline.from_pretrained({reference})
image = pipe({argument}, kv_budget=0.3).images[0]
```

## The model

| | |
| --- | --- |
{facts}

{head_types}

{results}
"""
HEAD_TYPES = """## Head types

{types}

The profile in `{folder}`, which `from_pretrained` attaches by itself, was recorded over {samples} in {dtype}."""


def pipeline_card(
    pipe: "HackVARPipeline",
    license: str | None = None,
    base_model: str | None = None,
    results: str | Path | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """
    The card of a pipeline.

    Args:
        pipe ([`HackVARPipeline`]):
            What it describes.
        license (`str`, *optional*):
            Of the weights. Left out where it is not known.
        base_model (`str`, *optional*):
            Repository of the model that it was made from.
        results (`str` or `Path`, *optional*):
            Folder of a comparison.
        repo_id (`str`, *optional*):
            Where it is going to be.
        revision (`str`, *optional*):
            Its tag or branch there.
    """
    metadata = {
        "library_name": "hack_pipelines",
        "pipeline_tag": pipe.pipeline_tag,
        "tags": TAGS,
        "license": license,
        "base_model": as_base_model(base_model),
    }
    pinned = "" if revision is None else f', revision="{revision}"'
    first = pipe.calibration_inputs(1)[0]
    made_from = "" if base_model is None else f", made from {base_model}"
    what = "Text to image" if pipe.pipeline_tag == TEXT_TO_IMAGE else "Class-conditional images"
    text = CARD.format(
        title=repo_id.split("/")[-1] if repo_id else f"A model of the family {pipe.family}",
        summary=f"{what} with a model of the family {pipe.family}{made_from}.",
        reference=f'"{repo_id or "folder or repository of this model"}"{pinned}',
        argument=repr(first) if isinstance(first, str) else f"class_labels={first}",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts(pipe).items()),
        head_types=head_types(pipe),
        results="" if results is None else results_text(results),
    )
    return sealed_card(metadata, text)


def facts(pipe: "HackVARPipeline") -> dict[str, str]:
    """Rows of the card's table."""
    geometry = pipe.geometry()
    tokens = sum(geometry.schedule.lengths)
    rows = {
        "sides of the token maps": f"{sizes_text(geometry.schedule)} ({tokens:,} tokens)",
        "layers, heads a layer, channels a head": f"{geometry.num_layers}, {geometry.num_heads}, {geometry.head_dim}",
    }
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            rows[name.replace("_", " ")] = f"{type(component).__name__}, {parameters_text(component)}"
    rows |= {
        f"default {name.replace('_', ' ')}": setting_text(value) for name, value in pipe.config["sampling"].items()
    }
    return rows


def parameters_text(module: torch.nn.Module) -> str:
    """Number of parameters and their dtypes."""
    count = sum(parameter.numel() for parameter in module.parameters())
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    return f"{count / 1e6:,.1f} M parameters, {' and '.join(dtypes)}"


def head_types(pipe: "HackVARPipeline") -> str:
    """The section on the head profile; what is said of none where there is none."""
    profile = pipe.head_profile
    if profile is None or not profile.has_types:
        named = pipe.config["default_head_profile"]
        return (
            ""
            if named is None
            else f"## Head types\n\nIts head profile is [{named}](https://huggingface.co/{named.split('@')[0]})."
        )
    samples = "one image" if profile.num_samples == 1 else f"{profile.num_samples} images"
    types = TYPES.format(gap=gap_text(profile)).replace(f"({HEAD_MAP_NAME})", f"({PROFILE_FOLDER}/{HEAD_MAP_NAME})")
    return HEAD_TYPES.format(types=types, folder=PROFILE_FOLDER, samples=samples, dtype=profile.dtype)
