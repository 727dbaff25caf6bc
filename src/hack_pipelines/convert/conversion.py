"""One model on its way from original tensors to this package's: what is expected, where it goes, and the streams."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards

from .original import shown


WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# Any class that is a `ModelMixin` and a `ConfigMixin` of diffusers, whose own types say nothing.
Model = TypeVar("Model", bound=Any)


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing but the name changes."""
    return tensor


@dataclass(frozen=True)
class Origin:
    """
    Where a parameter comes from.

    Args:
        sources (`dict[str, tuple[int, ...]]`):
            Original keys with their shapes.
        build (`Callable`, *optional*):
            Makes the parameter of the original tensors, given in the order of `sources`.
    """

    sources: dict[str, tuple[int, ...]]
    build: Callable[..., torch.Tensor] = as_it_is


@dataclass
class Conversion(Generic[Model]):
    """
    An original state dict, and the model that it is to become.

    Args:
        where (`str`):
            File or folder of the state dict, for messages.
        state_dict (`dict[str, torch.Tensor]`):
            Original tensors by original key; emptied as they are used.
        model (`ModelMixin`):
            The model, with its parameters on the meta device.
        origins (`dict[str, Origin]`):
            One for each entry of the model's state dict.
        buffers (`dict[str, tuple[int, ...]]`, *optional*):
            Original keys with their shapes that must be there but follow from the configuration.
        ignored (`tuple[str, ...]`, *optional*):
            Original keys that may be there, in any shape.
    """

    where: str
    state_dict: dict[str, torch.Tensor]
    model: Model
    origins: dict[str, Origin]
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every key that the original file must hold, with its shape."""
        expected = dict(self.buffers)
        for origin in self.origins.values():
            expected.update(origin.sources)
        return expected

    def check(self):
        """
        Compare keys, shapes and dtypes of the file with what the model needs.

        Raises:
            `ValueError`: if one is missing, unexpected or different; the message names it.
        """
        expected = self.expected
        missing = [key for key in expected if key not in self.state_dict]
        unexpected = [key for key in self.state_dict if key not in expected and key not in self.ignored]
        problems = []
        if missing:
            problems.append(f"it lacks {shown(missing)}")
        if unexpected:
            problems.append(f"it holds {shown(unexpected)}, which this model does not have")
        if problems:
            raise ValueError(f"{self.where} is no complete {type(self.model).__name__}: {' and '.join(problems)}.")
        for key, shape in expected.items():
            tensor = self.state_dict[key]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{self.where}: {key} has shape {tuple(tensor.shape)} but must have {shape}.")
            if not tensor.is_floating_point() and key not in self.buffers:
                raise ValueError(f"{self.where}: {key} has dtype {tensor.dtype} but must be of a floating dtype.")

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of a parameter: `dtype`, or float32 where the model needs it, by the rule of diffusers."""
        kept = self.model._keep_in_fp32_modules or []
        return torch.float32 if any(part in kept for part in name.split(".")) else dtype

    def tensors(self, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Parameters, one after the other. An original tensor is let go after its last use, so that nothing is held twice.
        """
        uses = Counter(key for origin in self.origins.values() for key in origin.sources)
        for name in names:
            origin = self.origins[name]
            tensor = origin.build(*(self.state_dict[key] for key in origin.sources))
            for key in origin.sources:
                uses[key] -= 1
                if not uses[key]:
                    del self.state_dict[key]
            yield name, tensor.to(self.dtype_of(name, dtype)).contiguous()

    def load(self, dtype: torch.dtype) -> Model:
        """The model with its weights, in eval mode. Tensors that need no change stay mapped from the file."""
        self.model.load_state_dict(dict(self.tensors(self.origins, dtype)), strict=True, assign=True)
        return self.model.eval()

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights once converted."""
        return sum(tensor.nbytes for tensor in self._outlines(dtype).values())

    def save(self, folder: Path, dtype: torch.dtype, max_shard_size: int | str, on_bytes: Callable[[int], Any]):
        """
        Write the model as `save_pretrained` would, one tensor at a time instead of one shard.

        Args:
            folder (`Path`):
                Where `config.json` and the weights go.
            dtype (`torch.dtype`):
                Of the weights.
            max_shard_size (`int` or `str`):
                Largest size of a weight file, in bytes or such as `"1GB"`.
            on_bytes (`Callable[[int], Any]`):
                Told how many bytes were written, after every tensor.
        """
        self.model.save_config(folder)
        outlines = self._outlines(dtype)
        shards = split_torch_state_dict_into_shards(
            outlines, filename_pattern=WEIGHTS_PATTERN, max_shard_size=max_shard_size
        )
        # Tensors with a source in common come in any order and shard, so one stream serves them all.
        names = [name for filename in shards.filename_to_tensors for name in shards.filename_to_tensors[filename]]
        stream = self.tensors(names, dtype)
        for filename, members in shards.filename_to_tensors.items():
            write_safetensors(folder / filename, {name: outlines[name] for name in members}, stream, on_bytes)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / f"{WEIGHTS_NAME}.index.json").write_text(text, encoding="utf-8")

    def _outlines(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The converted state dict without its data."""
        return {
            name: torch.empty(tensor.shape, dtype=self.dtype_of(name, dtype), device="meta")
            for name, tensor in self.model.state_dict().items()
        }


def empty_model(model_class: type[Model], where: str, **config: Any) -> Model:
    """A model with its parameters on the meta device; what is computed from the configuration is real."""
    try:
        with init_empty_weights(include_buffers=False):
            return model_class(**config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} gives no {model_class.__name__} with {config}: {error}") from error


def write_safetensors(
    path: Path,
    outlines: dict[str, torch.Tensor],
    stream: Iterator[tuple[str, torch.Tensor]],
    on_bytes: Callable[[int], Any],
):
    """
    Write a safetensors file of which only one tensor need be in memory; the library's own writer wants them all.

    Args:
        path (`Path`):
            The file.
        outlines (`dict[str, torch.Tensor]`):
            Shapes and dtypes of the tensors, on the meta device, in the order in which they come.
        stream (`Iterator[tuple[str, torch.Tensor]]`):
            The tensors; as many as `outlines` are taken.
        on_bytes (`Callable[[int], Any]`):
            Told how many bytes were written, after every tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, outline in outlines.items():
        begin, end = end, end + outline.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[outline.dtype],
            "shape": list(outline.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data starts at a multiple of eight bytes, so that a mapped tensor is aligned.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _ in outlines:
            _, tensor = next(stream)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)
