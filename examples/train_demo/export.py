"""Writes the averaged weights of a training, finished or not, as a pipeline folder in half precision.

With the head profile of the model beside them, and on demand the tokens of the held-out pictures, which the benchmarks
measure on.
"""

import argparse
import json
from pathlib import Path

import torch
from common import save_sheet
from data import HELD_OUT_CONCEPT, HELD_OUT_PICTURE, load_data, plain_view
from safetensors.torch import save_file
from train_tokenizer import CONFIG as TOKENIZER_CONFIG
from train_tokenizer import SIDE
from train_transformer import CONFIG

from hack_pipelines import HackVARClassPipeline, MultiScaleVQModel, VARTransformer2DModel
from hack_pipelines.calibration import calibrate


# Judged on sheets of samples: more guidance than the released models need, because this one is small.
SAMPLING = {"guidance_scale": 4.0, "top_k": 100, "top_p": 0.8}


def export(data: Path, runs: Path, output: Path) -> HackVARClassPipeline:
    """Saves tokenizer, transformer and class names in `output`, and returns the pipeline that was saved."""
    class_names = json.loads((data / "classes.json").read_text())
    # A model that was loaded remembers the folder, which is nobody's business.
    vae = MultiScaleVQModel(**TOKENIZER_CONFIG)
    vae.load_state_dict(MultiScaleVQModel.from_pretrained(runs / "vae").state_dict())
    transformer = VARTransformer2DModel(
        **CONFIG,
        num_classes=len(class_names),
        vocab_size=vae.config.vocab_size,
        latent_channels=vae.config.latent_channels,
    )
    transformer.load_state_dict(torch.load(runs / "transformer.pt", weights_only=True)["average"])
    pipe = HackVARClassPipeline(transformer.half(), vae.half(), dict(enumerate(class_names)), SAMPLING)
    pipe.save_pretrained(output)
    return pipe


def save_profile(output: Path, samples: int) -> None:
    """Calibrates the saved pipeline, as users do, and keeps the head profile beside its weights."""
    pipe = HackVARClassPipeline.from_pretrained(output)
    calibrate(pipe, num_samples=samples, batch_size=10, base_model="demo-class").save_pretrained(
        output / "head_profile"
    )


@torch.no_grad()
def save_held_out(data_folder: Path, output: Path, path: Path) -> None:
    """Tokens and classes of all held-out pictures, as the saved tokenizer sees them.

    `tokens` are `[pictures, N]` in int16, `labels` are class ids, `seen` tells other pictures of trained concepts from
    held-out concepts.
    """
    data = load_data(data_folder)
    pipe = HackVARClassPipeline.from_pretrained(output)
    seen, unseen = data.indices(HELD_OUT_PICTURE), data.indices(HELD_OUT_CONCEPT)
    rows = torch.cat((seen, unseen))
    features = torch.cat([pipe.vae.encode(plain_view(data.images[part], SIDE)) for part in rows.split(32)])
    tokens = torch.cat(pipe.vae.tokenize(features, pipe.transformer.schedule), dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": tokens.short(), "labels": data.class_ids[rows], "seen": torch.arange(len(rows)) < len(seen)}
    save_file(arrays, path)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument(
        "--profile-samples", type=int, default=70, help="images to calibrate on; 0 leaves the profile out"
    )
    parser.add_argument("--held-out", type=Path, help="safetensors file for the tokens of the held-out pictures")
    parser.add_argument("--sheet", type=Path, help="PNG of one sample a class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    export(arguments.data, arguments.runs, arguments.output)
    if arguments.profile_samples:
        save_profile(arguments.output, arguments.profile_samples)
    if arguments.held_out is not None:
        save_held_out(arguments.data, arguments.output, arguments.held_out)
    if arguments.sheet is not None:
        pipe = HackVARClassPipeline.from_pretrained(arguments.output)
        classes = list(range(pipe.transformer.config.num_classes))
        generator = torch.Generator().manual_seed(arguments.seed)
        images = pipe(class_labels=classes, generator=generator, output_type="pt").images
        save_sheet(images * 2 - 1, 14, arguments.sheet)


if __name__ == "__main__":
    main()
