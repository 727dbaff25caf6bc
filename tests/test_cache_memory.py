"""What lives while a compressed cache works: in the memory layout and with the head groups of a released model."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hack_pipelines.cache import FullCache, HeadGroupCache
from hack_pipelines.methods import HACK, Geometry
from hack_pipelines.schedule import Schedule

from .components import FixedTypes


SCHEDULE = Schedule.from_sides((1, 2, 3, 4, 5, 6))
ROWS, HEADS, DIM = 2, 4, 8


def step_parts(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a layer hands them over: views of one projection, a token after the other."""
    generator = torch.Generator().manual_seed(step)
    projected = torch.randn(ROWS, SCHEDULE.lengths[step], 3, HEADS, DIM, generator=generator)
    return projected.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def make_cache(types: list[bool], budget: int) -> HeadGroupCache:
    method = HACK()
    plan = method.plan(Geometry(SCHEDULE, 1, HEADS, DIM), budget, FixedTypes(torch.tensor([types])))
    return HeadGroupCache(plan, method)


class AliveAtAttention(TorchDispatchMode):
    """Notes how many elements live, in tensors that look like keys or values, while attention runs."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            alive = [storage for reference in self.storages.values() if (storage := reference()) is not None]
            self.elements.append(sum(storage.nbytes() for storage in alive) // 4)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[-1] == DIM:
                storage = tensor.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        return result


def test_attention_runs_without_what_it_does_not_read():
    cache = make_cache([True, False, True, False], 30)
    watch = AliveAtAttention()
    for step in range(len(SCHEDULE)):
        parts = step_parts(step)
        watch.elements.clear()
        with watch:
            cache.attend(0, *parts)
    contextual, structural = cache.plan.layers[0].attend[5]
    held = cache.plan.layers[0].store[4][1]
    output, query = HEADS * 36, 2 * 36
    tokens = [output + query + 2 * 2 * contextual + 2 * 2 * held, output + query + 2 * 2 * structural]
    assert watch.elements == [ROWS * DIM * count for count in tokens]


def test_the_full_cache_joins_one_after_the_other():
    cache = FullCache(SCHEDULE, 1)
    for step in range(4):
        cache.attend(0, *step_parts(step))
    old = weakref.ref(cache.keys[0].untyped_storage())
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cat.default:
                seen.append(old() is not None)
            return func(*args, **(kwargs or {}))

    with Watch():
        cache.attend(0, *step_parts(4))
    assert seen == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("types", [[True] * 4, [False] * 4, [True, False, False, True]])
def test_the_memory_layout_of_a_layer_changes_nothing(types, dtype):
    own, contiguous = make_cache(types, 30), make_cache(types, 30)
    for step in range(len(SCHEDULE)):
        parts = step_parts(step, dtype)
        assert torch.equal(own.attend(0, *parts), contiguous.attend(0, *(part.contiguous() for part in parts)))
