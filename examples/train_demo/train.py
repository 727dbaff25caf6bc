"""Makes a demo model from nothing: data, tokenizer, transformer, export with head profile.

Every part that is finished is skipped and a part that was stopped goes on from its last checkpoint, so run it again after
an interruption.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import export
import export_infinity
import train_bsq_tokenizer
import train_infinity
import train_tokenizer
import train_transformer


@dataclass(frozen=True)
class Recipe:
    """
    How a demo model is made.

    Args:
        tokenizer, transformer (`Callable`):
            Train a part, given the folder of the data, the folder of checkpoints, minutes and batch size.
        tokenizer_minutes, transformer_minutes (`float`):
            How long by default.
        tokenizer_done, transformer_done (`str`):
            What lies in the folder of checkpoints once a part is finished.
        export (`Callable`):
            Writes the pipeline with its profile, given the folder of the data, that of checkpoints and the output.
    """

    tokenizer: Callable[[Path, Path, float, int], Path]
    transformer: Callable[[Path, Path, float, int], Path]
    tokenizer_minutes: float
    transformer_minutes: float
    tokenizer_done: str
    transformer_done: str
    export: Callable[[Path, Path, Path], None]


def export_class(folder: Path, runs: Path, output: Path) -> None:
    """The class-conditional model, calibrated over its classes."""
    export.export(folder, runs, output)
    export.save_profile(output, samples=70)


def export_text(folder: Path, runs: Path, output: Path) -> None:
    """The text-to-image model, calibrated over training captions."""
    emoji = data.load_data(folder)
    export_infinity.export(emoji, runs, output)
    export_infinity.save_profile(emoji, output, samples=70)


RECIPES = {
    "text": Recipe(
        train_bsq_tokenizer.train, train_infinity.train, 17, 95, "bsq", train_infinity.FINISHED, export_text
    ),
    "class": Recipe(train_tokenizer.train, train_transformer.train, 28, 66, "vae", "transformer", export_class),
}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=RECIPES, default="text", help="text-to-image or class-conditional")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the data set")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--tokenizer-minutes", type=float, help="instead of what the shipped model took")
    parser.add_argument("--transformer-minutes", type=float, help="instead of what the shipped model took")
    parser.add_argument("--batch-size", type=int, default=24, help="pictures in a step of the transformer")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    arguments.data.mkdir(parents=True, exist_ok=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not (arguments.data / "classes.json").exists():
        data.build(arguments.data)
    if not (arguments.runs / recipe.tokenizer_done).exists():
        minutes = arguments.tokenizer_minutes or recipe.tokenizer_minutes
        recipe.tokenizer(arguments.data, arguments.runs, minutes, 8)
    if not (arguments.runs / recipe.transformer_done).exists():
        minutes = arguments.transformer_minutes or recipe.transformer_minutes
        recipe.transformer(arguments.data, arguments.runs, minutes, arguments.batch_size)
    recipe.export(arguments.data, arguments.runs, arguments.output)
    shutil.copy(here / "NOTICE.md", arguments.output)


if __name__ == "__main__":
    main()
