"""Trains the transformer of the text-to-image demo model, an `InfinityTransformer2DModel`, and its T5 text encoder.

Bits of the history are flipped at random while the labels are what that history leaves to code, as Infinity trains. Run it
again to resume.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import (
    MAX_TOKENS,
    all_captions,
    caption,
    clean,
    random_caption,
    text_config,
    train_text_tokenizer,
    training_backgrounds,
)
from common import Clock, CsvLog, learning_rate_factor, load_checkpoint, save_checkpoint
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
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from train_bsq_tokenizer import PLAIN_SHARE
from train_tokenizer import PATCH_NUMS, SIDE
from train_transformer import WeightAverage, make_optimizers
from transformers import T5EncoderModel, T5Tokenizer

from hack_pipelines.models.autoencoder_bsq import MultiScaleBSQModel
from hack_pipelines.models.transformer_infinity import InfinityCondition, InfinityTransformer2DModel
from hack_pipelines.schedule import Schedule


CONFIG = {
    "num_layers": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "ff_hidden_dim": 768,
    "text_max_length": MAX_TOKENS,
    "num_pooling_heads": 6,
    "num_levels": len(PATCH_NUMS),
}
VIEWS = 12
WARMUP_STEPS = 100
DECAY_START = 0.3
CAPTION_DROP = 0.1
FLIP_RATE = 0.25
# Coarse scales have few tokens but decide what is drawn: a token weighs `n_k ** -SCALE_WEIGHT`.
SCALE_WEIGHT = 0.25
POOL_BATCHES = 64
EVALUATED = 40
EVALUATE_SECONDS = 300
FINISHED = "infinity_finished"


class TextToBits(nn.Module):
    """What is trained together: the text encoder and the transformer."""

    def __init__(self, tokenizer: T5Tokenizer, bits_per_token: int):
        super().__init__()
        self.text_encoder = T5EncoderModel(text_config(tokenizer))
        self.transformer = InfinityTransformer2DModel(
            **CONFIG, bits_per_token=bits_per_token, text_channels=self.text_encoder.config.d_model
        )

    def blocks(self) -> nn.Module:
        """The parts whose matrices Muon trains."""
        return nn.ModuleList([self.transformer.transformer_blocks, self.text_encoder.encoder.block])

    def forward(
        self, ids: torch.Tensor, inputs: torch.Tensor, schedule: Schedule, dropped: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How much more likely each bit is to be 1, in logits `[B, L, bits]`; dropped captions become the learned text."""
        embeds = list(self.text_encoder(input_ids=ids).last_hidden_state)
        if dropped is not None:
            for row in torch.nonzero(dropped).flatten().tolist():
                embeds[row] = self.transformer.uncond_embeds[: ids.shape[1]]
        condition = InfinityCondition(embeds, guided=False)
        logits = self.transformer(inputs, condition, schedule, return_dict=False)[0]
        return logits[..., 1::2] - logits[..., ::2]


def start_weights(model: InfinityTransformer2DModel) -> None:
    """Small modulation and closed gates, and no bias of keys: blocks start as the identity."""
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=(1 / dim / 3) ** 0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.pos_start.normal_(std=(1 / dim / 3) ** 0.5)
        model.head.weight.mul_(0.02)
        model.head_modulation.weight.mul_(0.5)
        gates, rest = model.shared_modulation.weight[: 2 * dim], model.shared_modulation.weight[2 * dim :]
        gates.mul_(1e-3)
        rest.mul_(0.5)
        for block in model.transformer_blocks:
            block.modulation[:, :, :2].mul_(1e-3)
            block.modulation[:, :, 2:].mul_(0.5)
            for projection in (block.attn.to_out, block.cross_attn.to_out, block.ff.proj_out):
                projection.weight.div_((2 * model.config.num_layers) ** 0.5)


def freeze_key_bias(model: InfinityTransformer2DModel) -> None:
    """Infinity has no bias of keys, but keys share a projection with others: their part stays zero."""
    layers = [(model.text_pooling.to_kv, 2, 0)]
    for block in model.transformer_blocks:
        layers += [(block.attn.to_qkv, 3, 1), (block.cross_attn.to_kv, 2, 0)]
    for layer, parts, key in layers:
        mask = torch.ones_like(layer.bias)
        mask.view(parts, -1)[key] = 0
        layer.bias.register_hook(lambda gradient, mask=mask: gradient * mask)


@torch.no_grad()
def encode_views(
    vae: MultiScaleBSQModel, data: EmojiData, rows: torch.Tensor, path: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of random views in float16, `[views, N, channels, height, width]`, and their backgrounds, kept in a file."""
    if not path.exists():
        labels = [clean(data.captions[row]) for row in rows.tolist()]
        features, backgrounds = [], []
        for _ in tqdm(range(VIEWS), desc="views"):
            chosen, chunks = training_backgrounds(labels, PLAIN_SHARE), []
            for chunk, background in zip(rows.split(32), chosen.split(32)):
                images = augmented_view(
                    data.images[chunk], data.mirrored[chunk], SIDE, torch.default_generator, colours(background)
                )
                with torch.autocast("cpu", torch.bfloat16):
                    chunks.append(vae.encode(images).half())
            features.append(torch.cat(chunks))
            backgrounds.append(chosen)
        torch.save({"features": torch.stack(features), "backgrounds": torch.stack(backgrounds)}, path)
    views = torch.load(path, weights_only=True)
    return views["features"], views["backgrounds"]


@torch.no_grad()
def bits_and_inputs(
    vae: MultiScaleBSQModel, features: torch.Tensor, schedule: Schedule, flip_rate: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits to predict `[B, L, bits]` and teacher-forcing inputs `[B, L - n_0, bits]`.

    Each picture has its own rate of flips, up to `flip_rate`. A flipped bit stays in the latent but not in the labels, and
    the finer scales code what is left over after it.
    """
    features = features.float()
    latents = torch.zeros_like(features)
    rate = flip_rate * torch.rand(len(features), 1, 1)
    all_bits, inputs = [], []
    for step in range(len(schedule)):
        bits = vae.pack(vae.residual_maps(features - latents, step, schedule) > 0)
        used = bits ^ (torch.rand(bits.shape) < rate) if flip_rate else bits
        latents, next_input = vae.accumulate(latents, used, step, schedule)
        all_bits.append(bits)
        if next_input is not None:
            inputs.append(next_input)
    return torch.cat(all_bits, dim=1), torch.cat(inputs, dim=1)


def text_tokenizer(data: EmojiData, folder: Path) -> T5Tokenizer:
    """The tokenizer of the captions, trained once: training leaves the order of equally likely pieces to chance."""
    if not folder.exists():
        train_text_tokenizer(all_captions(data)).save_pretrained(folder)
    return T5Tokenizer.from_pretrained(folder)


def token_weights(schedule: Schedule) -> torch.Tensor:
    """Weight of every token in the loss, `[L, 1]`, one on average."""
    weights = torch.cat([torch.full((length,), length**-SCALE_WEIGHT) for length in schedule.lengths])
    return (weights / weights.mean()).unsqueeze(1)


class Batches:
    """Batches of captions of equal length, so that texts need no padding."""

    def __init__(self, data: EmojiData, rows: torch.Tensor, backgrounds: torch.Tensor, tokenizer: T5Tokenizer):
        self.labels = [clean(data.captions[row]) for row in rows.tolist()]
        self.styles = [data.styles[row] for row in rows.tolist()]
        self.backgrounds, self.tokenizer, self.names = backgrounds, tokenizer, list(BACKGROUNDS)

    def __call__(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """View, picture and token ids of batches without end."""
        waiting = defaultdict(list)
        while True:
            count = POOL_BATCHES * batch_size
            views = torch.randint(len(self.backgrounds), (count,)).tolist()
            pictures = torch.randint(len(self.labels), (count,)).tolist()
            texts = [
                random_caption(self.labels[i], self.styles[i], self.names[int(self.backgrounds[view, i])])
                for view, i in zip(views, pictures)
            ]
            encoded = self.tokenizer(texts, max_length=MAX_TOKENS, truncation=True).input_ids
            ready = []
            for view, picture, ids in zip(views, pictures, encoded):
                group = waiting[len(ids)]
                group.append((view, picture, ids))
                if len(group) == batch_size:
                    ready.append(tuple(torch.tensor(part) for part in zip(*group)))
                    group.clear()
            for index in torch.randperm(len(ready)).tolist():
                yield ready[index]


class Evaluation:
    """Mean loss in nats a bit, and share of bits guessed right, of fixed pictures on white with their full captions."""

    def __init__(self, vae: MultiScaleBSQModel, data: EmojiData, schedule: Schedule, tokenizer: T5Tokenizer):
        self.schedule = schedule
        self.sets = {}
        for name, split in (("train", TRAIN), ("pictures", HELD_OUT_PICTURE), ("concepts", HELD_OUT_CONCEPT)):
            rows = data.indices(split)
            rows = rows[:: max(len(rows) // EVALUATED, 1)]
            features = []
            with torch.no_grad():
                for part in rows.split(32):
                    features.append(vae.encode(plain_view(data.images[part], SIDE)))
            bits, inputs = bits_and_inputs(vae, torch.cat(features), schedule)
            texts = [caption(clean(data.captions[row]), data.styles[row]) for row in rows.tolist()]
            self.sets[name] = (bits, inputs, tokenizer(texts, max_length=MAX_TOKENS, truncation=True).input_ids)

    @torch.no_grad()
    def measure(self, model: TextToBits) -> dict[str, float]:
        """Mean of every set, and the mean over held-out pictures of each scale."""
        model.eval()
        result, held_out = {}, []
        for name, (bits, inputs, texts) in self.sets.items():
            losses, right = [], []
            for row, ids in enumerate(texts):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(torch.tensor([ids]), inputs[row : row + 1], self.schedule)
                wanted = bits[row : row + 1]
                losses.append(F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none").mean(-1))
                right.append(((logits > 0) == wanted).float().mean())
            loss = torch.cat(losses)
            result[f"nll_{name}"], result[f"right_{name}"] = float(loss.mean()), float(torch.stack(right).mean())
            if name != "train":
                held_out.append(loss)
        for step, part in enumerate(torch.cat(held_out).mean(0).split(self.schedule.lengths)):
            result[f"nll_scale_{step}"] = float(part.mean())
        model.train()
        return result


def train(folder: Path, runs: Path, minutes: float, batch_size: int, seed: int = 0) -> Path:
    """Trains for `minutes`, or for what is left of them, and returns the checkpoint with the averaged weights.

    A file tells that it has finished, since the checkpoint is there earlier.
    """
    torch.manual_seed(seed)
    # Attention written out in bfloat16 is half as fast again as the fused CPU kernel with a mask.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    data, schedule = load_data(folder), Schedule.from_sides(PATCH_NUMS)
    vae = MultiScaleBSQModel.from_pretrained(runs / "bsq").eval()
    rows = data.indices(TRAIN)
    features, backgrounds = encode_views(vae, data, rows, runs / "bsq_views.pt")
    tokenizer = text_tokenizer(data, runs / "text_tokenizer")
    evaluation, weights = Evaluation(vae, data, schedule, tokenizer), token_weights(schedule)
    model = TextToBits(tokenizer, vae.bits_per_token)
    start_weights(model.transformer)
    freeze_key_bias(model.transformer)
    optimizers, average, step, elapsed = make_optimizers(model, model.blocks()), WeightAverage(model), 0, 0.0
    state = load_checkpoint(runs / "infinity.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average.weights, step, elapsed = state["average"], state["step"], state["elapsed"]
    averaged = TextToBits(tokenizer, vae.bits_per_token)
    # Fused by the compiler, the float32 parts of a block take a third of the time. Captions have some twenty lengths.
    torch._dynamo.config.recompile_limit = 64
    for block in model.transformer.transformer_blocks:
        block.compile()
    clock, log = Clock(minutes, elapsed), CsvLog(runs / "infinity.csv")
    progress, losses, next_evaluation = tqdm(initial=step, mininterval=20), [], clock.elapsed + EVALUATE_SECONDS
    for views, pictures, ids in Batches(data, rows, backgrounds, tokenizer)(batch_size):
        bits, inputs = bits_and_inputs(vae, features[views, pictures], schedule, FLIP_RATE)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, inputs, schedule, torch.rand(batch_size) < CAPTION_DROP)
        losses.append(train_step(model, optimizers, logits, bits, weights, clock.progress, step))
        average.update(model, step)
        step += 1
        progress.update()
        if clock.elapsed >= next_evaluation or clock.progress == 1:
            averaged.load_state_dict(average.weights)
            measured, seconds, loss = evaluation.measure(averaged), clock.elapsed, sum(losses) / len(losses)
            log.write(step=step, seconds=seconds, images=step * batch_size, loss=loss, **measured)
            tqdm.write(f"step {step}: loss {loss:.4f}, " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items()))
            save_checkpoint(
                runs / "infinity.pt", model=model.state_dict(), average=average.weights, step=step,
                optimizers=[optimizer.state_dict() for optimizer in optimizers], elapsed=seconds,
            )  # fmt: skip
            losses, next_evaluation = [], seconds + EVALUATE_SECONDS
        if clock.progress == 1:
            break
    (runs / FINISHED).touch()
    return runs / "infinity.pt"


def train_step(
    model: TextToBits,
    optimizers: list[torch.optim.Optimizer],
    logits: torch.Tensor,
    bits: torch.Tensor,
    weights: torch.Tensor,
    progress: float,
    step: int,
) -> float:
    """One update from the logits of a batch and the bits that it should have said; returns the loss."""
    loss = (F.binary_cross_entropy_with_logits(logits, bits.float(), reduction="none") * weights).mean()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    factor = learning_rate_factor(step, progress, WARMUP_STEPS, DECAY_START)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here / "data", help="folder that data.py wrote")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="folder of the tokenizer and of checkpoints")
    parser.add_argument("--minutes", type=float, default=100, help="training time, stops not counted")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    arguments = parser.parse_args()
    print(train(arguments.data, arguments.runs, arguments.minutes, arguments.batch_size, arguments.seed))


if __name__ == "__main__":
    main()
