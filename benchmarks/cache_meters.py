"""What `cache_shapes.py` measures with: stopwatches around a cache and its attention calls, and the bytes it allocates."""

import time
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hack_pipelines.cache import Cache
from hack_pipelines.cache.operator import Attended


@dataclass
class Stopwatch:
    """Seconds between `start` and `stop`, summed; on CUDA from events, so that nothing waits in between."""

    device: torch.device
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def start(self):
        if self.device.type == "cuda":
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.seconds -= time.perf_counter()

    def stop(self):
        if self.device.type == "cuda":
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter()

    def total(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        return self.seconds


class AttentionWatch(TorchFunctionMode):
    """Measures how long the attention calls take that are made while it is on."""

    def __init__(self, watch: Stopwatch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.watch.start()
        result = func(*args, **(kwargs or {}))
        self.watch.stop()
        return result


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of all storages that operators make while it is on and that live at the same time; they count until
    they are freed, also while it is off. What one operator allocates and frees inside itself stays unseen.
    """

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.live = self.before = 0
        self.peak = 0
        """The most that lived at once."""
        self.temporary = 0
        """The most that was added between switching on and off, for whatever time."""

    def __enter__(self):
        self.before = self.live
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and id(tensor.untyped_storage()) not in given:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.temporary = max(self.temporary, self.live - self.before)
        return result

    def _count(self, storage: torch.UntypedStorage):
        key, size = id(storage), storage.nbytes()

        def forget(_):
            del self.storages[key]
            self.live -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.live += size


@dataclass
class WatchedCache(Attended):
    """Hands everything to a cache, times it, and keeps a mode switched on inside it."""

    cache: Cache
    watch: Stopwatch
    mode: AbstractContextManager

    def __post_init__(self):
        self.wants_projection = self.cache.wants_projection
        super().__init__()

    def attend(self, *arguments, **others) -> torch.Tensor:
        self.watch.start()
        with self.mode:
            output = self.cache.attend(*arguments, **others)
        self.watch.stop()
        return output
