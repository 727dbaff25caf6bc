"""Trains the raster demo model: a `LlamaForCausalLM` that draws pictures on white, token by token, given a class.

Its image tokenizer, a `MultiScaleVQModel` with a single scale of 16 x 16, is trained first. Pictures are encoded in
several random views. Run it again to resume.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import train_tokenizer
from common import Clock, CsvLog, learning_rate_factor, load_checkpoint, save_checkpoint, save_sheet
from data import HELD_OUT_CONCEPT, HELD_OUT_PICTURE, TRAIN, EmojiData, augmented_view, load_data, plain_view
from raster import PATCH_NUMS, SCHEDULE, class_tokens, sample_raster
from tqdm import tqdm
from train_tokenizer import SIDE
from train_transformer import DECAY_START, LABEL_DROP, WARMUP_STEPS, WeightAverage, make_optimizers
from transformers import LlamaConfig, LlamaForCausalLM

from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel


TOKENIZER_CONFIG = {**train_tokenizer.CONFIG, "block_out_channels": (16, 32, 64), "num_residual_convs": 1}
CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "tie_word_embeddings": True,
}
# A vocabulary of whole cache lines.
VOCAB_MULTIPLE = 8
VIEWS = 8
EVALUATE_SECONDS = 300
SHEET_CLASSES = 14


def make_model(class_names: list[str], config: dict = CONFIG) -> LlamaForCausalLM:
    """The untrained transformer; its configuration remembers the codes and the names of the classes."""
    codes = TOKENIZER_CONFIG["vocab_size"]
    tokens = codes + len(class_names) + 1
    return LlamaForCausalLM(
        LlamaConfig(
            **config,
            vocab_size=-(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            max_position_embeddings=1 + SCHEDULE.total,
            num_codes=codes,
            id2label=dict(enumerate(class_names)),
            bos_token_id=None,
            eos_token_id=None,
        )
    )


class Views:
    """Codes of random views of pictures on white, each encoded once, when it is first drawn."""

    def __init__(self, vae: MultiScaleVQModel, data: EmojiData, rows: torch.Tensor):
        self.vae, self.data, self.rows = vae, data, rows
        self.tokens = torch.full((VIEWS, len(rows), SCHEDULE.total), -1, dtype=torch.int16)

    @torch.no_grad()
    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[count, 256]` and class ids `[count]` of pictures drawn with replacement."""
        views, picked = torch.randint(VIEWS, (count,)), torch.randint(len(self.rows), (count,))
        new = self.tokens[views, picked, 0] < 0
        if new.any():
            rows = self.rows[picked[new]]
            images = augmented_view(self.data.images[rows], self.data.mirrored[rows], SIDE, torch.default_generator)
            with torch.autocast("cpu", torch.bfloat16):
                features = self.vae.encode(images)
            self.tokens[views[new], picked[new]] = self.vae.tokenize(features, SCHEDULE)[0].short()
        return self.tokens[views, picked].long(), self.data.class_ids[self.rows[picked]]


@torch.no_grad()
def encode_plain(vae: MultiScaleVQModel, data: EmojiData, rows: torch.Tensor) -> torch.Tensor:
    """Codes `[N, 256]` in int64 of pictures without augmentation."""
    images = (plain_view(data.images[chunk], SIDE) for chunk in rows.split(32))
    return torch.cat([vae.tokenize(vae.encode(chunk), SCHEDULE)[0] for chunk in images])


def code_losses(model: LlamaForCausalLM, tokens: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Nats `[B, 256]` of codes `[B, 256]` that follow class tokens `[B]`, in one pass."""
    inputs = torch.cat([first[:, None], tokens[:, :-1]], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    logits = logits[:, :, : model.config.num_codes].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


class Evaluation:
    """Negative log-likelihood in nats a token of fixed pictures, drawn without augmentation."""

    def __init__(self, vae: MultiScaleVQModel, data: EmojiData):
        self.sets = {}
        for name, split in (("train", TRAIN), ("pictures", HELD_OUT_PICTURE), ("concepts", HELD_OUT_CONCEPT)):
            rows = data.indices(split)
            rows = rows[:: max(len(rows) // 100, 1)]
            self.sets[name] = encode_plain(vae, data, rows), data.class_ids[rows]

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM) -> dict[str, float | int]:
        """Mean of every set, and how many codes the three use together, which training does not change."""
        result = {"codes": len(torch.cat([tokens for tokens, _ in self.sets.values()]).unique())}
        for name, (tokens, classes) in self.sets.items():
            first = class_tokens(model, classes)
            losses = [code_losses(model, *chunk) for chunk in zip(tokens.split(32), first.split(32))]
            result[f"nll_{name}"] = float(torch.cat(losses).mean())
        return result


@torch.no_grad()
def save_samples(model: LlamaForCausalLM, vae: MultiScaleVQModel, path: Path) -> None:
    """One row of pictures of classes spread over the list, with the same noise every time."""
    classes = torch.arange(SHEET_CLASSES) * len(model.config.id2label) // SHEET_CLASSES
    tokens = sample_raster(model, classes, generator=torch.Generator().manual_seed(0))
    save_sheet(vae.decode(vae.quantizer.upsample(tokens, 0, SCHEDULE)), SHEET_CLASSES, path)


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    tokens: torch.Tensor,
    classes: torch.Tensor,
    factor: float,
) -> float:
    """One update from codes and class ids at `factor` of the learning rates; returns the loss."""
    dropped = torch.rand(len(classes)) < LABEL_DROP
    first = class_tokens(model, classes.masked_fill(dropped, len(model.config.id2label)))
    loss = code_losses(model, tokens, first).mean()
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
    """Trains for `minutes`, or for what is left of them, and returns the checkpoint with the averaged weights."""
    torch.manual_seed(0)
    data = load_data(folder)
    vae = MultiScaleVQModel.from_pretrained(runs / "vae").eval()
    views, evaluation = Views(vae, data, data.indices(TRAIN)), Evaluation(vae, data)
    model, averaged = make_model(data.class_names), make_model(data.class_names).eval()
    # Attention written out in bfloat16 is faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    optimizers, average, step, elapsed = make_optimizers(model, model.model.layers), WeightAverage(model), 0, 0.0
    state = load_checkpoint(runs / "raster.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average.weights, step, elapsed = state["average"], state["step"], state["elapsed"]
    clock, log = Clock(minutes, elapsed), CsvLog(runs / "raster.csv")
    progress, losses, next_evaluation = tqdm(initial=step, mininterval=10), [], clock.elapsed + EVALUATE_SECONDS
    while clock.progress < 1:
        tokens, classes = views.draw(batch_size)
        factor = learning_rate_factor(step, clock.progress, WARMUP_STEPS, DECAY_START)
        losses.append(train_step(model, optimizers, tokens, classes, factor))
        average.update(model, step)
        step += 1
        progress.update()
        if clock.elapsed >= next_evaluation or clock.progress == 1:
            averaged.load_state_dict(average.weights)
            measured, loss, seconds = evaluation.measure(averaged), sum(losses) / len(losses), clock.elapsed
            log.write(step=step, seconds=seconds, images=step * batch_size, factor=factor, loss=loss, **measured)
            tqdm.write(f"step {step}: loss {loss:.3f}, " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
            save_checkpoint(
                runs / "raster.pt", model=model.state_dict(), average=average.weights, step=step,
                optimizers=[optimizer.state_dict() for optimizer in optimizers], elapsed=seconds,
            )  # fmt: skip
            save_samples(averaged, vae, runs / "raster.png")
            losses, next_evaluation = [], clock.elapsed + EVALUATE_SECONDS
    return runs / "raster.pt"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument(
        "--runs", type=Path, default=here / "runs" / "raster", help="folder of both models' checkpoints and logs"
    )
    parser.add_argument("--tokenizer-minutes", type=float, default=13, help="training time of the image tokenizer")
    parser.add_argument(
        "--minutes", type=float, default=66, help="training time of the transformer, stops not counted"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not (arguments.runs / "vae").exists():
        train_tokenizer.train(
            arguments.data, arguments.runs, arguments.tokenizer_minutes, 8, TOKENIZER_CONFIG, PATCH_NUMS
        )
    print(train(arguments.data, arguments.runs, arguments.minutes, arguments.batch_size))


if __name__ == "__main__":
    main()
