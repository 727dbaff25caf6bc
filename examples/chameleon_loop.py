"""Draws the codes of a picture with Chameleon or Anole in a loop of one's own, with a compressed cache.

`generate` cannot: Chameleon's `forward` sets the logits of all image tokens to the smallest number. The loop runs the model
below it and the head. It is the pattern for any model whose attention goes through the attention interface of transformers.

Checked on a tiny model of the library's class with random weights; the released weights were not at hand. Meta's Chameleon
was released without the ability to draw; fine-tunes such as Anole have it.

python examples/chameleon_loop.py "a lighthouse in a storm" --model leloy/Anole-7b-v0.1-hf --dtype bfloat16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, ChameleonForConditionalGeneration

from hack_pipelines.integrations.next_token import CodeSampling
from hack_pipelines.integrations.transformers import HeadKVCache, head_attention


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="leloy/Anole-7b-v0.1-hf")
    parser.add_argument("--kv-budget", type=float, default=1 / 6)
    parser.add_argument("--side", type=int, default=32, help="lines, and tokens of a line")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("chameleon.safetensors"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ChameleonForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", use_safetensors=True
    )
    model = model.to(device).eval()

    vocabulary = model.model.vocabulary_mapping
    image_tokens = torch.tensor(vocabulary.image_tokens, device=device)
    # The token that begins a picture ends the prompt; older tokenizers have no name for it.
    begin = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "boi_token", "<racm3:break>"))
    step = torch.tensor([[*tokenizer(args.prompt)["input_ids"], begin]], device=device)

    sampling, generator = CodeSampling(top_p=0.9), torch.Generator().manual_seed(args.seed)
    cache = HeadKVCache.from_model(model, args.kv_budget, (args.side, args.side))
    drawn = []
    with torch.no_grad(), head_attention(model):
        for _ in range(args.side**2):
            hidden = model.model(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            # Only image tokens may come: the others' logits are left out.
            step = image_tokens[sampling.draw(model.lm_head(hidden)[:, image_tokens], generator=generator)][:, None]
            drawn.append(step)
    # The library converts these no further: it has no decoder of Chameleon's image tokens.
    save_file({"tokens": torch.cat(drawn, dim=1)}, args.output)
    print(f"cache: {cache.report()}")


if __name__ == "__main__":
    main()
