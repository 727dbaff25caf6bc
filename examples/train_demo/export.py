"""Writes the averaged weights of a training, finished or not, as a pipeline folder in half precision."""

import argparse
import json
from pathlib import Path

import torch
from common import save_sheet
from train_transformer import CONFIG

from hack_pipelines import HackVARClassPipeline, MultiScaleVQModel, VARTransformer2DModel


# Judged on sheets of samples: more guidance than the released models need, because this one is small.
SAMPLING = {"guidance_scale": 3.0, "top_k": 200, "top_p": 0.9}


def export(data: Path, runs: Path, output: Path) -> HackVARClassPipeline:
    """Saves tokenizer, transformer and class names in `output`, and returns the pipeline that was saved."""
    class_names = json.loads((data / "classes.json").read_text())
    vae = MultiScaleVQModel.from_pretrained(runs / "vae")
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


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--sheet", type=Path, help="PNG of one sample a class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    export(arguments.data, arguments.runs, arguments.output)
    if arguments.sheet is not None:
        pipe = HackVARClassPipeline.from_pretrained(arguments.output)
        classes = list(range(pipe.transformer.config.num_classes))
        generator = torch.Generator().manual_seed(arguments.seed)
        images = pipe(class_labels=classes, generator=generator, output_type="pt").images
        save_sheet(images * 2 - 1, 14, arguments.sheet)


if __name__ == "__main__":
    main()
