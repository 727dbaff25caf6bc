"""Draws a prompt with Emu3, whose guidance runs the model a second time: both passes get a compressed cache.

Checked on a tiny model of the library's class with random weights; the released weights were not at hand.

python examples/emu3_headkv.py "a lighthouse in a storm" --model BAAI/Emu3-Gen-hf --dtype bfloat16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, Emu3ForConditionalGeneration, LogitsProcessorList

from hack_pipelines.integrations.next_token import to_images
from hack_pipelines.integrations.transformers import HeadKVCache, compressed_guidance, head_attention


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--negative-prompt", default="lowres, blurry, worst quality")
    parser.add_argument("--model", default="BAAI/Emu3-Gen-hf")
    parser.add_argument("--kv-budget", type=float, default=1 / 6)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--ratio", default="1:1")
    parser.add_argument("--area", type=int, default=720 * 720, help="in pixels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("emu3.png"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model)
    model = Emu3ForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", use_safetensors=True
    )
    model = model.to(device).eval()

    # Both prompts end with the size of the picture and the token that begins it.
    shape = {"return_for_image_generation": True, "ratio": args.ratio, "image_area": args.area}
    inputs = processor(text=[args.prompt], return_tensors="pt", **shape)
    negative = processor(text=[args.negative_prompt], return_tensors="pt", **shape)
    rows, columns = map(int, inputs["image_sizes"][0])
    start, line = inputs["input_ids"].shape[1], columns + 1

    tokenizer, vocabulary = processor.tokenizer, model.model.vocabulary_mapping
    closing = [tokenizer.eof_token_id, tokenizer.eoi_token_id, tokenizer.eos_token_id]

    def allowed(row: int, sequence: torch.Tensor) -> list[int]:
        """What may come next: a code, the end of a line, or one of the three tokens that close a picture."""
        drawn = len(sequence) - start
        if drawn >= rows * line:
            return closing[drawn - rows * line :][:1]
        return [vocabulary.eol_token_id] if drawn % line == columns else vocabulary.image_tokens

    # The prompts differ in length, so each cache counts the tokens before the picture for itself.
    caches = [HeadKVCache.from_model(model, args.kv_budget, (rows, line)) for _ in range(2)]
    torch.manual_seed(args.seed)
    with torch.no_grad(), head_attention(model):
        guidance = compressed_guidance(model, args.guidance_scale, negative["input_ids"].to(device), caches[1])
        sequences = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            do_sample=True,
            top_k=2048,
            max_new_tokens=rows * line + len(closing),
            prefix_allowed_tokens_fn=allowed,
            logits_processor=LogitsProcessorList([guidance]),
            past_key_values=caches[0],
        )
        pixels = model.decode_image_tokens(image_tokens=sequences[:, start:], height=rows, width=columns)
    to_images(pixels, processor)[0].save(args.output)
    for name, cache in zip(("conditional", "unconditional"), caches):
        print(f"{name} cache: {cache.report()}")


if __name__ == "__main__":
    main()
