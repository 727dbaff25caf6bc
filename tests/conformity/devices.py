"""Several devices on a machine that has one: tensors without data that say where they are, and refuse to be mixed."""

from collections.abc import Mapping

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


FIRST, SECOND, THIRD = "cpu:1", "cpu:2", "cpu:3"


def no_data() -> FakeTensorMode:
    """Tensors that are made in this context have a shape, a dtype and a device, and an operation on two devices raises."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def place(model: nn.Module, device_map: Mapping[str, str], hooked: bool = True):
    """
    Put modules onto devices, with the hooks of accelerate's `dispatch_model`, which itself cannot handle such tensors, or
    without any, as `.to` does.

    The name "" is the model itself, which holds what no other name covers.
    """
    for name in sorted(device_map, key=len):
        module, device = model.get_submodule(name), device_map[name]
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[key] = nn.Parameter(torch.empty_like(parameter, device=device))
            for key, buffer in owner._buffers.items():
                owner._buffers[key] = torch.empty_like(buffer, device=device)
        # As accelerate does it: methods other than `forward` are reached through the modules inside.
        for key, inner in module.named_modules() if hooked else ():
            add_hook_to_module(inner, AlignDevicesHook(execution_device=device, io_same_device=not name and not key))


def units(model: nn.Module) -> list[str]:
    """Names of what a device map may put anywhere, in order: modules whose class must not be split, or without parts."""

    def below(module: nn.Module, prefix: str) -> list[str]:
        names = []
        for name, child in module.named_children():
            whole = type(child).__name__ in model._no_split_modules or not list(child.children())
            names += [prefix + name] if whole else below(child, f"{prefix}{name}.")
        return names

    return below(model, "")


def spread(model: nn.Module, count: int) -> dict[str, str]:
    """So many units on one device and the rest on another, as `device_map="auto"` fills cards in turn."""
    return {"": FIRST, **{name: FIRST if index < count else SECOND for index, name in enumerate(units(model))}}
