"""Captions of the emoji, and the text encoder's tokenizer that is trained on them."""

import json
import random

import torch
from data import BACKGROUNDS, STYLES, EmojiData
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5Tokenizer


STYLE_NAMES = {"3d": "3d style", "flat": "flat style"}
MAX_TOKENS = 32
VOCAB_SIZE = 2304
# Each concept is never trained on so many of the coloured backgrounds: those combinations tell whether words compose.
HELD_OUT_BACKGROUNDS = 2

TEXT_CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 320,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "dropout_rate": 0.0,
}


def article(label: str) -> str:
    """The label with its indefinite article."""
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def clean(label: str) -> str:
    """A label of the data set as people write: lower case, without its punctuation."""
    text = label.lower().replace("“", "").replace("”", "").replace("’", "'").replace(":", "").replace(",", "")
    return " ".join(text.split())


def caption(label: str, style: str | None = None, background: str | None = None, wording: int = 0) -> str:
    """A caption; what is `None` is not mentioned. `wording` picks one of the ways to say it."""
    subject = article(label) if wording % 2 else label
    if style is not None and wording % 4 == 3:
        subject, style = article(f"{style} {label}"), None
    parts = [subject]
    if style is not None:
        parts.append(STYLE_NAMES[style])
    if background is None:
        return ", ".join(parts)
    if wording % 3 == 2:
        return f"{', '.join(parts)} on {article(background)} background"
    return ", ".join([*parts, f"{background} background"])


def held_out_backgrounds(label: str) -> set[str]:
    """Coloured backgrounds that a concept is never trained with, the same ones in every run."""
    choice = random.Random(label)
    return set(choice.sample([name for name in BACKGROUNDS if name != "white"], HELD_OUT_BACKGROUNDS))


def training_backgrounds(labels: list[str], plain_share: float) -> torch.Tensor:
    """A random background for each label, as positions in `BACKGROUNDS`: white for `plain_share` of them."""
    names = list(BACKGROUNDS)
    allowed = [
        [i for i, name in enumerate(names) if i and name not in held_out_backgrounds(label)] for label in labels
    ]
    picks = [entry[int(torch.randint(len(entry), ()))] for entry in allowed]
    return torch.where(torch.rand(len(labels)) < plain_share, 0, torch.tensor(picks))


def random_caption(label: str, style: str, background: str) -> str:
    """A caption for training: half name the style, a third name white, all name other backgrounds, a few are capitalised."""
    chance = torch.rand(3).tolist()
    named = background if background != "white" or chance[0] < 1 / 3 else None
    text = caption(label, style if chance[1] < 0.5 else None, named, int(torch.randint(12, ())))
    return text[0].upper() + text[1:] if chance[2] < 0.15 else text


def all_captions(data: EmojiData) -> list[str]:
    """Every label in every wording, with styles and backgrounds in turn."""
    labels, names = sorted({clean(label) for label in data.captions}), list(BACKGROUNDS)
    texts = []
    for index, label in enumerate(labels):
        for wording in range(12):
            style = (*STYLES, None)[(index + wording) % 3]
            text = caption(label, style, names[(index + wording) % len(names)], wording)
            texts.append(text if wording % 6 else text[0].upper() + text[1:])
    return texts


def train_text_tokenizer(texts: list[str]) -> T5Tokenizer:
    """A unigram tokenizer of T5's kind, with a vocabulary of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def text_config(tokenizer: T5Tokenizer) -> T5Config:
    """The text encoder's configuration."""
    return T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **TEXT_CONFIG)
