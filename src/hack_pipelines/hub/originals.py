"""Repos of the original authors, and the files in them that make a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OriginalModel:
    """
    Original files of a model.

    Args:
        transformer (`str`):
            File of the transformer, or, with a `/` at the end, folder of its shards and of the index that names them.
        tokenizer (`str`):
            File of the image tokenizer.
        pixel_class (`str`, *optional*):
            For Infinity: size of the images that it was trained for, as in `infinity_schedules.py`.
    """

    transformer: str
    tokenizer: str
    pixel_class: str | None = None


@dataclass(frozen=True)
class OriginalRepo:
    """
    A Hub repo with original files.

    Args:
        name (`str`):
            Its name on the Hub.
        models (`dict[str, OriginalModel]`):
            What it holds, by variant.
        license (`str`):
            Of the weights, as the authors' code and model card name it.
        text_encoder (`str`, *optional*):
            Hub repo of the text encoder that all of its models were trained with.
    """

    name: str
    models: dict[str, OriginalModel]
    license: str
    text_encoder: str | None = None


ORIGINAL_REPOS = (
    OriginalRepo(
        name="FoundationVision/var",
        models={
            variant: OriginalModel(f"var_{variant}.pth", "vae_ch160v4096z32.pth")
            for variant in ("d16", "d20", "d24", "d30", "d36")
        },
        license="mit",
    ),
    OriginalRepo(
        name="FoundationVision/Infinity",
        models={
            "2b": OriginalModel("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", "1M"),
            "8b": OriginalModel("infinity_8b_weights/", "infinity_vae_d56_f8_14_patchify.pth", "1M"),
            "8b-512": OriginalModel("infinity_8b_512x512_weights/", "infinity_vae_d56_f8_14_patchify.pth", "0.25M"),
        },
        license="mit",
        text_encoder="google/flan-t5-xl",
    ),
)


def original_repo(name: str) -> OriginalRepo | None:
    """The repo of a name, which the Hub reads without regard to case."""
    return next((repo for repo in ORIGINAL_REPOS if repo.name.lower() == name.lower()), None)
