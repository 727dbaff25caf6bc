"""Makes the class-conditional demo model from nothing: data, tokenizer, transformer, export with head profile.

Every part that is finished is skipped and a part that was stopped goes on from its last checkpoint, so run it again after
an interruption.
"""

import argparse
import shutil
from pathlib import Path

import data
import train_tokenizer
import train_transformer
from export import export, save_profile


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the data set")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--tokenizer-minutes", type=float, default=28)
    parser.add_argument("--transformer-minutes", type=float, default=66)
    parser.add_argument("--batch-size", type=int, default=24, help="pictures in a step of the transformer")
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not (arguments.data / "classes.json").exists():
        data.build(arguments.data)
    if not (arguments.runs / "vae").exists():
        train_tokenizer.train(arguments.data, arguments.runs, arguments.tokenizer_minutes, batch_size=8)
    if not (arguments.runs / "transformer").exists():
        train_transformer.train(arguments.data, arguments.runs, arguments.transformer_minutes, arguments.batch_size)
    export(arguments.data, arguments.runs, arguments.output)
    save_profile(arguments.output, samples=70)
    shutil.copy(here / "NOTICE.md", arguments.output)


if __name__ == "__main__":
    main()
