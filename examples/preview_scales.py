"""Saves a preview of the picture after every scale, and stops early when asked to.

python examples/preview_scales.py "a smiling cat" --output-dir previews
"""

import argparse
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor

from hack_pipelines import HackVARPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", help="a prompt, or the name of a class for a class-conditional model")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--stop-after", type=int, help="scales to draw before stopping")
    parser.add_argument("--output-dir", type=Path, default=Path("previews"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = HackVARPipeline.from_pretrained(args.model)

    def preview(pipe, step, size, callback_kwargs):
        pixels = pipe.decode_latents(callback_kwargs["latents"])
        image = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))[0]
        image.save(args.output_dir / f"scale_{step}_{size[0]}x{size[1]}.png")
        pipe._interrupt = step + 1 == args.stop_after
        return callback_kwargs

    generator = torch.Generator().manual_seed(0)
    # What is drawn is the first argument of both families.
    out = pipe(args.input, generator=generator, kv_budget=0.3, callback_on_step_end=preview)
    out.images[0].save(args.output_dir / "final.png")
    print(out.cache_report)


if __name__ == "__main__":
    main()
