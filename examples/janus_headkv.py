"""Draws a prompt with Janus or Janus-Pro, with the full cache and with a small one, and prints what each held.

Checked on a tiny model of the library's class with random weights; the released weights were not at hand. `JanusPipeline` of
`hack_pipelines.integrations.next_token` does the same with a seed of each picture's own.

python examples/janus_headkv.py "a lighthouse in a storm" --model deepseek-community/Janus-Pro-1B --dtype bfloat16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, JanusForConditionalGeneration

from hack_pipelines.integrations.next_token import to_images
from hack_pipelines.integrations.transformers import HeadKVCache, head_attention


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="deepseek-community/Janus-Pro-1B")
    parser.add_argument("--kv-budget", type=float, default=1 / 6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model)
    model = JanusForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", use_safetensors=True
    )
    model = model.to(device).eval()
    # Lost while loading where the generation configuration was made from the model's.
    model.generation_config.generation_kwargs = {"boi_token_id": processor.tokenizer.boi_token_id}

    prompt = args.prompt
    if processor.chat_template is not None:
        turns = [{"role": "user", "content": [{"type": "text", "text": args.prompt}]}]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[prompt], generation_mode="image", return_tensors="pt").to(device)

    for name, kv_budget in (("full", None), ("small", args.kv_budget)):
        # A cache serves one generation.
        cache = HeadKVCache.from_model(model, kv_budget)
        torch.manual_seed(args.seed)
        with torch.no_grad(), head_attention(model):
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_mode="image",
                guidance_scale=5.0,
                do_sample=True,
                past_key_values=cache,
            )
            pixels = model.decode_image_tokens(tokens).movedim(-1, 1)
        to_images(pixels, processor)[0].save(args.output_dir / f"janus_{name}.png")
        print(f"{name} cache: {cache.report()}")


if __name__ == "__main__":
    main()
