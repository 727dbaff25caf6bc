"""What the command line has to know of a family of models."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .options import NULL_CLASS, parse_class, seeded


if TYPE_CHECKING:
    import torch

    from ..cache.report import CacheReport
    from ..integrations.next_token import NextTokenPipeline
    from ..methods import Method
    from ..pipelines import HackVARPipeline


class Family(ABC):
    """
    What the command line needs to know of a family of models.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
    """

    kind: ClassVar[str]
    """The family in a message."""
    plural: ClassVar[str]
    """What its pictures are made of."""
    input_name: ClassVar[str]
    """What an input is called in a picture's record."""
    example: ClassVar[str]
    """What a command that draws needs at least, as it is typed."""
    options: ClassVar[dict[str, str]]
    """Options of this family alone, by their names in the parsed arguments."""
    arguments: ClassVar[tuple[str, ...]]
    """Those of them that a call of the pipeline takes."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @abstractmethod
    def parse(self, texts: Sequence[str]) -> list[int | str]:
        """Inputs as the pipeline takes them, of inputs as they are typed."""

    @abstractmethod
    def choose(self, seeds: Sequence[int]) -> list[int | str]:
        """An input for each seed where none was given."""

    @abstractmethod
    def name(self, entry: int | str) -> str:
        """What to call an input in captions and names of files."""

    def call_arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        """
        Keyword arguments of the pipeline's call; what was not typed is left to the model.

        Raises:
            `ValueError`: if an option belongs to another family.
        """
        for family in FAMILIES.values():
            for name, option in family.options.items():
                if name not in self.options and getattr(args, name) is not None:
                    raise ValueError(
                        f"`{option}` is for {family.kind} models, but {args.model} is a {self.kind} model: leave it out."
                    )
        given = {name: getattr(args, name) for name in (*COMMON_ARGUMENTS, *self.arguments)}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def folder(self) -> Path:
        """Where the model is."""
        return Path(self.pipe.config["_name_or_path"])

    def reports(self, output: Any) -> "dict[str, CacheReport]":
        """What each cache of a call held."""
        return {"cache": output.cache_report}

    def method(self, arguments: dict[str, Any]) -> "Method":
        """The method of a call with some keyword arguments."""
        from ..methods import get_method

        return get_method(arguments["method"])

    def head_profile(self, arguments: dict[str, Any]) -> str | None:
        """Whose head profile a call with some keyword arguments plans with, where none was typed; `None` if it needs none."""
        budgeted = arguments.get("kv_budget") is not None or arguments.get("attention_budget") is not None
        if not budgeted or not self.method(arguments).needs_profile:
            return None
        return "made on the spot" if self.pipe.head_profile is None else "the model's own"

    def resolved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a call with some keyword arguments does, with the model's own values for all that was not given."""
        from ..methods.spec import method_text
        from ..schedule import Schedule

        sampling = {name: arguments[name] for name in SAMPLING_ARGUMENTS if name in arguments}
        sizes = arguments.get("scale_schedule", self.pipe.schedule.sizes)
        if "scale_schedule" in arguments:
            sampling["schedule"] = Schedule(sizes)
        return {
            **{name: arguments.get(name) for name in ("kv_budget", "attention_budget", "kv_dtype")},
            "method": method_text(self.method(arguments)),
            "sampling": asdict(self.pipe.prepare_settings(**sampling)),
            "negative_prompt": arguments.get("negative_prompt"),
            "scale_schedule": sizes,
        }


class ClassFamily(Family):
    """Pictures of classes."""

    kind = "class-conditional"
    plural = "classes"
    input_name = "class_label"
    example = "0"
    options = {"classes": "--class", "more_smooth": "--more-smooth"}
    arguments: ClassVar[tuple[str, ...]] = ("more_smooth",)

    @property
    def id2label(self) -> dict[str, str]:
        """Names of the classes by id."""
        return self.pipe.config["id2label"]

    @property
    def num_classes(self) -> int:
        """Classes, without the one for none."""
        return self.pipe.transformer.config["num_classes"]

    def parse(self, texts: Sequence[str]) -> list[int | str]:
        return self._ids([parse_class(text) for text in texts], None)

    def choose(self, seeds: Sequence[int]) -> list[int | str]:
        return self._ids(None, seeded(seeds))

    def name(self, entry: int | str) -> str:
        """The first of a class's names, or its number where the model has no names."""
        if entry == NULL_CLASS:
            return "no class"
        names = self.id2label.get(str(entry))
        return names.split(",")[0].strip() if names else f"class {entry}"

    def _ids(self, labels: list[int | str] | None, generators: "list[torch.Generator] | None") -> list[int | str]:
        ids = self.pipe.encode_class_labels(labels, generator=generators).tolist()
        return [NULL_CLASS if entry == self.num_classes else entry for entry in ids]


class TextFamily(Family):
    """Pictures of prompts."""

    kind = "text-to-image"
    plural = "prompts"
    input_name = "prompt"
    example = '"a lighthouse in a storm"'
    options = {"negative_prompt": "--negative-prompt", "height": "--height", "width": "--width"}
    arguments: ClassVar[tuple[str, ...]] = ("negative_prompt", "height", "width")

    def parse(self, texts: Sequence[str]) -> list[int | str]:
        return list(texts)

    def choose(self, seeds: Sequence[int]) -> list[int | str]:
        raise ValueError(
            f"A text-to-image model needs a prompt: `hack-pipelines generate {self.example}`, or one a line in "
            "`--prompts-file FILE`."
        )

    def call_arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        """As above; the size is settled here, so that one that the model does not draw is told of once, not every batch."""
        arguments = super().call_arguments(args)
        size: dict[str, Any] = {name: arguments.pop(name) for name in ("height", "width") if name in arguments}
        return {**arguments, **self.settled(size)} if size else arguments

    def settled(self, size: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline takes instead of a size in pixels."""
        return {"scale_schedule": self.pipe.resolve_schedule(**size).sizes}

    def name(self, entry: int | str) -> str:
        """The prompt in one line."""
        return " ".join(str(entry).split()) or "no text"


class NextTokenFamily(Family):
    """What next-token models of transformers have in common."""

    @property
    def folder(self) -> Path:
        return Path(self.pipe.model.config.name_or_path)

    def reports(self, output: Any) -> "dict[str, CacheReport]":
        """As above, and of the second cache where the rows without the prompt have one."""
        other = output.unconditional_cache_report
        return super().reports(output) | ({} if other is None else {"unconditional_cache": other})

    def method(self, arguments: dict[str, Any]) -> "Method":
        from ..methods import RASTER_METHODS, get_method

        return get_method(arguments["method"], RASTER_METHODS)

    def resolved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        from ..methods.spec import method_text

        sampling = {name: arguments[name] for name in SAMPLING_ARGUMENTS if name in arguments}
        return {
            "kv_budget": arguments.get("kv_budget"),
            "method": method_text(self.method(arguments)),
            "sampling": asdict(self.pipe.prepare_sampling(**sampling)),
            "negative_prompt": arguments.get("negative_prompt"),
            "grid": arguments.get("grid") or self.pipe.grid,
        }


class JanusFamily(NextTokenFamily, TextFamily):
    """Pictures of prompts with Janus."""

    kind = "Janus"
    options = {}
    arguments = ()


class Emu3Family(NextTokenFamily, TextFamily):
    """Pictures of prompts with Emu3."""

    kind = "Emu3"

    def settled(self, size: dict[str, Any]) -> dict[str, Any]:
        return {"grid": self.pipe.resolve_grid(**size)}


class CodeClassFamily(NextTokenFamily, ClassFamily):
    """Pictures of classes with a Llama model of codes."""

    kind = "class-conditional next-token"
    options = {"classes": "--class"}
    arguments = ()

    @property
    def id2label(self) -> dict[str, str]:
        return self.pipe.id2label

    @property
    def num_classes(self) -> int:
        return self.pipe.num_classes


SAMPLING_ARGUMENTS = ("guidance_scale", "temperature", "top_k", "top_p", "more_smooth")
COMMON_ARGUMENTS = (
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "kv_budget",
    "attention_budget",
    "kv_dtype",
    "method",
)
FAMILIES: dict[str, type[Family]] = {
    "var": ClassFamily,
    "infinity": TextFamily,
    "janus": JanusFamily,
    "emu3": Emu3Family,
    "llama": CodeClassFamily,
}


def family_of(pipe: "HackVARPipeline | NextTokenPipeline") -> Family:
    """A pipeline as the command line treats it."""
    return FAMILIES[pipe.family](pipe)
