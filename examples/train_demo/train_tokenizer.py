"""Trains the image tokenizer of the demo models, a `MultiScaleVQModel`, on pictures on white.

The first steps train a plain autoencoder; then the codebook starts from the residuals that the features leave at every
scale, and codes that nothing uses are moved to where residuals are. Run it again to resume.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Clock, CsvLog, learning_rate_factor, load_checkpoint, save_checkpoint, save_sheet
from data import HELD_OUT_CONCEPT, HELD_OUT_PICTURE, TRAIN, EmojiData, augmented_view, load_data, plain_view
from tqdm import tqdm

from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel
from hack_pipelines.schedule import Schedule


SIDE = 64
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8)
CONFIG = {
    "vocab_size": 1024,
    "latent_channels": 16,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
WARMUP_STEPS = 100
PLAIN_STEPS = 300
LEARNING_RATE = 1e-3
DECAY_START = 0.4
COMMITMENT = 0.25
CODEBOOK_POOL = 16384
COLOUR_WEIGHT = 2.0
EVALUATE_SECONDS = 120


@dataclass
class Quantised:
    """One pass of features through all scales.

    Args:
        latents (`torch.Tensor`): Quantised features; their gradient goes straight to the features.
        loss (`torch.Tensor`): Codebook and commitment loss, averaged over the scales.
        tokens (`torch.Tensor`): Ids of all scales, flat.
        residuals (`torch.Tensor`): Rows that the ids were chosen for, in the same order, `[tokens, channels]`.
    """

    latents: torch.Tensor
    loss: torch.Tensor
    tokens: torch.Tensor
    residuals: torch.Tensor


def residual_rows(residual: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What a scale has to code, `[batch * n_k, channels]`."""
    maps = residual if residual.shape[2:] == size else F.interpolate(residual, size=size, mode="area")
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def quantise(model: MultiScaleVQModel, features: torch.Tensor, schedule: Schedule) -> Quantised:
    """Residual quantisation with gradients: every running latent is pulled to the features and the other way round."""
    features = features.float()
    target = features.detach()
    latents = torch.zeros_like(target)
    loss, all_tokens, all_rows = torch.zeros(()), [], []
    for step, size in enumerate(schedule.sizes):
        rows = residual_rows(target - latents.detach(), size)
        tokens = model.quantizer.nearest(rows)
        latents = latents + model.quantizer.upsample(tokens.view(len(features), -1), step, schedule)
        loss = loss + F.mse_loss(latents, target) + COMMITMENT * F.mse_loss(features, latents.detach())
        all_tokens.append(tokens)
        all_rows.append(rows)
    straight = features + (latents - features).detach()
    return Quantised(straight, loss / len(schedule), torch.cat(all_tokens), torch.cat(all_rows))


def reconstruction_loss(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences, at two resolutions, for sharp edges; squares for the rarer colours."""
    loss = COLOUR_WEIGHT * F.mse_loss(output, images)
    for _ in range(2):
        loss = loss + F.l1_loss(output, images)
        for dim in (2, 3):
            loss = loss + F.l1_loss(output.diff(dim=dim), images.diff(dim=dim))
        output, images = F.avg_pool2d(output, 2), F.avg_pool2d(images, 2)
    return loss


class DeadCodes:
    """Moves codes that are hardly used onto residuals of the current batch, the likelier the worse a residual is coded."""

    def __init__(self, vocab_size: int, every: int = 50, decay: float = 0.98, threshold: float = 0.05):
        self.every, self.decay, self.threshold = every, decay, threshold
        self.usage = torch.ones(vocab_size)

    def update(self, step: int, weight: torch.nn.Parameter, quantised: Quantised, optimizer) -> int:
        counts = torch.bincount(quantised.tokens, minlength=len(self.usage)).float()
        self.usage.lerp_(counts, 1 - self.decay)
        dead = torch.nonzero(self.usage < self.threshold).flatten()
        if step % self.every or not len(dead):
            return 0
        errors = (quantised.residuals - weight.detach()[quantised.tokens]).square().sum(1)
        weight.data[dead] = quantised.residuals[torch.multinomial(errors, len(dead))]
        self.usage[dead] = 1.0
        for average in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][average][dead] = 0
        return len(dead)


def spread_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """
    Draws `count` rows, each with a probability that grows with its squared distance to those already drawn (k-means++).

    A plain draw would spend most codes on the background, which is most of a picture, and few on rare colours.
    """
    picked = [rows[0]]
    distances = (rows - picked[0]).square().sum(1)
    while len(picked) < count:
        picked.append(rows[torch.multinomial(distances, 1)[0]])
        distances = torch.minimum(distances, (rows - picked[-1]).square().sum(1))
    return torch.stack(picked)


@torch.no_grad()
def start_codebook(model: MultiScaleVQModel, data: EmojiData, schedule: Schedule) -> None:
    """Draws the codes from the residuals that exact, unquantised scales would leave: as many from each scale."""
    images = data.images[data.indices(TRAIN)]
    features = torch.cat([model.encode(plain_view(chunk, SIDE)) for chunk in images[torch.randperm(1024)].split(64)])
    latents, pools = torch.zeros_like(features), []
    for step, size in enumerate(schedule.sizes):
        pooled = F.adaptive_avg_pool2d(features - latents, size)
        pools.append(residual_rows(features - latents, size))
        enlarged = F.interpolate(pooled, size=schedule.sizes[-1], mode="bicubic")
        latents = latents + model.quantizer.residual_conv(step, len(schedule))(enlarged)
    count = model.config.vocab_size // len(pools) + 1
    rows = torch.cat([spread_rows(pool[torch.randperm(len(pool))[:CODEBOOK_POOL]], count) for pool in pools])
    model.quantizer.embedding.weight.copy_(rows[: model.config.vocab_size])


@torch.no_grad()
def evaluate(model: MultiScaleVQModel, data: EmojiData, schedule: Schedule, path: Path) -> tuple[float, int]:
    """Mean PSNR in dB of held-out pictures and the number of codes that they use; writes a sheet of both rows."""
    rows = torch.cat([data.indices(HELD_OUT_PICTURE), data.indices(HELD_OUT_CONCEPT)])
    images = plain_view(data.images[rows], SIDE)
    outputs, tokens = [], []
    for chunk in images.split(64):
        tokens.append(torch.cat(model.tokenize(model.encode(chunk), schedule), dim=1))
        outputs.append(model(chunk, schedule).sample)
    output = torch.cat(outputs)
    error = ((output - images) / 2).square().mean(dim=(1, 2, 3))
    pairs = torch.cat([torch.cat([a, b]) for a, b in zip(images[::2][:72].split(24), output[::2][:72].split(24))])
    save_sheet(pairs, 24, path)
    return float((-10 * error.log10()).mean()), len(torch.cat(tokens).unique())


def train(
    folder: Path,
    runs: Path,
    minutes: float,
    batch_size: int,
    config: dict = CONFIG,
    patch_nums: tuple[int, ...] = PATCH_NUMS,
) -> Path:
    """Trains for `minutes`, or for what is left of them, and returns the folder of the trained model."""
    torch.manual_seed(0)
    data, schedule = load_data(folder), Schedule.from_sides(patch_nums)
    rows = data.indices(TRAIN)
    model = MultiScaleVQModel(**config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    dead_codes, step, elapsed = DeadCodes(config["vocab_size"]), 0, 0.0
    state = load_checkpoint(runs / "tokenizer.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        dead_codes.usage, step, elapsed = state["usage"], state["step"], state["elapsed"]
    clock, log = Clock(minutes, elapsed), CsvLog(runs / "tokenizer.csv")
    progress, restarted, next_evaluation = tqdm(initial=step, mininterval=10), 0, clock.elapsed + EVALUATE_SECONDS
    while clock.progress < 1:
        batch = rows[torch.randint(len(rows), (batch_size,))]
        images = augmented_view(data.images[batch], data.mirrored[batch], SIDE, torch.default_generator)
        if step == PLAIN_STEPS:
            start_codebook(model, data, schedule)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode(images)
        quantised = None if step < PLAIN_STEPS else quantise(model, features, schedule)
        with torch.autocast("cpu", torch.bfloat16):
            latents = features if quantised is None else quantised.latents
            # Not `decode`: its clamp would stop the gradient of values that overshoot.
            output = model.decoder(model.post_quant_conv(latents))
        loss = reconstruction_loss(output.float(), images)
        total = loss if quantised is None else loss + quantised.loss
        factor = learning_rate_factor(step, clock.progress, WARMUP_STEPS, DECAY_START)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Late restarts would leave codes that the decoder has hardly seen.
        if quantised is not None and clock.progress < 0.8:
            restarted += dead_codes.update(step, model.quantizer.embedding.weight, quantised, optimizer)
        step += 1
        progress.update()
        if clock.elapsed >= next_evaluation or clock.progress == 1:
            psnr, codes = evaluate(model, data, schedule, runs / "tokenizer.png")
            seconds = clock.elapsed
            log.write(
                step=step, seconds=seconds, images=step * batch_size, loss=float(loss), psnr=psnr, codes=codes,
                quantiser_loss=0.0 if quantised is None else float(quantised.loss), restarted=restarted,
            )  # fmt: skip
            tqdm.write(
                f"step {step}: loss {float(loss):.4f}, held out {psnr:.2f} dB, {codes} codes, {restarted} moved"
            )
            save_checkpoint(
                runs / "tokenizer.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                usage=dead_codes.usage, step=step, elapsed=seconds,
            )  # fmt: skip
            restarted, next_evaluation = 0, seconds + EVALUATE_SECONDS
    model.save_pretrained(runs / "vae")
    return runs / "vae"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=28, help="training time, stops not counted")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    print(train(arguments.data, arguments.runs, arguments.minutes, arguments.batch_size))


if __name__ == "__main__":
    main()
