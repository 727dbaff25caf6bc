"""Activations of the models by their shapes: what is alive beside weights and cache when most of it is."""

from collections import Counter
from typing import Any

from .methods import HACK, Geometry, Method, Plan, SegmentPlan
from .methods.base import SCORED_KEYS
from .methods.hack import CONTEXTUAL, MERGE_CHUNK


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
    layer = plan.layers[0]
    stored = layer.store[step - 1] if step else (0,) * len(layer.groups)
    largest = 0
    for group, label, held, attend, store in zip(
        layer.groups, layer.labels, stored, layer.attend[step], layer.store[step]
    ):
        counts = (held, length, attend, store)
        chosen = group_bytes(counts, head_dim, itemsize, observed(method, length))
        if attend < held + length and merges(method, label, step == len(geometry.schedule) - 1):
            chosen = max(chosen, merge_bytes(counts, len(group), head_dim, itemsize, merge_by_product))
        copies = 3 * length * head_dim * itemsize if len(layer.groups) > 1 else 0
        largest = max(largest, rows * len(group) * (copies + chosen))
    return base + largest


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


def merges(method: Method, label: str, last: bool) -> bool:
    """Whether a group merges what it drops: HACK's contextual heads do, by default at the last step."""
    if not isinstance(method, HACK) or label != CONTEXTUAL:
        return False
    return method.merge_at == "every" or (method.merge_at == "final" and last)


def observed(method: Method, length: int) -> int:
    """Queries of a scale that score the keys; none where a method ranks without scores."""
    if not isinstance(method, HACK):
        return 0
    return length if length <= 2 * method.n_obs else method.n_obs


def group_bytes(counts: tuple[int, int, int, int], head_dim: int, itemsize: int, queries: int) -> int:
    """
    Bytes a row and head while tokens are chosen, the largest of three moments.

    - Scoring: logits of the observed queries in float32, twice, or once and the float32 copy of a chunk of keys.
    - Gathering: keys, and values from both sides and chosen (4 tensors of what is attended to, or, where more is attended to
      than stored, of what is stored beside all that is seen).
    - Attending: keys and values that are seen.

    Args:
        counts (`tuple[int, int, int, int]`):
            Tokens that a head holds before the step, that the step adds, that it attends to, and that it holds after.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        queries (`int`):
            How many of them are observed.
    """
    held, length, attend, store = counts
    moments = [2 * attend * head_dim * itemsize]
    if queries and (attend < held + length or 0 < store < held + length):
        logits = queries * (held + length)
        moments.append((logits + max(logits, min(SCORED_KEYS, max(held, length)) * head_dim)) * FP32)
    if attend < held + length:
        moments.append(4 * attend * head_dim * itemsize)
    if 0 < store < attend:
        moments.append((2 * attend + 4 * store) * head_dim * itemsize)
    return max(moments)


def merge_bytes(counts: tuple[int, int, int, int], heads: int, head_dim: int, itemsize: int, by_product: bool) -> int:
    """
    Bytes a row and head while HACK merges dropped tokens into kept ones.

    The keys and values that are handed over are alive throughout, and in float32 those of the result, the sums that are
    added to them, and the unit keys: 5 tensors of what is kept. Beside them there is the largest of

    - a chunk of tokens and their cosines with what is kept;
    - on a GPU the matrix of the chunk's weights, which is as large as its cosines, a float32 copy of the chunk and their
      product; on the CPU two such copies;
    - the result and the sums added up.

    Args:
        counts (`tuple[int, int, int, int]`):
            As [`group_bytes`] takes them.
        heads (`int`):
            Of the group, on which the length of a chunk depends.
        head_dim, itemsize (`int`):
            Channels of a head, bytes of a stored element.
        by_product (`bool`):
            Whether sums are made as on a GPU.
    """
    held, length, kept, _ = counts
    chunk = min(max(1, MERGE_CHUNK // (heads * kept)), max(held, length))
    cosines = chunk * (kept + head_dim)
    summed = cosines + kept * head_dim if by_product else 2 * chunk * head_dim
    floats = 5 * kept * head_dim + max(cosines, summed, 2 * kept * head_dim)
    return 2 * kept * head_dim * itemsize + floats * FP32


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
