"""Writes the averaged weights of a training of the text-to-image model, finished or not, as a pipeline folder in half precision.

With the head profile of the model beside them, and on demand the bits of the held-out pictures, which the benchmarks
measure on.
"""

import argparse
import json
from pathlib import Path

import torch
from captions import STYLE_NAMES, caption, clean
from common import save_sheet
from data import BACKGROUNDS, HELD_OUT_CONCEPT, HELD_OUT_PICTURE, TRAIN, EmojiData, load_data, plain_view
from safetensors.torch import save_file
from train_bsq_tokenizer import CONFIG as TOKENIZER_CONFIG
from train_infinity import TextToBits, text_tokenizer
from train_tokenizer import PATCH_NUMS, SIDE

from hack_pipelines import HackVARTextPipeline, MultiScaleBSQModel
from hack_pipelines.calibration import calibrate


# Judged on sheets and on `agreement.py`: more guidance than the released models need, because this one is small.
SAMPLING = {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2, "top_p": 0.9}


def export(data: EmojiData, runs: Path, output: Path) -> HackVARTextPipeline:
    """Saves text encoder, transformer and both tokenizers in `output`, and returns the pipeline that was saved."""
    # A model that was loaded remembers the folder, which is nobody's business.
    vae = MultiScaleBSQModel(**TOKENIZER_CONFIG)
    vae.load_state_dict(MultiScaleBSQModel.from_pretrained(runs / "bsq").state_dict())
    tokenizer = text_tokenizer(data, runs / "text_tokenizer")
    tokenizer.name_or_path = ""
    model = TextToBits(tokenizer, vae.bits_per_token)
    model.load_state_dict(torch.load(runs / "infinity.pt", weights_only=True)["average"])
    pipe = HackVARTextPipeline(
        model.transformer.half(),
        vae.half(),
        model.text_encoder.half(),
        tokenizer,
        sampling=SAMPLING,
        scale_schedule=[[side, side] for side in PATCH_NUMS],
    )
    pipe.save_pretrained(output)
    return pipe


def training_captions(data: EmojiData, count: int) -> list[str]:
    """Captions of training pictures, spread evenly over classes and styles, with backgrounds and wordings in turn."""
    rows = data.indices(TRAIN)
    order = torch.argsort(data.class_ids[rows], stable=True)[torch.arange(count) * len(rows) // count]
    names = (None, *BACKGROUNDS)
    texts = []
    for number, row in enumerate(rows[order].tolist()):
        style = data.styles[row] if number % 3 else None
        texts.append(caption(clean(data.captions[row]), style, names[number % len(names)], number))
    return texts


def save_profile(data: EmojiData, output: Path, samples: int) -> None:
    """Calibrates the saved pipeline, as users do, and keeps the head profile beside its weights."""
    pipe = HackVARTextPipeline.from_pretrained(output)
    inputs = training_captions(data, samples)
    profile = calibrate(pipe, num_samples=samples, batch_size=10, inputs=inputs, base_model="demo")
    profile.save_pretrained(output / "head_profile")


@torch.no_grad()
def save_held_out(data: EmojiData, output: Path, path: Path) -> None:
    """Bits of all held-out pictures on white, as the saved tokenizer sees them, and a JSON with their captions beside.

    `tokens` are `[pictures, N, bits]` in uint8, `seen` tells other pictures of trained concepts from held-out concepts.
    """
    pipe = HackVARTextPipeline.from_pretrained(output)
    seen, unseen = data.indices(HELD_OUT_PICTURE), data.indices(HELD_OUT_CONCEPT)
    rows = torch.cat((seen, unseen))
    features = torch.cat([pipe.vae.encode(plain_view(data.images[part], SIDE)) for part in rows.split(32)])
    tokens = torch.cat(pipe.vae.tokenize(features, pipe.schedule), dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": tokens, "seen": torch.arange(len(rows)) < len(seen)}, path)
    texts = [caption(clean(data.captions[row]), data.styles[row]) for row in rows.tolist()]
    path.with_suffix(".json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


def save_samples(data: EmojiData, output: Path, path: Path, seed: int) -> None:
    """One picture of a concept of each class, styles and backgrounds in turn, as a sheet; prints what was asked for."""
    pipe = HackVARTextPipeline.from_pretrained(output)
    rows, names, texts = data.indices(TRAIN).tolist(), list(BACKGROUNDS), []
    for number in range(len(data.class_names)):
        label = next(clean(data.captions[row]) for row in rows if data.class_ids[row] == number)
        texts.append(caption(label, list(STYLE_NAMES)[number % 2], names[number % len(names)]))
    generator = torch.Generator().manual_seed(seed)
    save_sheet(pipe(texts, generator=generator, output_type="pt").images * 2 - 1, 14, path)
    print("\n".join(texts))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument(
        "--profile-samples", type=int, default=70, help="images to calibrate on; 0 leaves the profile out"
    )
    parser.add_argument("--held-out", type=Path, help="safetensors file for the bits of the held-out pictures")
    parser.add_argument("--sheet", type=Path, help="PNG of one sample a class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = load_data(arguments.data)
    export(data, arguments.runs, arguments.output)
    if arguments.profile_samples:
        save_profile(data, arguments.output, arguments.profile_samples)
    if arguments.held_out is not None:
        save_held_out(data, arguments.output, arguments.held_out)
    if arguments.sheet is not None:
        save_samples(data, arguments.output, arguments.sheet, arguments.seed)


if __name__ == "__main__":
    main()
