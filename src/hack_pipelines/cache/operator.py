"""Attention to what lives in Python objects, as one operator that `torch.compile` takes whole."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from diffusers.models.attention_dispatch import AttentionBackendName


class Attended(ABC):
    """
    What layers attend to and a traced graph cannot hold, such as a cache. The blocks of a model are given its `handle`.
    """

    wants_projection: bool = False
    """Whether [`~Attended.attend`] reads the bare projections of the queries."""

    def __init__(self):
        self.handle = Handle(self)

    def __setstate__(self, state: dict):
        # A copy is another object.
        self.__dict__.update(state, handle=Handle(self))

    @abstractmethod
    def attend(self, layer_idx: int, query: torch.Tensor, *tensors: Any, **options: Any) -> torch.Tensor:
        """
        Attention of a layer's queries `[rows, heads, tokens, head_dim]`, the same shape out; tensors and options are those
        of [`~Handle.attend`].
        """


class Handle:
    """
    Stands for an object in the calls of blocks, so that code compiled for one object serves all, whatever their class.

    The object and the layer are numbers in tensors: a number in Python would be compiled into the code. Handles do not
    keep their objects alive.

    Args:
        attended ([`Attended`]):
            The object, which attends when [`~Handle.attend`] is called.
    """

    def __init__(self, attended: Attended):
        number = next(_numbers)
        _attended[number] = attended
        self.number = torch.tensor(number, device="cpu")
        self.wants_projection = attended.wants_projection

    def attend(
        self,
        layer: torch.Tensor,
        query: torch.Tensor,
        *tensors: torch.Tensor | None,
        scale: float = 1.0,
        projection: torch.Tensor | None = None,
        backend: AttentionBackendName | None = None,
    ) -> torch.Tensor:
        """
        The object's `attend`, which runs as it is also inside compiled code.

        Args:
            layer (`torch.Tensor`):
                Index of the layer, an int64 scalar on the CPU.
            query (`torch.Tensor`):
                `[rows, heads, tokens, head_dim]`.
            tensors (`torch.Tensor`, *optional*):
                What else the object takes, such as keys and values.
            scale (`float`, *optional*, defaults to 1.0):
                Factor of the logits.
            projection (`torch.Tensor`, *optional*):
                Projections of the queries before bias, normalisation and rotation, where `wants_projection` asks for them.
            backend (`AttentionBackendName`, *optional*):
                The diffusers attention backend; by default the one that is active in the process.

        Returns:
            `torch.Tensor`: `[rows, tokens, heads, head_dim]`, contiguous.
        """
        name = None if backend is None else backend.value
        if not torch.compiler.is_compiling():
            return _attend(self.number, layer, query, tensors, scale, projection, name)
        autocast = torch.is_autocast_enabled(query.device.type)
        return _operator(self.number, layer, query, tensors, scale, projection, name, autocast)


_numbers = count()
_attended: WeakValueDictionary[int, Attended] = WeakValueDictionary()


def _attend(
    number: torch.Tensor,
    layer: torch.Tensor,
    query: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    scale: float,
    projection: torch.Tensor | None,
    backend_name: str | None,
) -> torch.Tensor:
    backend = None if backend_name is None else AttentionBackendName(backend_name)
    attended = _attended[int(number)]
    output = attended.attend(int(layer), query, *tensors, scale=scale, projection=projection, backend=backend)
    # In the order in which layers read it, whatever that of the backend.
    return output.transpose(1, 2).contiguous()


# A CUDA graph would be replayed without what the object does in Python. PyTorch before this tag records none here, because
# two of the operator's tensors are on the CPU.
_tags: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("hack_pipelines::attend", mutates_args=(), **_tags)
def _operator(
    number: torch.Tensor,
    layer: torch.Tensor,
    query: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    scale: float,
    projection: torch.Tensor | None,
    backend_name: str | None,
    autocast: bool,
) -> torch.Tensor:
    # Compiled code runs without autocast, because its own operators have been cast when it was traced.
    with torch.autocast(query.device.type, dtype=query.dtype, enabled=autocast):
        return _attend(number, layer, query, tensors, scale, projection, backend_name)


@_operator.register_fake
def _(number, layer, query, tensors, scale, projection, backend_name, autocast):
    rows, heads, tokens, head_dim = query.shape
    return query.new_empty(rows, tokens, heads, head_dim)
