"""Folders of tiny next-token models with tiny processors, as the library saves them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    Emu3ImageProcessor,
    Emu3Processor,
    JanusProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from ..components import tiny_vae
from .models import SIDE, chameleon, emu3, janus, sharpened, text_config


# Ids of the special tokens are those of the models.
WORDS = ["<pad>", "<bos>", "<unk>", "<image>", "<boi>", "<image_in_text>", "<|extra_200|>", "<|image token|>"]
MORE = ["<eoi>", "<eof>", "<eos>", "a", "red", "cat", "house", "dog", "blurry", "8*8", "6*8"]
CODES = 32
CLASSES = {0: "cat", 1: "dog, puppy", 2: "car"}


def word_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """A token a word; the names are those of special tokens that a processor asks for."""
    words = {word: index for index, word in enumerate(WORDS + MORE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=names,
    )


def save_janus(folder: Path, kv_heads: int = 2, side: int = SIDE) -> str:
    janus(kv_heads, side).save_pretrained(folder)
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    # Of the two classes, the one that does without torchvision.
    image_processor = JanusImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    JanusProcessor(image_processor, word_tokenizer(**names), num_image_tokens=side * side).save_pretrained(folder)
    return str(folder)


def save_emu3(folder: Path, kv_heads: int = 2) -> str:
    emu3(kv_heads).save_pretrained(folder)
    names = {
        "image_token": "<image>",
        "boi_token": "<boi>",
        "eoi_token": "<eoi>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<eof>",
    }
    Emu3Processor(Emu3ImageProcessor(), word_tokenizer(**names)).save_pretrained(folder)
    return str(folder)


def code_model() -> LlamaForCausalLM:
    """A Llama model of 8 x 8 codes, and three classes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **text_config(2, max_position_embeddings=SIDE * SIDE + 1),
        num_codes=CODES,
        id2label=CLASSES,
        bos_token_id=None,
        eos_token_id=None,
    )
    return sharpened(LlamaForCausalLM(config))


def save_code_model(folder: Path) -> str:
    code_model().save_pretrained(folder)
    tiny_vae().save_pretrained(folder / "vae")
    return str(folder)


def save_chameleon(folder: Path) -> str:
    chameleon(2).save_pretrained(folder)
    word_tokenizer(boi_token="<boi>").save_pretrained(folder)
    return str(folder)
