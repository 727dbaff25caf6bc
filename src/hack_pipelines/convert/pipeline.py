"""Loading original files, and turning them into a pipeline folder."""

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from ..schedule import Schedule
from .conversion import DTYPE_NAMES
from .families import FAMILIES, Family, Part
from .kinds import check_kind
from .original import read_state_dict
from .text_encoder import load_text_encoder


PARTS = ("transformer", "tokenizer")


@dataclass(frozen=True)
class Original:
    """
    Models that came from original files.

    Args:
        family (`str`):
            Which pipeline they make: `"var"` or `"infinity"`.
        transformer (`ModelMixin`):
            In eval mode.
        vae (`ModelMixin`):
            The image tokenizer, in eval mode.
        pipeline_config (`dict[str, Any]`):
            What the pipeline is made with besides its components.
        text_components (`dict[str, Any]`, *optional*):
            The text encoder and its tokenizer, if they were asked for.
    """

    family: str
    transformer: ModelMixin
    vae: ModelMixin
    pipeline_config: dict[str, Any]
    text_components: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenOriginal:
    """
    Original files, read, recognised and checked, but not converted yet.

    Args:
        family ([`Family`]):
            What they are.
        transformer ([`Conversion`]):
            Of the transformer.
        tokenizer ([`Conversion`]):
            Of the image tokenizer.
        pipeline_config (`dict[str, Any]`):
            What the pipeline is made with besides its components.
        text_components (`dict[str, Any]`):
            The text encoder and its tokenizer, if they were asked for.
    """

    family: Family
    transformer: Part
    tokenizer: Part
    pipeline_config: dict[str, Any]
    text_components: dict[str, Any]


def load_original(
    transformer: str | Path,
    tokenizer: str | Path,
    config: dict[str, dict[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    text_encoder: str | Path | None = None,
    scale_schedule: Sequence[Sequence[int]] | None = None,
) -> Original:
    """
    Load models from the files that the original authors published. Nothing is held in memory twice.

    Args:
        transformer (`str` or `Path`):
            State dict of the transformer: `.pth`, `.safetensors`, or a folder of shards.
        tokenizer (`str` or `Path`):
            State dict of the image tokenizer, likewise.
        config (`dict`, *optional*):
            `{"transformer": {...}, "tokenizer": {...}}` in the original's field names; any field may be left out. What the
            files show is recognised, and must agree.
        dtype (`torch.dtype`, *optional*):
            Of the weights, float32 by default. Tensors that need float32 keep it, and a text encoder is float16 where this
            is half precision.
        text_encoder (`str` or `Path`, *optional*):
            For text-to-image families: Hub repo or folder of the T5 encoder that the model was trained with.
        scale_schedule (`Sequence[Sequence[int]]`, *optional*):
            For text-to-image families: height and width of every token map that the pipeline draws when it is not told a
            size; by default those of a square image of a megapixel.

    Returns:
        [`Original`]: the models and what else their pipeline needs.

    Raises:
        `ValueError`: if a file is not what it should be; the message names the key, shape or file.
    """
    dtype = checked_dtype(dtype)
    files = open_original(transformer, tokenizer, config, dtype, text_encoder, scale_schedule)
    return Original(
        family=files.family.name,
        transformer=files.transformer.load(dtype),
        vae=files.tokenizer.load(dtype),
        pipeline_config=files.pipeline_config,
        text_components=files.text_components,
    )


def convert_original(
    transformer: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    config: dict[str, dict[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "1GB",
    progress: bool = True,
    text_encoder: str | Path | None = None,
    scale_schedule: Sequence[Sequence[int]] | None = None,
) -> Path:
    """
    Turn original files into a pipeline folder, which [`~HackVARPipeline.from_pretrained`] opens. Tensors are mapped from
    the files and written one at a time, and the folder appears under its name when it is complete.

    Args:
        transformer (`str` or `Path`):
            State dict of the transformer: `.pth`, `.safetensors`, or a folder of shards.
        tokenizer (`str` or `Path`):
            State dict of the image tokenizer, likewise.
        output (`str` or `Path`):
            The folder; it must not exist yet, or be empty.
        config (`dict`, *optional*):
            As in [`load_original`].
        dtype (`torch.dtype`, *optional*):
            As in [`load_original`].
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`):
            Largest size of a weight file.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        text_encoder (`str` or `Path`, *optional*):
            As in [`load_original`]. It is saved into the folder with its tokenizer, so that the folder works alone; without
            one the pipeline takes text features only.
        scale_schedule (`Sequence[Sequence[int]]`, *optional*):
            As in [`load_original`].

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: if a file is not what it should be, the folder is in use, or the disk is too full.
    """
    dtype = checked_dtype(dtype)
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: name a new folder, or remove this one first.")
    files = open_original(transformer, tokenizer, config, dtype, text_encoder, scale_schedule)
    own = {"transformer": files.transformer, "vae": files.tokenizer}
    converted = sum(part.num_bytes(dtype) for part in own.values())
    encoder = files.text_components.get("text_encoder")
    needed = converted + (0 if encoder is None else encoder.get_memory_footprint())
    output.parent.mkdir(parents=True, exist_ok=True)
    available = shutil.disk_usage(output.parent).free
    if available < needed:
        raise ValueError(f"{output} needs {needed / 1e9:.1f} GB, but only {available / 1e9:.1f} GB are free there.")
    unfinished = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}"
    try:
        with tqdm(total=converted, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar:
            for name, part in own.items():
                part.save(unfinished / name, dtype, max_shard_size, bar.update)
        for name, component in files.text_components.items():
            component.save_pretrained(unfinished / name, max_shard_size=max_shard_size)
        write_model_index(unfinished, files)
        if output.is_dir():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def open_original(
    transformer: str | Path,
    tokenizer: str | Path,
    config: dict[str, dict[str, Any]] | None,
    dtype: torch.dtype,
    text_encoder: str | Path | None,
    scale_schedule: Sequence[Sequence[int]] | None,
) -> OpenOriginal:
    """Both files, of a family that the transformer shows, and the text encoder."""
    config = checked_config(config)
    state_dict = read_state_dict(transformer)
    kind = check_kind(
        "transformer", str(transformer), state_dict, tuple(family.transformer_kind for family in FAMILIES)
    )
    family = next(family for family in FAMILIES if family.transformer_kind == kind)
    family.check_text_arguments(text_encoder, scale_schedule)
    schedule = None if scale_schedule is None else checked_schedule(scale_schedule)
    transformer_part = family.convert_transformer(str(transformer), state_dict, config["transformer"])
    state_dict = read_state_dict(tokenizer)
    check_kind("tokenizer", str(tokenizer), state_dict, (family.tokenizer_kind,))
    tokenizer_part = family.convert_tokenizer(str(tokenizer), state_dict, config["tokenizer"])
    family.match(transformer_part, tokenizer_part, config)
    pipeline_config = family.pipeline_config(transformer_part, tokenizer_part)
    if schedule is not None:
        pipeline_config["scale_schedule"] = schedule
    text_components = {}
    if text_encoder is not None:
        text_components = load_text_encoder(text_encoder, transformer_part.model.config["text_channels"], dtype)
    return OpenOriginal(family, transformer_part, tokenizer_part, pipeline_config, text_components)


def checked_schedule(scale_schedule: Any) -> list[list[int]]:
    """`scale_schedule` as a pipeline stores it, if it is one."""
    try:
        schedule = Schedule(tuple((index(height), index(width)) for height, width in scale_schedule))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`scale_schedule` must hold height and width of every token map, such as [(1, 1), (2, 2), (4, 4)], but is "
            f"{scale_schedule!r}."
        ) from error
    return [list(size) for size in schedule.sizes]


def checked_config(config: Any) -> dict[str, dict[str, Any]]:
    """`config` with both of its parts."""
    config = {} if config is None else config
    if (
        not isinstance(config, dict)
        or not set(config) <= set(PARTS)
        or not all(isinstance(v, dict) for v in config.values())
    ):
        raise ValueError(
            f'`config` must be a dict {{"transformer": {{...}}, "tokenizer": {{...}}}} but is {config!r}.'
        )
    return {part: config.get(part, {}) for part in PARTS}


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, float32 if it is `None`."""
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPE_NAMES))} but is {dtype!r}.")
    return dtype


def write_model_index(folder: Path, files: OpenOriginal):
    """`model_index.json`, as the family's pipeline itself writes it."""
    # The pipelines import this package, so they can only be imported once it is there.
    from ..pipelines import PIPELINES

    pipeline_class: Any = next(entry for entry in PIPELINES if entry.family == files.family.name)
    pipe = pipeline_class(
        transformer=files.transformer.model,
        vae=files.tokenizer.model,
        **files.text_components,
        **files.pipeline_config,
    )
    pipe.save_config(folder)
