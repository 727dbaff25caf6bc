"""Activations of the models by their shapes: what is alive beside weights and cache when most of it is."""

from collections import Counter
from typing import Any

from .methods import Geometry, LayerPlan, Method, Plan, SegmentPlan
from .methods.base import SCORED_KEYS
from .methods.hack import MERGE_CHUNK


FP32 = 4
# Bytes a logit while tokens are drawn: guided and filtered logits, sorted ones with their int64 order, softmax, its sum, and
# what that removes.
SAMPLING_BYTES = 29
# Bytes a present token of a head in a merge: whether it is dropped, its cosine and weight in float32, its target in int64.
MERGED_BYTES = 1 + 2 * FP32 + 8


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

    - without a plan, keys of all tokens so far, and values of them; the old keys are gone when these are joined;
    - with one, group of heads after group of heads, its copies of queries, keys and values and what [`group_bytes`] counts,
      or [`merge_bytes`] where that is more; for plans of whole scales what [`segment_tokens`] counts.

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
        return base + rows * geometry.num_heads * (seen + length) * head_dim * itemsize
    if isinstance(plan, SegmentPlan):
        return base + rows * segment_tokens(plan, step) * head_dim * itemsize
    return base + rows * max(
        layer_bytes(
            method, layer, length, step, head_dim, itemsize, merge_by_product, last=step == len(plan.schedule) - 1
        )
        for layer in set(plan.layers)
    )


def layer_bytes(
    method: Method,
    layer: LayerPlan,
    length: int,
    step: int,
    head_dim: int,
    itemsize: int,
    merge_by_product: bool,
    last: bool,
) -> int:
    """
    The largest group's part of [`cache_work_bytes`] in one layer, bytes a row.

    Args:
        method (`Method`):
            Chooses the tokens.
        layer (`LayerPlan`):
            What the layer holds.
        length, step (`int`):
            Tokens and index of the scale.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        merge_by_product (`bool`):
            Whether dropped tokens are merged as on a GPU.
        last (`bool`):
            Whether the scale is the last one.
    """
    largest = 0
    stored = layer.store[step - 1] if step else (0,) * len(layer.groups)
    groups = zip(layer.groups, layer.labels, stored, layer.attend[step], layer.store[step])
    for group, label, held, attend, store in groups:
        present = held + length
        goes = attend < present or 0 < store < present
        ranked = goes or (store > 0 and method.carries_scores)
        queries = method.scored_queries(label, length) if ranked else 0
        chosen = group_bytes((held, length, attend, store), head_dim, itemsize, queries)
        if goes and method.merges(label, last):
            kept = attend if attend < present else store
            merging = merge_bytes(present, kept, max(held, length), len(group), head_dim, itemsize, merge_by_product)
            # What is attended to waits while what is stored is merged.
            waiting = 0 if attend < present else 2 * attend * head_dim * itemsize
            chosen = max(chosen, waiting + merging)
        copies = 3 * length * head_dim * itemsize if len(layer.groups) > 1 else 0
        largest = max(largest, len(group) * (copies + chosen))
    return largest


def segment_tokens(plan: SegmentPlan, step: int) -> int:
    """
    Tokens of a row that are alive while the heads of a layer attend that read equally many: joined keys and values, the
    values as they were gathered, and where other heads read more or less, copies of queries, keys and values.
    """
    length, largest = plan.schedule.lengths[step], 0
    for layer in plan.layers:
        together = Counter(layer.attend[step])
        copies = 3 * length if len(together) > 1 else 0
        for attend, heads in together.items():
            largest = max(largest, heads * (3 * attend - length + copies))
    return largest


def group_bytes(counts: tuple[int, int, int, int], head_dim: int, itemsize: int, queries: int) -> int:
    """
    Bytes a row and head while tokens are chosen, the largest of three moments.

    - Scoring: logits of the queries in float32, twice, or once and the float32 copy of a chunk of keys.
    - Gathering: keys, and values from both sides and chosen (4 tensors of what is attended to, or, where more is attended to
      than stored, of what is stored beside all that is seen).
    - Attending: keys and values that are seen.

    Args:
        counts (`tuple[int, int, int, int]`):
            Tokens that a head holds before the step, that the step adds, that it attends to, and that it holds after.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        queries (`int`):
            How many score the keys at once; 0 where nothing is ranked, or without products of queries and keys.
    """
    held, length, attend, store = counts
    moments = [2 * attend * head_dim * itemsize]
    if queries:
        logits = queries * (held + length)
        moments.append((logits + max(logits, min(SCORED_KEYS, max(held, length)) * head_dim)) * FP32)
    if attend < held + length:
        moments.append(4 * attend * head_dim * itemsize)
    if 0 < store < attend:
        moments.append((2 * attend + 4 * store) * head_dim * itemsize)
    return max(moments)


def merge_bytes(
    present: int, kept: int, largest: int, heads: int, head_dim: int, itemsize: int, by_product: bool
) -> int:
    """
    Bytes a row and head while [`merge_by_cosine`] folds dropped tokens into kept ones.

    Throughout, the keys and values that are handed over are alive, their float32 copies, and of every present token whether
    it is dropped, its cosine, target and weight. Beside them there is the largest of

    - the unit keys, and a chunk of float32 keys with their unit keys, then these with their cosines with what is kept;
    - the sums that are added to the copies, and on a GPU the matrix of a chunk's weights, which is as large as its cosines, a
      float32 copy of the chunk and their product; on the CPU two such copies;
    - the sums, and the copies with the sums added to them.

    Args:
        present, kept (`int`):
            Tokens that a head has, and that it keeps.
        largest (`int`):
            Tokens of the larger part, history or current scale; a chunk lies in one of them.
        heads (`int`):
            Of the group, on which the length of a chunk depends.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        by_product (`bool`):
            Whether sums are made as on a GPU.
    """
    chunk = min(max(1, MERGE_CHUNK // (heads * kept)), largest)
    of_kept, of_chunk = kept * head_dim, chunk * head_dim
    compared = of_kept + of_chunk + max(of_chunk, chunk * kept)
    added = chunk * kept + of_chunk + of_kept if by_product else 2 * of_chunk
    floats = 2 * of_kept + max(compared, 2 * of_kept + added, 4 * of_kept)
    return 2 * of_kept * itemsize + floats * FP32 + present * MERGED_BYTES


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
