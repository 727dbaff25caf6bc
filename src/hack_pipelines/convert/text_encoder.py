"""The text encoder of a text-to-image model, which its authors did not publish themselves."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5EncoderModel

from .original import shown


# Without either, transformers would make up an empty tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
HALF_PRECISION = (torch.float16, torch.bfloat16)


def load_text_encoder(name: str | Path, text_channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """
    Load a T5 encoder and its tokenizer.

    Args:
        name (`str` or `Path`):
            Folder or Hub repo of both.
        text_channels (`int`):
            Width of the text features that the transformer reads.
        dtype (`torch.dtype`):
            Of the transformer. In half precision the encoder is float16, except what transformers keeps in float32: so the
            original runs it, and features in bfloat16 are others.

    Returns:
        `dict[str, Any]`: `text_encoder` in eval mode, and `tokenizer`.

    Raises:
        `ValueError`: if there is no T5 with safetensors weights, or it does not belong to the transformer.
        `ConnectionError`: if it is on the Hub, which cannot be reached, and not in the cache.
    """
    # Fetching needs the converter, so that can only ask for it once it is there.
    from ..hub.checks import TRANSFORMERS_WEIGHTS_NAME, stored_shapes
    from ..hub.files import read_json
    from ..hub.sources import text_encoder_folder

    folder = text_encoder_folder(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "t5":
        raise ValueError(
            f"`text_encoder` must be a T5 but {folder} holds a model of type {config.get('model_type')!r}: give "
            "'google/flan-t5-xl' or a folder with it."
        )
    if config.get("d_model") != text_channels:
        raise ValueError(
            f"`text_encoder` is {str(name)!r}, whose features have {config.get('d_model')} channels, but the transformer reads "
            f"{text_channels}: give the encoder that it was trained with."
        )
    stored_shapes(folder, None, TRANSFORMERS_WEIGHTS_NAME)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer: expected {' or '.join(TOKENIZER_FILES)} beside the text encoder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Whatever is missing or damaged makes it fail in any way there is.
    except Exception as error:
        raise ValueError(f"{folder} has a tokenizer that cannot be read ({error}): download it again.") from error
    loaded: Any = T5EncoderModel.from_pretrained(
        folder,
        dtype=torch.float16 if dtype in HALF_PRECISION else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    text_encoder, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder} is no complete T5EncoderModel: it lacks {shown(missing)}.")
    return {"text_encoder": text_encoder.eval(), "tokenizer": tokenizer}
