"""From a name to a folder in diffusers layout."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from ..convert import convert_original
from ..convert.original import INDEXES, find_index, read_weight_map
from ..models.infinity_schedules import template_schedule
from .client import download, snapshot
from .errors import explained
from .originals import OriginalModel, OriginalRepo, original_repo


DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo_models"
DEMOS = {"demo": "text", "demo-class": "class"}

# Pickle files and code are never asked for. A head profile has one weight file, whatever the variant.
SMALL_FILES = ["model_index.json", "*/*.json", "*/spiece.model", "README.md", "head_profile/*.safetensors"]
VARIANT_FILES = ["*/diffusion_pytorch_model.*.safetensors", "*/model.*.safetensors"]
TEXT_ENCODER_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
]
# Part of the name of converted folders: raise it when what the converter writes changes.
CONVERTER_VERSION = 1


@dataclass(frozen=True)
class Source:
    """
    A model in diffusers layout.

    Args:
        folder (`Path`):
            Where it is.
        variant (`str`, *optional*):
            Variant of its weight files.
        original (`OriginalRepo`, *optional*):
            Repo whose files were converted.
        original_variant (`str`, *optional*):
            Which of its models.
    """

    folder: Path
    variant: str | None = None
    original: OriginalRepo | None = None
    original_variant: str | None = None


def locate(
    name_or_path: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    force_download: bool = False,
) -> Source:
    """
    Find a model, and fetch it if it is not here.

    Args:
        name_or_path (`str` or `Path`):
            A folder in diffusers layout, `"demo"` or `"demo-class"`, an original repo, or a Hub repo in diffusers layout, in this order.
        variant (`str`, *optional*):
            Model of an original repo; variant of the weight files otherwise.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repo.
        token (`str` or `bool`, *optional*):
            For private repos; by default the one of `hf auth login`.
        cache_dir (`str` or `Path`, *optional*):
            Where downloads and converted models are kept instead of the cache of the Hub's client.
        local_files_only (`bool`, *optional*):
            Whether to do without the network.
        force_download (`bool`, *optional*, defaults to `False`):
            Whether to fetch, and convert, what is in the cache already.

    Returns:
        [`Source`]: the folder.

    Raises:
        `ValueError`: if there is no such model, revision or variant.
        `ConnectionError`: if the Hub cannot be reached and the cache does not have it.
    """
    name = str(name_or_path)
    if variant is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", variant):
        raise ValueError(f"`variant` must be a name such as 'fp16' or 'd16' but is {variant!r}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path, variant)
    if path.is_file():
        raise ValueError(f"{path} is a file: open original files with `HackVARPipeline.from_original`.")
    if name in DEMOS:
        return Source(demo_folder(name), variant)
    options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": bool(local_files_only),
        "force_download": force_download,
    }
    repo = original_repo(name)
    if repo is not None:
        return Source(converted_folder(repo, variant, options), None, repo, variant)
    return Source(downloaded_folder(name, variant, options), variant)


def demo_folder(name: str) -> Path:
    """The folder of a model inside the package."""
    folder = DEMO_FOLDER / DEMOS[name]
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{name!r} should be in {folder} but is not: this installation is incomplete, install it again."
        )
    return folder


def downloaded_folder(name: str, variant: str | None, options: dict[str, Any]) -> Path:
    """Snapshot of a Hub repo in diffusers layout, with the weight files of one variant only."""
    with explained(name, options["revision"]):
        if variant is None:
            folder = snapshot(name, [*SMALL_FILES, "*/*.safetensors"], VARIANT_FILES, options)
        else:
            weights = [f"*/*.{variant}.safetensors", f"*/*.{variant}-*.safetensors"]
            folder = snapshot(name, [*SMALL_FILES, *weights], [], options)
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"The Hub repo {name!r} has no model_index.json, so it is no pipeline in diffusers layout, and its original "
                "files, if it has some, are not known here: download them and use `HackVARPipeline.from_original`."
            )
        if variant is not None:
            having = {path.parent for path in folder.glob(f"*/*.{variant}[.-]*") if path.suffix == ".safetensors"}
            without = sorted(path.parent.name for path in folder.glob("*/config.json") if path.parent not in having)
            if not having:
                raise ValueError(
                    f"The Hub repo {name!r} has no weight files of variant {variant!r}: leave `variant` out, or give one that "
                    "its page lists under Files."
                )
            if without:
                # As everywhere in diffusers, a component that has no such variant is loaded without one.
                options = {**options, "revision": folder.name}
                snapshot(name, [f"{component}/*.safetensors" for component in without], VARIANT_FILES, options)
    return folder


def converted_folder(repo: OriginalRepo, variant: str | None, options: dict[str, Any]) -> Path:
    """An original model in diffusers layout: converted at the first call, found in the cache at later ones."""
    if variant not in repo.models:
        raise ValueError(
            f"{repo.name} holds several models: `variant` must be one of {', '.join(repo.models)} but is {variant!r}."
        )
    model = repo.models[variant]
    with explained(repo.name, options["revision"]):
        # Asks the Hub, or the cache without a network, which commit the revision is.
        commit = snapshot(repo.name, ["README.md"], [], {**options, "force_download": False}).name
        base = Path(options["cache_dir"] or constants.HF_HOME).expanduser() / "hack_pipelines"
        parent = base / f"converted-v{CONVERTER_VERSION}" / repo.name.replace("/", "--") / commit
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / variant
        # One process converts; others that want the same model wait and find it done.
        with WeakFileLock(parent / f"{variant}.lock"):
            if folder.is_dir() and not options["force_download"]:
                return folder
            # Under the lock nobody is at work here: what is unfinished belonged to a process that was killed.
            for unfinished in parent.glob(f".{variant}.*"):
                shutil.rmtree(unfinished)
            transformer, tokenizer = original_files(repo.name, model, {**options, "revision": commit})
            text_encoder = None
            if repo.text_encoder is not None:
                # A revision is one of the model's own repo.
                text_encoder = text_encoder_folder(repo.text_encoder, {**options, "revision": None})
            schedule = None if model.pixel_class is None else template_schedule(1.0, model.pixel_class).sizes
            if folder.is_dir():
                shutil.rmtree(folder)
            return convert_original(transformer, tokenizer, folder, text_encoder=text_encoder, scale_schedule=schedule)


def original_files(name: str, model: OriginalModel, options: dict[str, Any]) -> tuple[Path, Path]:
    """Transformer and image tokenizer of an original repo, in the cache of the Hub's client."""
    if not model.transformer.endswith("/"):
        transformer = download(name, model.transformer, options)
    else:
        part = model.transformer
        transformer = snapshot(name, [f"{part}{pattern}" for pattern, _ in INDEXES], [], options) / part
        # As when such a folder is read: the first index that is there counts.
        indexes = [(find_index(transformer, pattern), suffixes) for pattern, suffixes in INDEXES]
        found = next(((index, suffixes) for index, suffixes in indexes if index is not None), None)
        if found is None:
            raise ValueError(
                f"The Hub repo {name!r} has no index of shards in {part}, such as model.safetensors.index.json."
            )
        shards = sorted(set(read_weight_map(*found).values()))
        snapshot(name, [f"{part}{shard}" for shard in shards], [], options)
    return transformer, download(name, model.tokenizer, options)


def text_encoder_folder(name: str | Path, options: dict[str, Any] | None = None) -> Path:
    """
    The folder of a text encoder and its tokenizer, fetched if it is not here.

    Args:
        name (`str` or `Path`):
            A folder, or a Hub repo.
        options (`dict[str, Any]`, *optional*):
            What the Hub's client takes: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        `ValueError`: if there is no such folder or repo.
        `ConnectionError`: if the Hub cannot be reached and the cache does not have it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    options = options or {}
    with explained(str(name), options.get("revision")):
        return snapshot(str(name), TEXT_ENCODER_FILES, [], options)
