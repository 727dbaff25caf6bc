"""The same as `hack-pipelines generate --output-dir`, for scripts that draw in their own way: `torchrun draw.py FOLDER`."""

import sys
from pathlib import Path

import torch

from hack_pipelines import HackVARPipeline
from hack_pipelines.distributed import PictureFolder, split_work


PROMPTS = ["a red apple", "a smiling cat", "a birthday cake", "a tree, 3d style"]
SETTINGS = {"model": "demo", "kv_budget": 0.1}


def main():
    folder = PictureFolder(Path(sys.argv[1]), PROMPTS, batch_size=2, seed=0)
    folder.start(SETTINGS)
    worker, batches = split_work(folder.unfinished_batches(), "cuda" if torch.cuda.is_available() else "cpu")
    pipe = HackVARPipeline.from_pretrained(SETTINGS["model"]).to(worker.device)
    pipe.set_progress_bar_config(disable=True)
    for batch in batches:
        prompts = [PROMPTS[index] for index in batch]
        # A seed belongs to a place in the list, whichever process draws it.
        generators = [torch.Generator().manual_seed(folder.seed + index) for index in batch]
        images = pipe(prompts, generator=generators, kv_budget=SETTINGS["kv_budget"]).images
        for index in folder.missing(batch):
            folder.save(index, PROMPTS[index], images[index - batch.start], {"prompt": PROMPTS[index], **SETTINGS})
    folder.write_manifest()
    print(f"process {worker.index} of {worker.count}: {len(batches)} batches; missing: {len(folder.missing())}")


if __name__ == "__main__":
    main()
