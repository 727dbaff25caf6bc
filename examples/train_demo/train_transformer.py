"""Trains the class-conditional transformer of the demo model, a `VARTransformer2DModel`, on tokens of pictures on white.

Every picture is encoded in several random views once; a batch is quantised when it is drawn, with some codes replaced by
near ones, so that the model learns to mend its own mistakes at the finer scales. Run it again to resume.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Clock, CsvLog, learning_rate_factor, load_checkpoint, save_checkpoint
from data import HELD_OUT_CONCEPT, HELD_OUT_PICTURE, TRAIN, EmojiData, augmented_view, load_data, plain_view
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from train_tokenizer import PATCH_NUMS, SIDE, residual_rows

from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel
from hack_pipelines.models.transformer_var import VARTransformer2DModel
from hack_pipelines.schedule import Schedule


CONFIG = {
    "num_layers": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "patch_nums": PATCH_NUMS,
    "shared_aln": True,
}
VIEWS = 12
MUON_LEARNING_RATE = 3e-3
MUON_WEIGHT_DECAY = 0.1
ADAM_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_START = 0.3
LABEL_DROP = 0.1
MISTAKE_RATE = 0.3
MISTAKE_NEIGHBOURS = 16
AVERAGE_DECAY = 0.995
EVALUATE_SECONDS = 180


class WeightAverage:
    """Exponential moving average of the weights: the model that is measured and shipped."""

    def __init__(self, model: torch.nn.Module):
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: torch.nn.Module, step: int) -> None:
        # The average of a young run must not remember the random start.
        decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def start_weights(model: VARTransformer2DModel) -> None:
    """Small modulation and closed gates, as in VAR, and no key bias: blocks start as the identity."""
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.trunc_normal_(module.weight, std=(1 / dim / 3) ** 0.5)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.pos_start.normal_(std=(1 / dim / 3) ** 0.5)
        model.pos_embed.normal_(std=(1 / dim / 3) ** 0.5)
        model.proj_out.weight.mul_(0.02)
        model.norm_modulation.weight.mul_(0.5)
        gates, rest = model.shared_modulation.weight[: 2 * dim], model.shared_modulation.weight[2 * dim :]
        gates.mul_(1e-3)
        rest.mul_(0.5)
        for block in model.transformer_blocks:
            block.modulation[:, :, :2].mul_(1e-3)
            block.modulation[:, :, 2:].mul_(0.5)
            for projection in (block.attn.to_out, block.ff.proj_out):
                projection.weight.div_((2 * model.config.num_layers) ** 0.5)


def freeze_key_bias(model: VARTransformer2DModel) -> None:
    """VAR has no key bias, but query, key and value share one projection: the key's part stays zero."""
    for block in model.transformer_blocks:
        bias = block.attn.to_qkv.bias
        mask = torch.ones_like(bias)
        mask.view(3, -1)[1] = 0
        bias.register_hook(lambda gradient, mask=mask: gradient * mask)


def make_optimizers(model: torch.nn.Module, blocks: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest of the model; `base_lr` is what the schedule scales."""
    matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
    ids = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in ids]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=MUON_LEARNING_RATE, weight_decay=MUON_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def encode_views(vae: MultiScaleVQModel, data: EmojiData, rows: torch.Tensor, path: Path) -> torch.Tensor:
    """Features of random views in float16, `[views, N, channels, height, width]`, computed once and kept in a file."""
    if path.exists():
        return torch.load(path, weights_only=True)
    views = []
    for _ in tqdm(range(VIEWS), desc="views"):
        chunks = []
        for chunk in rows.split(32):
            images = augmented_view(data.images[chunk], data.mirrored[chunk], SIDE, torch.default_generator)
            with torch.autocast("cpu", torch.bfloat16):
                chunks.append(vae.encode(images).half())
        views.append(torch.cat(chunks))
    torch.save(torch.stack(views), path)
    return torch.stack(views)


@torch.no_grad()
def tokens_and_inputs(
    vae: MultiScaleVQModel, features: torch.Tensor, schedule: Schedule, mistake_rate: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids to predict `[B, L]` and teacher-forcing inputs `[B, L - n_0, channels]`.

    Each picture has its own rate of mistakes, up to `mistake_rate`. A mistake stays in the latent but not in the ids, and
    the finer scales code what is left over after it.
    """
    features = features.float()
    latents = torch.zeros_like(features)
    rate = mistake_rate * torch.rand(len(features), 1)
    all_tokens, inputs = [], []
    for step, size in enumerate(schedule.sizes):
        rows = residual_rows(features - latents, size)
        tokens = vae.quantizer.nearest(rows).view(len(features), -1)
        used = tokens.clone()
        mistakes = torch.rand(tokens.shape) < rate
        if mistakes.any():
            distances = torch.cdist(rows[mistakes.flatten()], vae.quantizer.embedding.weight)
            near = distances.topk(MISTAKE_NEIGHBOURS, largest=False).indices
            used[mistakes] = near.gather(1, torch.randint(1, MISTAKE_NEIGHBOURS, (len(near), 1)))[:, 0]
        latents, next_input = vae.accumulate(latents, used, step, schedule)
        all_tokens.append(tokens)
        if next_input is not None:
            inputs.append(next_input)
    return torch.cat(all_tokens, dim=1), torch.cat(inputs, dim=1)


class Evaluation:
    """Negative log-likelihood in nats a token of fixed pictures, drawn without augmentation or mistakes."""

    def __init__(self, vae: MultiScaleVQModel, data: EmojiData, schedule: Schedule):
        self.schedule = schedule
        self.sets = {}
        for name, split in (("train", TRAIN), ("pictures", HELD_OUT_PICTURE), ("concepts", HELD_OUT_CONCEPT)):
            rows = data.indices(split)
            rows = rows[:: max(len(rows) // 100, 1)]
            with torch.no_grad():
                features = vae.encode(plain_view(data.images[rows], SIDE))
            self.sets[name] = (*tokens_and_inputs(vae, features, schedule), data.class_ids[rows])

    @torch.no_grad()
    def measure(self, model: VARTransformer2DModel) -> dict[str, float]:
        """Mean of every set, and the mean over held-out pictures of each scale."""
        model.eval()
        losses = {name: self._losses(model, *tensors) for name, tensors in self.sets.items()}
        model.train()
        result = {f"nll_{name}": float(loss.mean()) for name, loss in losses.items()}
        held_out = torch.cat([losses["pictures"], losses["concepts"]]).mean(0)
        for step, part in enumerate(held_out.split(self.schedule.lengths)):
            result[f"nll_scale_{step}"] = float(part.mean())
        return result

    def _losses(
        self, model: VARTransformer2DModel, tokens: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        chunks = []
        for ids, rows, classes in zip(tokens.split(32), inputs.split(32), labels.split(32)):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(rows, classes).logits
            chunks.append(F.cross_entropy(logits.transpose(1, 2), ids, reduction="none"))
        return torch.cat(chunks)


def train_step(
    model: VARTransformer2DModel,
    optimizers: Iterable[torch.optim.Optimizer],
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    factor: float,
) -> float:
    """One update from ids, inputs and class labels at `factor` of the learning rates; returns the loss."""
    tokens, inputs, labels = batch
    dropped = torch.rand(len(labels)) < LABEL_DROP
    labels = torch.where(dropped, model.config.num_classes, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs, labels).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
    return float(loss.detach())


def train(folder: Path, runs: Path, minutes: float, batch_size: int) -> Path:
    """Trains for `minutes`, or for what is left of them, and returns the folder of the averaged model."""
    torch.manual_seed(0)
    # Attention written out in bfloat16 is half as fast again as the fused CPU kernel with a mask.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    data, schedule = load_data(folder), Schedule.from_sides(PATCH_NUMS)
    vae = MultiScaleVQModel.from_pretrained(runs / "vae").eval()
    rows = data.indices(TRAIN)
    views, evaluation = encode_views(vae, data, rows, runs / "views.pt"), Evaluation(vae, data, schedule)
    model = VARTransformer2DModel(
        **CONFIG,
        num_classes=len(data.class_names),
        vocab_size=vae.config.vocab_size,
        latent_channels=vae.config.latent_channels,
    )
    start_weights(model)
    freeze_key_bias(model)
    optimizers, average, step, elapsed = make_optimizers(model, model.transformer_blocks), WeightAverage(model), 0, 0.0
    state = load_checkpoint(runs / "transformer.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average.weights, step, elapsed = state["average"], state["step"], state["elapsed"]
    averaged = VARTransformer2DModel.from_config(model.config)
    clock, log = Clock(minutes, elapsed), CsvLog(runs / "transformer.csv")
    progress, losses, next_evaluation = tqdm(initial=step, mininterval=10), [], clock.elapsed + EVALUATE_SECONDS
    while clock.progress < 1:
        picked = torch.randint(len(rows), (batch_size,))
        features = views[torch.randint(len(views), (batch_size,)), picked]
        tokens, inputs = tokens_and_inputs(vae, features, schedule, MISTAKE_RATE)
        factor = learning_rate_factor(step, clock.progress, WARMUP_STEPS, DECAY_START)
        with sdpa_kernel(SDPBackend.MATH):
            losses.append(train_step(model, optimizers, (tokens, inputs, data.class_ids[rows[picked]]), factor))
        average.update(model, step)
        step += 1
        progress.update()
        if clock.elapsed >= next_evaluation or clock.progress == 1:
            averaged.load_state_dict(average.weights)
            measured = evaluation.measure(averaged)
            loss, seconds = sum(losses) / len(losses), clock.elapsed
            log.write(step=step, seconds=seconds, images=step * batch_size, factor=factor, loss=loss, **measured)
            tqdm.write(f"step {step}: loss {loss:.3f}, " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
            save_checkpoint(
                runs / "transformer.pt", model=model.state_dict(), average=average.weights, step=step,
                optimizers=[optimizer.state_dict() for optimizer in optimizers], elapsed=seconds,
            )  # fmt: skip
            losses, next_evaluation = [], seconds + EVALUATE_SECONDS
    averaged.load_state_dict(average.weights)
    averaged.save_pretrained(runs / "transformer")
    return runs / "transformer"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the tokenizer and of checkpoints")
    parser.add_argument("--minutes", type=float, default=66, help="training time, stops not counted")
    parser.add_argument("--batch-size", type=int, default=24)
    arguments = parser.parse_args()
    print(train(arguments.data, arguments.runs, arguments.minutes, arguments.batch_size))


if __name__ == "__main__":
    main()
