"""Keys and shapes of the released checkpoints, from the published tables, and state dicts made of them."""

import torch


SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# Depth, sides, shared AdaLN, keys, parameters.
RELEASED = {
    "d16": (16, SIDES_256, False, 220, 310_283_520),
    "d20": (20, SIDES_256, False, 272, 600_917_136),
    "d24": (24, SIDES_256, False, 324, 1_033_399_360),
    "d30": (30, SIDES_256, False, 402, 2_010_020_356),
    "d36": (36, SIDES_512, True, 446, 2_353_893_904),
}


def pair(prefix: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}


def released_transformer(
    depth: int, sides: tuple[int, ...], shared: bool, codes: int = 4096, channels: int = 32
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released transformer, from the published tables."""
    dim, total = 64 * depth, sum(side**2 for side in sides)
    keys = {
        "pos_start": (1, 1, dim),
        "pos_1LC": (1, total, dim),
        "lvl_1L": (1, total),
        "attn_bias_for_masking": (1, 1, total, total),
        "class_emb.weight": (1001, dim),
        "lvl_embed.weight": (10, dim),
        **pair("word_embed", dim, channels),
        **pair("head_nm.ada_lin.1", 2 * dim, dim),
        **pair("head", codes, dim),
    }
    if shared:
        keys |= pair("shared_ada_lin.1", 6 * dim, dim)
    for index in range(depth):
        block = f"blocks.{index}"
        keys |= {
            f"{block}.attn.scale_mul_1H11": (1, depth, 1, 1),
            f"{block}.attn.q_bias": (dim,),
            f"{block}.attn.v_bias": (dim,),
            f"{block}.attn.zero_k_bias": (dim,),
            f"{block}.attn.mat_qkv.weight": (3 * dim, dim),
            **pair(f"{block}.attn.proj", dim, dim),
            **pair(f"{block}.ffn.fc1", 4 * dim, dim),
            **pair(f"{block}.ffn.fc2", dim, 4 * dim),
        }
        keys |= {f"{block}.ada_gss": (1, 1, 6, dim)} if shared else pair(f"{block}.ada_lin.1", 6 * dim, dim)
    return keys


def residual(prefix: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    keys = {
        **pair(f"{prefix}.norm1", before),
        **pair(f"{prefix}.conv1", after, before, 3, 3),
        **pair(f"{prefix}.norm2", after),
        **pair(f"{prefix}.conv2", after, after, 3, 3),
    }
    return keys if before == after else {**keys, **pair(f"{prefix}.nin_shortcut", after, before, 1, 1)}


def attention(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **pair(f"{prefix}.norm", width),
        **pair(f"{prefix}.qkv", 3 * width, width, 1, 1),
        **pair(f"{prefix}.proj_out", width, width, 1, 1),
    }


def released_tokenizer() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the released tokenizer, from the published tables."""
    keys = {**pair("encoder.conv_in", 160, 3, 3, 3), **pair("decoder.conv_in", 640, 32, 3, 3)}
    keys |= {**pair("encoder.norm_out", 640), **pair("encoder.conv_out", 32, 640, 3, 3)}
    keys |= {**pair("decoder.norm_out", 160), **pair("decoder.conv_out", 3, 160, 3, 3)}
    for coder in ("encoder", "decoder"):
        keys |= residual(f"{coder}.mid.block_1", 640, 640) | residual(f"{coder}.mid.block_2", 640, 640)
        keys |= attention(f"{coder}.mid.attn_1", 640)
    down = ((160, 160), (160, 160), (160, 320), (320, 320), (320, 640))
    up = ((160, 160), (320, 160), (320, 320), (640, 320), (640, 640))
    for level in range(5):
        for index in range(3):
            if index < 2:
                first, width = down[level]
                keys |= residual(f"encoder.down.{level}.block.{index}", width if index else first, width)
            first, width = up[level]
            keys |= residual(f"decoder.up.{level}.block.{index}", width if index else first, width)
        if level < 4:
            keys |= pair(f"encoder.down.{level}.downsample.conv", down[level][1], down[level][1], 3, 3)
        if level > 0:
            keys |= pair(f"decoder.up.{level}.upsample.conv", up[level][1], up[level][1], 3, 3)
    for index in range(3):
        keys |= attention(f"decoder.up.4.attn.{index}", 640)
        if index < 2:
            keys |= attention(f"encoder.down.4.attn.{index}", 640)
    for index in range(4):
        keys |= pair(f"quantize.quant_resi.qresi_ls.{index}", 32, 32, 3, 3)
    keys |= {"quantize.embedding.weight": (4096, 32), "quantize.ema_vocab_hit_SV": (10, 4096)}
    return keys | pair("quant_conv", 32, 32, 3, 3) | pair("post_quant_conv", 32, 32, 3, 3)


# Depth, width, heads, feed-forward width, text pooling heads, bits, blocks of a chunk, keys, parameters.
RELEASED_INFINITY = {
    "2b": (32, 2048, 16, 8192, 16, 32, 4, 694, 2_204_564_032),
    "8b": (40, 3584, 28, 14336, 16, 56, 5, 862, 8_375_791_824),
}


def released_infinity(
    depth: int,
    dim: int,
    heads: int,
    hidden_dim: int,
    pool_heads: int,
    bits: int,
    chunk: int,
    text_channels: int = 2048,
    max_length: int = 512,
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released Infinity transformer, from the published tables."""
    pool = "text_proj_for_sos.ca"
    keys = {
        "cfg_uncond": (max_length, text_channels),
        "pos_start": (1, 1, dim),
        "text_norm.weight": (text_channels,),
        f"{pool}.mat_q": (1, pool_heads, dim // pool_heads),
        f"{pool}.mat_kv.weight": (2 * dim, text_channels),
        f"{pool}.v_bias": (dim,),
        f"{pool}.zero_k_bias": (dim,),
        **pair(f"{pool}.proj", dim, dim),
        **pair("text_proj_for_ca.0", dim, text_channels),
        **pair("text_proj_for_ca.2", dim, dim),
        "lvl_embed.weight": (15, dim),
        **pair("word_embed", dim, bits),
        **pair("shared_ada_lin.1", 6 * dim, dim),
        **pair("head_nm.ada_lin.1", 2 * dim, dim),
        **pair("head", 2 * bits, dim),
    }
    for index in range(depth):
        block = f"block_chunks.{index // chunk}.module.{index % chunk}"
        keys |= {
            f"{block}.ada_gss": (1, 1, 6, dim),
            f"{block}.sa.scale_mul_1H11": (1, heads, 1, 1),
            f"{block}.sa.mat_qkv.weight": (3 * dim, dim),
            **{f"{block}.sa.{part}_bias": (dim,) for part in ("q", "v", "zero_k")},
            **pair(f"{block}.sa.proj", dim, dim),
            **pair(f"{block}.ca.mat_q", dim, dim),
            f"{block}.ca.mat_kv.weight": (2 * dim, dim),
            **{f"{block}.ca.{part}_bias": (dim,) for part in ("v", "zero_k")},
            **pair(f"{block}.ca.proj", dim, dim),
            **pair(f"{block}.ca_norm", dim),
            **pair(f"{block}.ffn.fc1", hidden_dim, dim),
            **pair(f"{block}.ffn.fc2", dim, hidden_dim),
        }
    return keys


# Bits, widths, keys, parameters.
RELEASED_BSQ = {
    "d32": (32, (128, 256, 512, 512, 512), 270, 110_118_051),
    "d56_f8_14": (14, (128, 256, 512, 512), 226, 81_624_209),
}


def released_bsq(channels: int, widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released tokenizer of Infinity, from the published tables."""
    first, last = widths[0], widths[-1]
    keys = {**pair("encoder.conv_in", first, 3, 3, 3), **pair("decoder.conv_in", last, channels, 3, 3)}
    keys |= {**pair("encoder.norm_out", last), **pair("encoder.conv_out", channels, last, 3, 3)}
    keys |= {**pair("decoder.norm_out", first), **pair("decoder.conv_out", 3, first, 3, 3)}
    for coder in ("encoder", "decoder"):
        keys |= residual(f"{coder}.mid.block_1", last, last) | residual(f"{coder}.mid.block_2", last, last)
    for level, width in enumerate(widths):
        finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        for index in range(3):
            if index < 2:
                keys |= residual(f"encoder.down.{level}.block.{index}", width if index else finer, width)
            keys |= residual(f"decoder.up.{level}.block.{index}", width if index else coarser, width)
        if level < len(widths) - 1:
            keys |= pair(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        if level > 0:
            keys |= pair(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return keys


def wrapped(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names with the level that Infinity's tokenizers put around every convolution and norm."""
    result = {}
    for key, shape in shapes.items():
        module, _, kind = key.rpartition(".")
        result[f"{module}.{'norm' if module.split('.')[-1].startswith('norm') else 'conv'}.{kind}"] = shape
    return result


def outlined(shapes: dict[str, tuple[int, ...]], sides: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Weights without data; what is derived from the schedule, and zeros, are real, because they are compared."""
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if sides:
        levels = torch.arange(len(sides)).repeat_interleave(torch.tensor([side**2 for side in sides]))
        state_dict["lvl_1L"] = levels[None]
        hidden = levels[:, None] < levels[None]
        state_dict["attn_bias_for_masking"] = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None, None]
    for key in shapes:
        if key.endswith("zero_k_bias"):
            state_dict[key] = torch.zeros(shapes[key])
    return state_dict
