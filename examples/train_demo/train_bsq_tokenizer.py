"""Trains the image tokenizer of the text-to-image demo model, a `MultiScaleBSQModel`, on pictures on plain colours.

Its convolutions start from those of the class-conditional demo model where names and shapes agree; the first steps train
a plain autoencoder. Run it again to resume.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Clock, CsvLog, learning_rate_factor, load_checkpoint, save_checkpoint, save_sheet
from data import (
    BACKGROUNDS,
    HELD_OUT_CONCEPT,
    HELD_OUT_PICTURE,
    TRAIN,
    EmojiData,
    augmented_view,
    colours,
    load_data,
    plain_view,
)
from tqdm import tqdm
from train_tokenizer import PATCH_NUMS, SIDE, WARMUP_STEPS, reconstruction_loss

from hack_pipelines import HackVARPipeline
from hack_pipelines.models.autoencoder_bsq import MultiScaleBSQModel
from hack_pipelines.schedule import Schedule


CONFIG = {
    "latent_channels": 12,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PLAIN_STEPS = 150
LEARNING_RATE = 1.5e-3
DECAY_START = 0.4
COMMITMENT = 0.1
PLAIN_SHARE = 0.5
EVALUATE_SECONDS = 120


def random_backgrounds(count: int) -> torch.Tensor:
    """Positions in `BACKGROUNDS`: white for half of the pictures, one of the others for the rest."""
    coloured = torch.randint(1, len(BACKGROUNDS), (count,))
    return torch.where(torch.rand(count) < PLAIN_SHARE, 0, coloured)


def start_convolutions(model: MultiScaleBSQModel) -> int:
    """Takes over weights of the class-conditional demo model's tokenizer; returns how many tensors."""
    known = HackVARPipeline.from_pretrained("demo-class").vae.state_dict()
    own = model.state_dict()
    shared = {name: known[name] for name, tensor in own.items() if name in known and known[name].shape == tensor.shape}
    model.load_state_dict({**own, **shared})
    return len(shared)


def quantise(
    model: MultiScaleBSQModel, features: torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised features, whose gradient goes straight to the features, and the commitment loss of the running sums."""
    target = features.detach()
    latents, loss = torch.zeros_like(target), torch.zeros(())
    for step in range(len(schedule)):
        maps = model.residual_maps(target - latents, step, schedule)
        latents = latents + model.upsample(model.codes(maps > 0), step, schedule)
    loss = F.mse_loss(features, latents)
    return features + (latents - target), loss


@torch.no_grad()
def evaluate(model: MultiScaleBSQModel, data: EmojiData, schedule: Schedule, path: Path) -> tuple[float, float]:
    """Mean PSNR in dB of held-out pictures, and the mean entropy of a bit; writes a sheet of both rows."""
    rows = torch.cat([data.indices(HELD_OUT_PICTURE), data.indices(HELD_OUT_CONCEPT)])
    backgrounds = torch.arange(len(rows)) % (2 * len(BACKGROUNDS))
    background = colours(torch.where(backgrounds < len(BACKGROUNDS), backgrounds, 0))
    images = plain_view(data.images[rows], SIDE, background)
    outputs, bits = [], []
    for chunk in images.split(64):
        bits.append(torch.cat(model.tokenize(model.encode(chunk), schedule), dim=1))
        outputs.append(model(chunk, schedule).sample)
    output, share = torch.cat(outputs), torch.cat(bits).float().mean(0)
    entropy = (torch.special.entr(share) + torch.special.entr(1 - share)).mean() / torch.tensor(2.0).log()
    error = ((output - images) / 2).square().mean(dim=(1, 2, 3))
    pairs = torch.cat([torch.cat([a, b]) for a, b in zip(images[::2][:72].split(24), output[::2][:72].split(24))])
    save_sheet(pairs, 24, path)
    return float((-10 * error.log10()).mean()), float(entropy)


def train(folder: Path, runs: Path, minutes: float, batch_size: int) -> Path:
    """Trains for `minutes`, or for what is left of them, and returns the folder of the trained model."""
    torch.manual_seed(0)
    data, schedule = load_data(folder), Schedule.from_sides(PATCH_NUMS)
    rows = data.indices(TRAIN)
    model = MultiScaleBSQModel(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    step, elapsed = 0, 0.0
    state = load_checkpoint(runs / "bsq.pt")
    if state is None:
        print(f"{start_convolutions(model)} tensors start from the class-conditional model")
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    clock, log = Clock(minutes, elapsed), CsvLog(runs / "bsq.csv")
    progress, next_evaluation = tqdm(initial=step, mininterval=10), clock.elapsed + EVALUATE_SECONDS
    while clock.progress < 1:
        batch = rows[torch.randint(len(rows), (batch_size,))]
        background = colours(random_backgrounds(batch_size))
        images = augmented_view(data.images[batch], data.mirrored[batch], SIDE, torch.default_generator, background)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode(images)
        latents, commitment = (
            (features, torch.zeros(())) if step < PLAIN_STEPS else quantise(model, features, schedule)
        )
        with torch.autocast("cpu", torch.bfloat16):
            # Not `decode`: its clamp would stop the gradient of values that overshoot.
            output = model.decoder(latents)
        loss = reconstruction_loss(output.float(), images)
        factor = learning_rate_factor(step, clock.progress, WARMUP_STEPS, DECAY_START)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad(set_to_none=True)
        (loss + COMMITMENT * commitment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        progress.update()
        if clock.elapsed >= next_evaluation or clock.progress == 1:
            psnr, entropy = evaluate(model, data, schedule, runs / "bsq.png")
            seconds = clock.elapsed
            log.write(
                step=step, seconds=seconds, images=step * batch_size, loss=float(loss), psnr=psnr, entropy=entropy,
                commitment=float(commitment),
            )  # fmt: skip
            tqdm.write(
                f"step {step}: loss {float(loss):.4f}, commitment {float(commitment):.4f}, held out {psnr:.2f} dB, "
                f"{entropy:.3f} bits a bit, features {float(features.std()):.3f}"
            )
            save_checkpoint(
                runs / "bsq.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, elapsed=seconds
            )  # fmt: skip
            next_evaluation = seconds + EVALUATE_SECONDS
    model.save_pretrained(runs / "bsq")
    return runs / "bsq"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=25, help="training time, stops not counted")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    print(train(arguments.data, arguments.runs, arguments.minutes, arguments.batch_size))


if __name__ == "__main__":
    main()
