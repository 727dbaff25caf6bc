"""Loading original files, and turning them into a pipeline folder."""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..models.autoencoder_msvq import MultiScaleVQModel
from ..models.transformer_var import VARTransformer2DModel
from .conversion import DTYPE_NAMES, Conversion
from .kinds import MSVQ, VAR, check_kind
from .msvq import tokenizer_conversion
from .original import read_state_dict
from .var import transformer_conversion


IMAGENET_CLASSES = 1000
DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"
PARTS = ("transformer", "tokenizer")


@dataclass(frozen=True)
class Original:
    """
    Models that came from original files.

    Args:
        family (`str`):
            Which pipeline they make: `"var"`.
        transformer ([`VARTransformer2DModel`]):
            In eval mode.
        vae ([`MultiScaleVQModel`]):
            The image tokenizer, in eval mode.
        pipeline_config (`dict[str, Any]`):
            What the pipeline is made with besides the models.
    """

    family: str
    transformer: VARTransformer2DModel
    vae: MultiScaleVQModel
    pipeline_config: dict[str, Any]


def load_original(
    transformer: str | Path,
    tokenizer: str | Path,
    config: dict[str, dict[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
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
            Of the weights, float32 by default. Tensors that need float32 keep it.

    Returns:
        [`Original`]: the models and what else their pipeline needs.

    Raises:
        `ValueError`: if a file is not what it should be; the message names the key, shape or file.
    """
    dtype = checked_dtype(dtype)
    transformer_part, tokenizer_part = open_original(transformer, tokenizer, config)
    return Original(
        family="var",
        transformer=transformer_part.load(dtype),
        vae=tokenizer_part.load(dtype),
        pipeline_config=pipeline_config(transformer_part.model),
    )


def convert_original(
    transformer: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    config: dict[str, dict[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "1GB",
    progress: bool = True,
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
            Of the weights, float32 by default. Tensors that need float32 keep it.
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`):
            Largest size of a weight file.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: if a file is not what it should be, the folder is in use, or the disk is too full.
    """
    dtype = checked_dtype(dtype)
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: name a new folder, or remove this one first.")
    transformer_part, tokenizer_part = open_original(transformer, tokenizer, config)
    needed = transformer_part.num_bytes(dtype) + tokenizer_part.num_bytes(dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    available = shutil.disk_usage(output.parent).free
    if available < needed:
        raise ValueError(f"{output} needs {needed / 1e9:.1f} GB, but only {available / 1e9:.1f} GB are free there.")
    unfinished = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}"
    try:
        with tqdm(total=needed, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar:
            for name, part in (("transformer", transformer_part), ("vae", tokenizer_part)):
                part.save(unfinished / name, dtype, max_shard_size, bar.update)
        write_model_index(unfinished, transformer_part.model, tokenizer_part.model)
        if output.is_dir():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def open_original(
    transformer: str | Path, tokenizer: str | Path, config: dict[str, dict[str, Any]] | None
) -> tuple[Conversion[VARTransformer2DModel], Conversion[MultiScaleVQModel]]:
    """Both files, read, recognised and checked, but not converted yet."""
    config = checked_config(config)
    transformer_state = read_state_dict(transformer)
    check_kind("transformer", str(transformer), transformer_state, VAR)
    tokenizer_state = read_state_dict(tokenizer)
    check_kind("tokenizer", str(tokenizer), tokenizer_state, MSVQ)
    transformer_part = transformer_conversion(str(transformer), transformer_state, config["transformer"])
    tokenizer_part = tokenizer_conversion(str(tokenizer), tokenizer_state, config["tokenizer"])
    for name in ("vocab_size", "latent_channels"):
        wanted, got = transformer_part.model.config[name], tokenizer_part.model.config[name]
        if wanted != got:
            raise ValueError(
                f"{transformer} and {tokenizer} do not belong together: `{name}` is {wanted} in the transformer but {got} "
                "in the tokenizer."
            )
    return transformer_part, tokenizer_part


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


def pipeline_config(transformer: VARTransformer2DModel) -> dict[str, Any]:
    """What the pipeline is made with besides its models: class names where the classes are those of ImageNet."""
    if transformer.config["num_classes"] != IMAGENET_CLASSES:
        return {}
    return {"id2label": json.loads((DATA_FOLDER / "imagenet_classes.json").read_text(encoding="utf-8"))}


def write_model_index(folder: Path, transformer: VARTransformer2DModel, vae: MultiScaleVQModel):
    """`model_index.json`, as the pipeline itself writes it."""
    # The pipelines import this package, so they can only be imported once it is there.
    from ..pipelines.pipeline_hack_var_class import HackVARClassPipeline

    pipe = HackVARClassPipeline(transformer=transformer, vae=vae, **pipeline_config(transformer))
    pipe.save_config(folder)
