"""Activations of the models by their shapes: what is alive beside weights and cache when most of it is."""

from typing import Any

from .methods import HACK, Geometry, Method, Plan
from .methods.hack import CONTEXTUAL


FP32 = 4
# Bytes a logit while tokens are drawn: guided and filtered logits, sorted ones with their int64 order, softmax, its sum, and
# what that removes.
SAMPLING_BYTES = 29


def block_bytes(config: Any, itemsize: int) -> int:
    """
    Bytes a token in a block outside the cache, the larger of two moments. In both, the float32 input of the block and the
    modulated float32 norm are alive.

    - Projected queries, keys and values, and their float32 copies. Infinity rotates: queries before and after, keys before
      and after, and the two halves of the rotated keys. VAR only normalises: queries, and keys before and after.
    - Feed-forward: the float32 stream, the inner layer before and after its activation, and what the block still holds of
      its attention: the output, and in Infinity the float32 norm before cross-attention.

    Args:
        config (`dict`):
            Of the transformer; Infinity's names the width inside the feed-forward layer, VAR's its ratio.
        itemsize (`int`):
            Bytes of a weight.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    infinity = "ff_hidden_dim" in config
    inner = config["ff_hidden_dim"] if infinity else round(dim * config["mlp_ratio"])
    copies, norms = (5, 1) if infinity else (3, 0)
    attention = dim * (2 * FP32 + 3 * itemsize + copies * FP32)
    feed_forward = dim * ((3 + norms) * FP32 + itemsize) + 2 * inner * itemsize
    return max(attention, feed_forward)


def cache_work_bytes(
    method: Method,
    geometry: Geometry,
    plan: Plan | None,
    step: int,
    rows: int,
    itemsize: int,
    merge_by_product: bool = True,
) -> int:
    """
    What is alive while the cache attends in one layer, beside what it stores between steps: the block's float32 input and
    norm, projected queries, keys and values, the queries and keys that attention reads and its output, and then

    - without a plan, keys and values of all tokens so far;
    - with one, group of heads after group of heads, its copies of queries, keys and values (those of the group before live
      on until they are made, its output longer) and what [`group_bytes`] counts.

    Args:
        method (`Method`):
            Chooses the tokens.
        geometry (`Geometry`):
            Of the model.
        plan (`Plan`, *optional*):
            What is held.
        step, rows, itemsize (`int`):
            Index of the scale, rows of the batch, bytes of a stored element.
        merge_by_product (`bool`, *optional*, defaults to `True`):
            Whether dropped tokens are merged as on a GPU.
    """
    length, head_dim = geometry.schedule.lengths[step], geometry.head_dim
    base = rows * geometry.num_heads * length * head_dim * (2 * FP32 + 6 * itemsize)
    if plan is None:
        seen = geometry.schedule.prefixes[step] + length
        return base + 2 * rows * geometry.num_heads * seen * head_dim * itemsize
    layer = plan.layers[0]
    stored = layer.store[step - 1] if step else (0,) * len(layer.groups)
    largest = before = 0
    for group, label, held, attend, store in zip(
        layer.groups, layer.labels, stored, layer.attend[step], layer.store[step]
    ):
        merged = attend < held + length and merges(method, label, step == len(geometry.schedule) - 1)
        counts = (held, length, attend, store)
        chosen = rows * len(group) * group_bytes(counts, head_dim, itemsize, merged, merge_by_product)
        copy = rows * len(group) * length * head_dim * itemsize if len(layer.groups) > 1 else 0
        largest = max(largest, 3 * copy + before + max(chosen, 3 * before))
        before = copy
    return base + largest


def merges(method: Method, label: str, last: bool) -> bool:
    """Whether a group merges what it drops: HACK's contextual heads do, by default at the last step."""
    if not isinstance(method, HACK) or label != CONTEXTUAL:
        return False
    return method.merge_at == "every" or (method.merge_at == "final" and last)


def group_bytes(
    counts: tuple[int, int, int, int], head_dim: int, itemsize: int, merged: bool, merge_by_product: bool
) -> int:
    """
    Bytes a row and head while tokens are chosen, the largest of four moments.

    - Scoring: the float32 copy of the current or stored keys, whichever is more.
    - Gathering: keys, and values from both sides and chosen (4 tensors of what is attended to, or, where more is attended to
      than stored, of what is stored beside all that is seen).
    - Merging: the keys and values that are handed over, and what [`merge_bytes`] counts.
    - Attending: keys and values that are seen.

    Args:
        counts (`tuple[int, int, int, int]`):
            Tokens that a head holds before the step, that the step adds, that it attends to, and that it holds after.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        merged (`bool`):
            Whether dropped tokens are merged.
        merge_by_product (`bool`):
            Whether they are as on a GPU.
    """
    held, length, attend, store = counts
    moments = [2 * attend * head_dim * itemsize]
    if attend < held + length or 0 < store < held + length:
        moments.append(max(held, length) * head_dim * FP32)
    if attend < held + length:
        moments.append(4 * attend * head_dim * itemsize)
    if 0 < store < attend:
        moments.append((2 * attend + 4 * store) * head_dim * itemsize)
    if merged:
        handed = 2 * attend * head_dim * itemsize
        moments.append(handed + merge_bytes(held + length, length, attend, head_dim, merge_by_product))
    return max(moments)


def merge_bytes(present: int, length: int, kept: int, head_dim: int, by_product: bool) -> int:
    """
    Bytes a row and head while HACK merges dropped tokens: the keys and values that are kept, twice one of them while it is
    summed and the unit keys, all in float32; the similarities of present and kept tokens; and on a GPU a matrix of the
    current tokens' like it, which sums by product, and a float32 copy of what is summed, on the CPU two such copies.
    """
    similarities = present * kept * FP32
    summed = length * (kept + head_dim) if by_product else 2 * length * head_dim
    return kept * head_dim * 4 * FP32 + similarities + summed * FP32


def decoder_bytes(config: Any, size: tuple[int, int], images: int, itemsize: int) -> int:
    """
    The most that is alive while images are decoded, from the convolutions' shapes, coarse to fine. At every moment the input
    of the level is held by the caller. A residual block holds its input and, at most, the norm and its activation; or in the
    end the shortcut (where the width changes), the branch, their sum and its quotient. The upsampling holds its input, the
    enlarged map and its convolution.
    """
    widths = tuple(config["block_out_channels"])
    channels, largest = widths[-1], 0
    for level in reversed(range(len(widths))):
        pixels = (size[0] >> level) * (size[1] >> level)
        width_in, width_out = channels, widths[level]
        for block in range(config["layers_per_block"] + 1):
            outer = width_in if block else 0
            shortcut = width_out if channels != width_out else 0
            inside = max(2 * channels, channels + width_out, 2 * width_out, shortcut + 3 * width_out)
            largest = max(largest, pixels * (outer + channels + inside))
            channels = width_out
        if level:
            largest = max(largest, pixels * (width_in + channels + 8 * channels))
    return largest * images * itemsize
