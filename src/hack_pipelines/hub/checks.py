"""Whether a folder in diffusers layout is whole, told from headers before any weight is read."""

import re
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open

from ..convert.original import read_weight_map
from ..models.autoencoder_bsq import MultiScaleBSQModel
from ..models.autoencoder_msvq import MultiScaleVQModel
from ..models.transformer_infinity import InfinityTransformer2DModel
from ..models.transformer_var import VARTransformer2DModel
from .files import DOWNLOAD_AGAIN, read_json


# Modules whose classes a model_index.json may name: diffusers imports what it names.
LIBRARIES = ("diffusers", "hack_pipelines", "transformers")
OWN_MODELS: dict[tuple[str, str], type[ModelMixin]] = {
    (model.__module__, model.__name__): model
    for model in (InfinityTransformer2DModel, MultiScaleBSQModel, MultiScaleVQModel, VARTransformer2DModel)
}
WEIGHTS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS_NAME = "model"
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt")


def check_weights(folder: Path, components: list[str], variant: str | None = None):
    """
    Compare the weight files of a pipeline folder with the models that they are for.

    Args:
        folder (`Path`):
            Folder with a `model_index.json`.
        components (`list[str]`):
            Which components to compare. Of those whose class is of transformers, the files are looked at, but not whether
            every weight is there; those of other classes are left alone.
        variant (`str`, *optional*):
            Variant of the weight files.

    Raises:
        `ValueError`: if a weight is missing, unexpected or of another shape, a file is missing or damaged, or the folder
            names code or files from elsewhere.
    """
    classes = component_classes(folder)
    own = {name: OWN_MODELS[classes[name]] for name in components if classes.get(name) in OWN_MODELS}
    variants = {name: variant if has_weights(folder / name, variant) else None for name in own}
    if variant is not None and own and not any(variants.values()):
        raise ValueError(f"{folder} has no weight files of variant {variant!r}: {known_variants(folder)}.")
    for name, model_class in own.items():
        check_component(folder / name, model_class, variants[name])
    for name in components:
        module, class_name = classes.get(name, ("", ""))
        # Tokenizers have no weights.
        if module == "transformers" and "Tokenizer" not in class_name:
            stem = TRANSFORMERS_WEIGHTS_NAME
            stored_shapes(folder / name, variant if has_weights(folder / name, variant, stem) else None, stem)


def component_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Module and class of every component that `model_index.json` names."""
    path = folder / "model_index.json"
    classes = {}
    for name, entry in read_json(path).items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            continue
        module, class_name = entry
        if module.split(".")[0] not in LIBRARIES:
            raise ValueError(
                f"{path} names {class_name} of module {module!r} as {name!r}: only classes of {', '.join(LIBRARIES)} are "
                "loaded, because any other could run code that came with the model."
            )
        if module.startswith("hack_pipelines") and (module, class_name) not in OWN_MODELS:
            raise ValueError(
                f"{path} names {class_name} of module {module!r} as {name!r}, which this version of hack_pipelines does not "
                "have: install the version that the model was made with, or a newer one."
            )
        if not name.isidentifier():
            raise ValueError(f"{path} names a component {name!r}: it must be the name of a folder beside it.")
        classes[name] = (module, class_name)
    return classes


def check_component(folder: Path, model_class: type[ModelMixin], variant: str | None):
    """Compare the weight files of one model with its configuration."""
    config_path = folder / "config.json"
    config = read_json(config_path)
    try:
        with torch.device("meta"):
            model = model_class.from_config(config)
    # A damaged configuration makes the model fail in whatever line first meets it.
    except Exception as error:
        raise ValueError(f"{config_path} is not the configuration of a {model_class.__name__}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = stored_shapes(folder, variant)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder} lacks {name}, which must have shape {shape}.")
        path, stored, dtype = found[name]
        if stored != shape:
            raise ValueError(f"{path}: {name} has shape {stored} but must have {shape}, as config.json says.")
        if not dtype.startswith(("F", "BF")):
            raise ValueError(f"{path}: {name} has dtype {dtype} but must be of a floating dtype.")
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        path, stored, _ = found[unexpected[0]]
        raise ValueError(
            f"{path}: {unexpected[0]}{more}, of shape {stored}, is not part of the {model_class.__name__} in config.json."
        )


def stored_shapes(
    folder: Path, variant: str | None, stem: str = WEIGHTS_NAME
) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor in the weight files of a model, whose names begin with `stem`."""
    index_path = folder / index_name(variant, stem)
    if not index_path.is_file():
        path = folder / weights_name(variant, stem)
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}{pickles_instead(folder)}.")
        return read_header(path)
    weight_map = read_weight_map(index_path, (".safetensors",))
    stored: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder} has no {file}, which {index_path.name} names: the download is incomplete, {DOWNLOAD_AGAIN}."
            )
        stored.update(read_header(folder / file))
    for name, file in weight_map.items():
        if name not in stored or stored[name][0].name != file:
            raise ValueError(f"{index_path} says that {name} is in {file}, but it is not.")
    return stored


def read_header(path: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors file, whose length is compared with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (path, tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): {DOWNLOAD_AGAIN}.") from error


def weights_name(variant: str | None, stem: str = WEIGHTS_NAME) -> str:
    """The weight file of a model that has one."""
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def index_name(variant: str | None, stem: str = WEIGHTS_NAME) -> str:
    """The file that says in which of several files a weight is."""
    return f"{stem}.safetensors.index.json" if variant is None else f"{stem}.safetensors.index.{variant}.json"


def has_weights(folder: Path, variant: str | None, stem: str = WEIGHTS_NAME) -> bool:
    """Whether there is a weight file, or an index of several, of a variant."""
    return (folder / weights_name(variant, stem)).is_file() or (folder / index_name(variant, stem)).is_file()


def known_variants(folder: Path) -> str:
    """What can be asked for instead of a variant that is not there."""
    pattern = re.compile(re.escape(WEIGHTS_NAME) + r"\.(.+?)(-\d{5}-of-\d{5})?\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.glob(f"*/{WEIGHTS_NAME}*.safetensors"))
    names = sorted({match[1] for match in matches if match})
    return f"it has {', '.join(names)}" if names else "it has no variants, leave `variant` out"


def pickles_instead(folder: Path) -> str:
    """Why a folder with pickle files only is not loaded."""
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    there = f" (there is {', '.join(pickles)})" if pickles else ""
    return f"; pickle files{there} are neither fetched nor read, because they can run code"
