"""Makes the class-conditional demo model from nothing: data, tokenizer, transformer, export.

Every part that is finished is skipped and a part that was stopped goes on from its last checkpoint, so run it again after
an interruption.
"""

import argparse
from pathlib import Path

import data
import train_tokenizer
import train_transformer
from export import export


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the data set")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--tokenizer-minutes", type=float, default=28)
    parser.add_argument("--transformer-minutes", type=float, default=75)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not (arguments.data / "classes.json").exists():
        data.build(arguments.data)
    if not (arguments.runs / "vae").exists():
        train_tokenizer.train(arguments.data, arguments.runs, arguments.tokenizer_minutes, batch_size=8)
    if not (arguments.runs / "transformer").exists():
        train_transformer.train(arguments.data, arguments.runs, arguments.transformer_minutes, batch_size=16)
    export(arguments.data, arguments.runs, arguments.output)


if __name__ == "__main__":
    main()
