"""The cache that attention reads: the common part, and the one that keeps everything."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..schedule import Schedule
from .attention import AttentionCall, attention
from .operator import Attended
from .report import CacheMeter, CacheReport


class Cache(Attended):
    """
    Keys and values of one call. The attention layer hands over queries, keys and values of a scale and gets the output
    back, so a cache may hold or attend to fewer tokens than it was given. It dies with the call.

    The scale that a layer is at follows from how many tokens it has seen. The keys and values of the last scale are never
    stored, because no later step reads them, and a layer's history is freed as soon as the last scale has read it.

    Args:
        schedule (`Schedule`):
            The scales.
        num_layers (`int`):
            Self-attention layers of the model.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance.
    """

    def __init__(self, schedule: Schedule, num_layers: int, guided: bool = False):
        self.schedule = schedule
        self.num_layers = num_layers
        self.guided = guided
        super().__init__()
        self.reset()

    def __len__(self) -> int:
        return self.num_layers

    def reset(self):
        """Forget everything, as if no token had been seen."""
        self.seen_tokens = [0] * self.num_layers
        self.itemsize = 0
        self._meter: CacheMeter | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer has seen, whether they are still stored or not."""
        return self.seen_tokens[layer_idx]

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float = 1.0,
        projection: torch.Tensor | None = None,
        backend: AttentionBackendName | None = None,
    ) -> torch.Tensor:
        """
        Attend from the tokens of a scale to them and to the history, and store what the next scale will need.

        Args:
            layer_idx (`int`):
                Index of the layer; every layer sees every scale once, in order.
            query, key, value (`torch.Tensor`):
                `[rows, heads, n_k, head_dim]`, all of the dtype that attention reads.
            scale (`float`, *optional*, defaults to 1.0):
                Factor of the logits.
            projection (`torch.Tensor`, *optional*):
                Projections of the queries before bias, normalisation and rotation, `[rows, heads, n_k, head_dim]`, for
                caches with `wants_projection`.
            backend (`AttentionBackendName`, *optional*):
                The diffusers attention backend; by default the one that is active in the process.

        Returns:
            `torch.Tensor`: `[rows, heads, n_k, head_dim]`.

        Raises:
            `ValueError`: if the number of tokens is not that of the scale that the layer is at.
        """
        step = self._step_of(layer_idx, key.shape[2])
        call = AttentionCall(scale, backend, projection)
        output, attended = self._attend(layer_idx, step, query, key, value, call)
        self.seen_tokens[layer_idx] += key.shape[2]
        self.itemsize = value.element_size()
        if self._meter is None:
            rows, heads, _, head_dim = key.shape
            self._meter = CacheMeter(self.num_layers, heads, head_dim, rows, rows // 2 if self.guided else rows)
        self._meter.commit(
            layer_idx, step, self._tensors(layer_idx), self._metadata(layer_idx), attended, key.shape[2]
        )
        return output

    def report(self) -> CacheReport:
        """What was held so far, measured from the tensors."""
        if self._meter is None:
            raise ValueError("This cache has seen no token yet: there is nothing to report.")
        return self._meter.report(self.schedule.total, self.schedule.cacheable, self.itemsize)

    def _step_of(self, layer_idx: int, tokens: int) -> int:
        seen = self.seen_tokens[layer_idx]
        if seen not in self.schedule.prefixes:
            raise ValueError(f"Layer {layer_idx} has seen all {seen} tokens of its schedule. `reset` the cache first.")
        step = self.schedule.prefixes.index(seen)
        if tokens != self.schedule.lengths[step]:
            raise ValueError(
                f"Layer {layer_idx} got {tokens} tokens at step {step}, where its schedule has "
                f"{self.schedule.lengths[step]}."
            )
        return step

    @abstractmethod
    def _attend(
        self,
        layer_idx: int,
        step: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, int]:
        """Output, and how many keys a query saw, summed over the heads."""

    @abstractmethod
    def _tensors(self, layer_idx: int) -> Iterator[torch.Tensor]:
        """Every key and value tensor that a layer holds."""

    def _metadata(self, layer_idx: int) -> Iterator[torch.Tensor]:
        """Every tensor that a layer holds beside keys and values, such as ids, scores and factors of a quantiser."""
        return iter(())


class FullCache(Cache):
    """Keeps every token that a later step reads: the original's results, with its lossless savings made."""

    def reset(self):
        super().reset()
        self.keys: list[torch.Tensor | None] = [None] * self.num_layers
        self.values: list[torch.Tensor | None] = [None] * self.num_layers

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, last: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append a scale to a layer, and return all there is.

        Args:
            key, value (`torch.Tensor`):
                `[rows, heads, n_k, head_dim]`.
            layer_idx (`int`):
                Index of the layer.
            last (`bool`, *optional*, defaults to `False`):
                Whether this is the last scale, after which nothing stays stored.
        """
        # One after the other, so that the old keys are gone before the values are joined.
        key = joined(self.keys[layer_idx], key)
        self.keys[layer_idx] = None if last else key
        value = joined(self.values[layer_idx], value)
        self.values[layer_idx] = None if last else value
        return key, value

    def _attend(self, layer_idx, step, query, key, value, call):
        key, value = self.update(key, value, layer_idx, last=step == len(self.schedule) - 1)
        return attention(query, key, value, call.scale, backend=call.backend), key.shape[1] * key.shape[2]

    def _tensors(self, layer_idx):
        return (tensor for tensor in (self.keys[layer_idx], self.values[layer_idx]) if tensor is not None)


def joined(stored: torch.Tensor | None, current: torch.Tensor) -> torch.Tensor:
    """History and current tokens in a tensor of its own, so that no larger one stays alive behind it."""
    return torch.cat((current,) if stored is None else (stored, current), dim=2)
