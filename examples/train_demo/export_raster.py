"""Writes the averaged weights of the raster model, its training finished or not, as a folder of `transformers`.

In half precision, with the image tokenizer in `vae`, and on demand the codes of the held-out pictures, which the
benchmarks measure on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from captions import caption, clean
from common import save_sheet
from data import HELD_OUT_CONCEPT, HELD_OUT_PICTURE, EmojiData, load_data
from raster import SCHEDULE, load_raster, sample_raster
from safetensors.torch import save_file
from train_raster import TOKENIZER_CONFIG, encode_plain, make_model

from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel


SHEET_BATCH = 35


def export(data: EmojiData, runs: Path, output: Path) -> None:
    """Saves transformer, image tokenizer and the notice of the pictures' licences in `output`."""
    # A model that was loaded remembers the folder, which is nobody's business.
    vae = MultiScaleVQModel(**TOKENIZER_CONFIG)
    vae.load_state_dict(MultiScaleVQModel.from_pretrained(runs / "vae").state_dict())
    model = make_model(data.class_names)
    model.load_state_dict(torch.load(runs / "raster.pt", weights_only=True)["average"])
    model.half().save_pretrained(output)
    vae.half().save_pretrained(output / "vae")
    shutil.copy(Path(__file__).parent / "NOTICE.md", output)


def save_held_out(data: EmojiData, output: Path, path: Path) -> None:
    """Codes and classes of all held-out pictures, as the saved tokenizer sees them, and a JSON with their captions beside.

    `tokens` are `[pictures, 256]` in int16, row by row, `labels` are class ids, `seen` tells other pictures of trained
    concepts from held-out concepts.
    """
    _, vae = load_raster(output)
    seen, unseen = data.indices(HELD_OUT_PICTURE), data.indices(HELD_OUT_CONCEPT)
    rows = torch.cat((seen, unseen))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "tokens": encode_plain(vae, data, rows).short(),
            "labels": data.class_ids[rows],
            "seen": torch.arange(len(rows)) < len(seen),
        },
        path,
    )
    texts = [caption(clean(data.captions[row]), data.styles[row]) for row in rows.tolist()]
    path.with_suffix(".json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


@torch.no_grad()
def save_samples(output: Path, path: Path, seed: int) -> None:
    """One picture of each class; picture number i has the seed `seed + i`."""
    model, vae = load_raster(output)
    images = []
    for classes in torch.arange(len(model.config.id2label)).split(SHEET_BATCH):
        generators = [torch.Generator().manual_seed(seed + number) for number in classes.tolist()]
        tokens = sample_raster(model, classes, generator=generators)
        images.append(vae.decode(vae.quantizer.upsample(tokens, 0, SCHEDULE)))
    save_sheet(torch.cat(images), 14, path)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs" / "raster", help="folder of the trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--held-out", type=Path, help="safetensors file for the codes of the held-out pictures")
    parser.add_argument("--sheet", type=Path, help="PNG of one sample a class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = load_data(arguments.data)
    export(data, arguments.runs, arguments.output)
    if arguments.held_out is not None:
        save_held_out(data, arguments.output, arguments.held_out)
    if arguments.sheet is not None:
        save_samples(arguments.output, arguments.sheet, arguments.seed)


if __name__ == "__main__":
    main()
