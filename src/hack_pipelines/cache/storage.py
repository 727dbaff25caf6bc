"""How keys and values are kept: as attention reads them, or in fewer bits."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch


Planes = tuple[torch.Tensor, ...]
"""A tensor `[rows, heads, tokens, channels]` as it is held: the same, or integers and their factors a token."""

INT8_MAX = 127


class Storage(ABC):
    """The form in which keys and values are held. Every plane is `[rows, heads, tokens, ...]`, so that tokens can be chosen."""

    name: ClassVar[str | None]
    """What `kv_dtype` calls it."""
    metadata_bytes: ClassVar[int]
    """Bytes of a token of a head that are neither key nor value."""
    exact: ClassVar[bool]
    """Whether what is decoded is what was encoded, to the last bit."""

    @abstractmethod
    def itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of an element, where attention reads `dtype`."""

    @abstractmethod
    def encode(self, tensor: torch.Tensor) -> Planes:
        """The planes of a tensor, the first of which has its shape."""

    @abstractmethod
    def decode(self, planes: Planes, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that planes stand for."""


class PlainStorage(Storage):
    """Keys and values as attention reads them."""

    name = None
    metadata_bytes = 0
    exact = True

    def itemsize(self, dtype: torch.dtype) -> int:
        return dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> Planes:
        return (tensor,)

    def decode(self, planes: Planes, dtype: torch.dtype) -> torch.Tensor:
        return planes[0]


class Int8Storage(Storage):
    """
    Whole numbers from -127 to 127 and a float16 factor a token, the largest magnitude of its channels over 127.

    A factor for each token survives every choice of tokens. It also serves merged keys, whose norm is not 1.
    """

    name = "int8"
    metadata_bytes = 2 * torch.float16.itemsize
    exact = False

    def itemsize(self, dtype: torch.dtype) -> int:
        return torch.int8.itemsize

    def encode(self, tensor: torch.Tensor) -> Planes:
        values = tensor.float()
        # The factor is rounded before it divides, so that what is read is what was meant. It must not become zero, nor
        # leave the range of float16.
        limits = torch.finfo(torch.float16)
        scale = values.abs().amax(-1, keepdim=True) / INT8_MAX
        scale = scale.clamp(limits.smallest_normal, limits.max).to(torch.float16)
        data = (values / scale.float()).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return data, scale

    def decode(self, planes: Planes, dtype: torch.dtype) -> torch.Tensor:
        data, scale = planes
        return (data * scale.float()).to(dtype)


STORAGES: dict[str | None, Storage] = {storage.name: storage for storage in (PlainStorage(), Int8Storage())}


def get_storage(kv_dtype: str | None) -> Storage:
    """
    The form that `kv_dtype` names.

    Raises:
        `ValueError`: if there is none of that name.
    """
    if kv_dtype not in STORAGES:
        raise ValueError(
            f"`kv_dtype` must be one of {', '.join(map(repr, STORAGES))} but is {kv_dtype!r}; None is the dtype that "
            "attention reads."
        )
    return STORAGES[kv_dtype]
