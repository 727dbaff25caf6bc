"""What a cache held, measured from its tensors while an image was drawn."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


# The original VAR and Infinity cache keys in float32, also under autocast, because they normalise them there.
ORIGINAL_KEY_BYTES = 4


@dataclass
class CacheReport:
    """
    What was stored and attended to, per image unless said otherwise.

    A step is one scale. A boundary is the moment between two steps; a checkpoint is the moment after one layer has
    committed its part of a step.

    Args:
        tokens_by_step (`list[float]`):
            Tokens stored at each boundary, averaged over layers and heads; one entry a scale but the last.
        peak_tokens (`float`):
            The largest of them.
        mean_tokens (`float`):
            Their mean.
        checkpoint_peak_tokens (`float`):
            The most tokens stored at any checkpoint, averaged over layers and heads.
        bytes_by_step (`list[int]`):
            Bytes of the storages behind all that is stored, at each boundary.
        attended_by_step (`list[float]`):
            Keys that a query saw at each step, averaged over layers and heads.
        attention_flops (`int`):
            Multiplications and additions of all attention products, without the softmax.
        bytes_logical_peak (`int`):
            Bytes of all that is stored at the worst boundary, from shapes and dtypes.
        bytes_allocated_peak (`int`):
            The largest of `bytes_by_step`; a view counts all that it keeps alive.
        bytes_full (`int`):
            Bytes of all tokens of the schedule as the original implementation holds them: keys in float32, values in
            the stored dtype.
        bytes_full_cacheable (`int`):
            Bytes of all tokens that a later step reads, in the stored dtype: what is left when only the lossless savings
            are made.
        metadata_bytes (`int`):
            How many of them are neither keys nor values: ids, scores, factors of a quantiser.
        cuda_peak_delta (`int`, *optional*):
            Rise of the allocated GPU memory during the whole call, for the whole batch. `None` where there is no GPU, or
            where the call did not exceed an earlier peak of the process.
        full_note (`str`):
            What `bytes_full` counts, in words.
    """

    tokens_by_step: list[float]
    peak_tokens: float
    mean_tokens: float
    checkpoint_peak_tokens: float
    bytes_by_step: list[int]
    attended_by_step: list[float]
    attention_flops: int
    bytes_logical_peak: int
    bytes_allocated_peak: int
    bytes_full: int
    bytes_full_cacheable: int
    metadata_bytes: int = 0
    cuda_peak_delta: int | None = None
    full_note: str = "all tokens, float32 keys"

    def __str__(self) -> str:
        if not self.bytes_allocated_peak:
            return "nothing was stored"
        return (
            f"{self.bytes_allocated_peak / 2**20:.2f} MiB stored at most, "
            f"{self.bytes_full / self.bytes_allocated_peak:.2f} times less than the original's "
            f"{self.bytes_full / 2**20:.2f} MiB ({self.full_note}) and "
            f"{self.bytes_full_cacheable / self.bytes_allocated_peak:.2f} times less than lossless; "
            f"at most {self.peak_tokens:.1f} tokens a head"
        )


@dataclass
class CacheMeter:
    """
    Counts what a cache holds, checkpoint by checkpoint, and makes the report from it.

    Args:
        num_layers, num_heads, head_dim (`int`):
            Geometry of the model.
        rows (`int`):
            Rows of the batch.
        images (`int`):
            Images of the batch; a row is half an image with guidance.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    rows: int
    images: int
    layer_tokens: list[float] = field(init=False)
    layer_bytes: list[tuple[int, int]] = field(init=False)
    layer_storages: list[dict[tuple[torch.device, int], int]] = field(init=False)
    boundaries: list[tuple[float, int, int, int]] = field(init=False, default_factory=list)
    held_tokens: float = field(init=False, default=0)
    checkpoint_peak: float = field(init=False, default=0)
    attended: list[float] = field(init=False, default_factory=list)
    flops: int = field(init=False, default=0)

    def __post_init__(self):
        self.layer_tokens = [0] * self.num_layers
        self.layer_bytes = [(0, 0)] * self.num_layers
        self.layer_storages = [{} for _ in range(self.num_layers)]

    def commit(
        self,
        layer: int,
        step: int,
        tensors: Iterable[torch.Tensor],
        metadata: Iterable[torch.Tensor],
        attended: float,
        queries: int,
        condition: Iterable[torch.Tensor] = (),
    ):
        """
        Take note of a layer that has finished a step.

        Args:
            layer (`int`):
                Index of the layer.
            step (`int`):
                Index of the scale.
            tensors (`Iterable[torch.Tensor]`):
                Every key and value tensor that the layer now holds, `[rows, heads, tokens, head_dim]`.
            metadata (`Iterable[torch.Tensor]`):
                Every other tensor that it holds.
            attended (`float`):
                Keys that a query saw, summed over the heads, a mean over the rows.
            queries (`int`):
                Tokens of the scale.
            condition (`Iterable[torch.Tensor]`, *optional*):
                Keys and values of what is no part of the image. Their bytes count, their tokens do not.
        """
        tensors, beside = list(tensors), list(metadata)
        held = [*tensors, *beside, *condition]
        self.layer_storages[layer] = {
            (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in held
        }
        # Keys and values hold the same tokens.
        self.hold(layer, sum(tensor.shape[:3].numel() for tensor in tensors) / 2 / self.rows)
        self.layer_bytes[layer] = sum(tensor.nbytes for tensor in held), sum(tensor.nbytes for tensor in beside)
        while len(self.attended) <= step:
            self.attended.append(0)
        self.attended[step] += attended
        self.flops += round(4 * self.head_dim * self.rows * queries * attended) // self.images
        if layer == self.num_layers - 1:
            logical, metadata_bytes = (sum(column) for column in zip(*self.layer_bytes))
            # Layers may share a storage, which counts once.
            allocated = sum({key: size for storages in self.layer_storages for key, size in storages.items()}.values())
            self.boundaries.append((sum(self.layer_tokens), logical, allocated, metadata_bytes))

    def hold(self, layer: int, tokens: float):
        """Take note of the tokens that a layer holds at a checkpoint, summed over its heads, a mean over the rows."""
        self.held_tokens += tokens - self.layer_tokens[layer]
        self.layer_tokens[layer] = tokens
        self.checkpoint_peak = max(self.checkpoint_peak, self.held_tokens)

    def report(
        self,
        total: int,
        cacheable: int,
        itemsize: int,
        key_itemsize: int = ORIGINAL_KEY_BYTES,
        full_note: str = CacheReport.full_note,
    ) -> CacheReport:
        """
        The report of the steps so far.

        Args:
            total, cacheable (`int`):
                Tokens of the schedule, and those that a later step reads.
            itemsize (`int`):
                Bytes of a stored element.
            key_itemsize (`int`, *optional*, defaults to 4):
                Bytes of an element of a key in the original implementation.
            full_note (`str`, *optional*):
                What these bytes count, in words.
        """
        heads = self.num_layers * self.num_heads
        boundaries = self.boundaries[:-1] if self.boundaries and self.boundaries[-1][0] == 0 else self.boundaries
        tokens = [boundary[0] / heads for boundary in boundaries]
        _, logical, allocated, metadata_bytes = (max(column) for column in zip((0.0, 0, 0, 0), *boundaries))
        channels = self.rows * heads * self.head_dim // self.images
        return CacheReport(
            tokens_by_step=tokens,
            peak_tokens=max(tokens, default=0.0),
            mean_tokens=sum(tokens) / len(tokens) if tokens else 0.0,
            checkpoint_peak_tokens=self.checkpoint_peak / heads,
            bytes_by_step=[boundary[2] // self.images for boundary in boundaries],
            attended_by_step=[count / heads for count in self.attended],
            attention_flops=self.flops,
            bytes_logical_peak=logical // self.images,
            bytes_allocated_peak=allocated // self.images,
            bytes_full=total * channels * (key_itemsize + itemsize),
            bytes_full_cacheable=cacheable * channels * 2 * itemsize,
            metadata_bytes=metadata_bytes // self.images,
            full_note=full_note,
        )


class CudaPeak:
    """
    Rise of the allocated GPU memory since this object was made.

    It reads the process' peak without resetting it, so that a caller's own measurement is left alone; a rise below an
    earlier peak of the process is therefore not known.

    Args:
        device (`torch.device`):
            Any device; only CUDA devices are measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.start = torch.cuda.memory_allocated(device)
            self.earlier_peak = torch.cuda.max_memory_allocated(device)

    def delta(self) -> int | None:
        """Bytes, or `None` where it is not known."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        return peak - self.start if peak > self.earlier_peak else None
