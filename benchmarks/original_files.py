"""
Original files of Infinity in their true shapes with random weights, to measure converting, loading and drawing where the
released ones cannot be had. From the root of a clone, with 15 GB of disk:

    python -m benchmarks.original_files --output original-2b

The text encoder is flan-t5-xl's in shape, without its decoder, and with a tokenizer of a few words.
"""

import argparse
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from tests.components import tiny_text_encoder
from tests.released import RELEASED_BSQ, RELEASED_INFINITY, released_bsq, released_infinity, wrapped


T5_XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights in float32 that keep activations finite."""
    weights = {}
    for key, shape in shapes.items():
        if key.endswith("zero_k_bias"):
            weights[key] = torch.zeros(shape)
        elif "norm" in key and key.endswith("weight"):
            weights[key] = torch.ones(shape)
        else:
            weights[key] = torch.empty(shape).normal_(0, 0.02)
    return weights


def write_text_encoder(folder: Path, config: dict[str, int]):
    """A T5 encoder and a tokenizer, as `save_pretrained` leaves them."""
    shape = T5Config(**config, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        encoder = T5EncoderModel(shape)
    encoder.to_empty(device="cpu")
    encoder.tie_weights()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.fill_(1) if "layer_norm" in name else parameter.normal_(0, 0.02)
    encoder.save_pretrained(folder, max_shard_size="2GB")
    tiny_text_encoder()[1].save_pretrained(folder)


def write(folder: Path, transformer: tuple[int, ...], tokenizer: tuple, text_encoder: dict[str, int]):
    """
    Write all three.

    Args:
        folder (`Path`):
            Where they go.
        transformer (`tuple`):
            Depth, width, heads, feed-forward width, pooling heads, bits and blocks of a chunk.
        tokenizer (`tuple`):
            Bits and widths.
        text_encoder (`dict`):
            Fields of `T5Config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = released_infinity(*transformer, text_channels=text_encoder["d_model"])
    torch.save(random_weights(shapes), folder / "infinity_2b_reg.pth")
    torch.save({"vae": random_weights(wrapped(released_bsq(*tokenizer)))}, folder / "infinity_vae_d32reg.pth")
    write_text_encoder(folder / "flan-t5-xl", text_encoder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    torch.manual_seed(0)
    write(parser.parse_args().output, RELEASED_INFINITY["2b"][:7], RELEASED_BSQ["d32"][:2], T5_XL)
