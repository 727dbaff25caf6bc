"""The loop over scales, for every backbone."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

from ..cache import Cache, FullCache, make_cache
from ..cache.budget import TokenBytes, make_plan
from ..cache.report import CudaPeak
from ..cache.storage import get_storage
from ..convert import load_original
from ..hub.checks import check_weights, read_json
from ..hub.sources import locate
from ..methods import DEFAULT_METHOD, Full, Geometry, Method, get_method
from ..profiles.head_profile import HeadProfile
from ..schedule import Schedule
from .pipeline_output import HackVARPipelineOutput
from .sampling import draw_tokens, filter_logits, guide
from .settings import SamplingSettings, is_whole


logger = logging.get_logger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROFILE_FOLDER = "head_profile"


class HackVARPipeline(DiffusionPipeline):
    """
    Pipeline for next-scale image models with a compressed key/value cache.

    This base class owns the loop over scales, guidance, sampling, decoding and the cache; a subclass a backbone says how
    a condition is encoded. [`~HackVARPipeline.from_pretrained`] and [`~HackVARPipeline.from_original`] return the right
    subclass.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]
    # The quantizer works between any two steps of the transformer: moving it to and fro would cost more than it holds.
    _exclude_from_cpu_offload = ["vae"]
    _callback_tensor_inputs = ["latents", "tokens"]

    family: ClassVar[str]
    """What [`~HackVARPipeline.from_original`] calls the models that the subclass is for."""

    transformer: Any
    vae: Any
    head_profile: HeadProfile | None = None
    _fallback_profile: HeadProfile | None = None
    _interrupt = False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        variant: str | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        head_profile: str | Path | HeadProfile | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Load a pipeline, and the head profile that belongs to it.

        Args:
            name_or_path (`str` or `Path`):
                `"demo"` or `"demo-class"` for the small models inside the package, a folder or Hub repo in diffusers layout,
                or an original repo (`"FoundationVision/Infinity"`, `"FoundationVision/var"`), whose files are converted once
                and kept in the cache.
            variant (`str`, *optional*):
                Model of an original repo, `"2b"`, `"8b"`, `"8b-512"` or `"d16"` to `"d36"`; variant of the weight files
                otherwise.
            dtype (`torch.dtype` or `dict`, *optional*):
                Of the weights, float32 by default. Tensors that need float32 keep it, and a text encoder is float16 where
                this is half precision, as the original runs it; a `dict` by component decides otherwise.
            head_profile (`str`, `Path` or [`HeadProfile`], *optional*):
                Profile to attach instead of the one that the folder or repo carries.
            kwargs:
                Everything else that [`~diffusers.DiffusionPipeline.from_pretrained`] takes: `revision`, `token`,
                `cache_dir`, `local_files_only`, `device_map`, components.

        Returns:
            [`HackVARPipeline`]: of the subclass that the folder names.

        Raises:
            `ValueError`: if the folder is no pipeline of this package, or a weight is missing or has another shape.
        """
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        source = locate(str(name_or_path), variant, **hub_options)
        index = read_model_index(source.folder)
        subclass = cls._subclass("name", index["_class_name"], source.folder)
        components = [name for name in index if not name.startswith("_") and name not in kwargs]
        check_weights(source.folder, components, source.variant)
        # Said also where it is the default: transformers would take the dtype of its files.
        kwargs["dtype"] = subclass.component_dtypes(torch.float32 if dtype is None else dtype)
        if source.variant is not None:
            kwargs["variant"] = source.variant
        pipe: Any = super(HackVARPipeline, subclass).from_pretrained(
            str(source.folder), use_safetensors=True, **kwargs
        )
        if head_profile is None and (source.folder / PROFILE_FOLDER).is_dir():
            head_profile = source.folder / PROFILE_FOLDER
        if head_profile is not None:
            pipe.load_head_profile(head_profile)
        return pipe

    @classmethod
    def from_original(
        cls,
        transformer: str | Path,
        tokenizer: str | Path,
        config: dict[str, dict[str, Any]] | None = None,
        text_encoder: str | Path | None = None,
        head_profile: str | Path | HeadProfile | None = None,
        dtype: torch.dtype | None = None,
        scale_schedule: Sequence[Sequence[int]] | None = None,
    ) -> Self:
        """
        Load a pipeline from the files that the original authors published; the family is recognised from their keys.

        Args:
            transformer (`str` or `Path`):
                State dict of the transformer: `.pth`, `.safetensors`, or a folder of shards.
            tokenizer (`str` or `Path`):
                State dict of the image tokenizer, likewise.
            config (`dict`, *optional*):
                `{"transformer": {...}, "tokenizer": {...}}` in the original's field names. `None` recognises it from the
                shapes.
            text_encoder (`str` or `Path`, *optional*):
                For text-to-image families: Hub repo or folder of the T5 encoder that the model was trained with,
                `"google/flan-t5-xl"` for the released ones. `None` makes a pipeline that takes text features only.
            head_profile (`str`, `Path` or [`HeadProfile`], *optional*):
                Profile to attach.
            dtype (`torch.dtype`, *optional*):
                Of the weights, float32 by default. Tensors that need float32 keep it, and a text encoder is float16 where
                this is half precision.
            scale_schedule (`Sequence[Sequence[int]]`, *optional*):
                For text-to-image families: height and width of every token map that is drawn when a call names no size;
                by default those of a square image of a megapixel.

        Returns:
            [`HackVARPipeline`]: of the family's subclass.

        Raises:
            `ValueError`: if a file is not what it should be; the message names the key, shape or file.
        """
        original = load_original(transformer, tokenizer, config, dtype, text_encoder, scale_schedule)
        subclass = cls._subclass("family", original.family, transformer)
        pipe = subclass(
            transformer=original.transformer,
            vae=original.vae,
            **original.text_components,
            **original.pipeline_config,
        )
        if head_profile is not None:
            pipe.load_head_profile(head_profile)
        return pipe

    @classmethod
    def _subclass(cls, attribute: str, value: str, where: str | Path) -> Any:
        """The pipeline class of a name or family, which must be `cls` or below it."""
        from . import PIPELINES

        key = "__name__" if attribute == "name" else attribute
        for subclass in PIPELINES:
            if getattr(subclass, key) == value and issubclass(subclass, cls):
                return subclass
        raise ValueError(
            f"{where} holds a pipeline of {attribute} {value!r}, but {cls.__name__} loads "
            f"{', '.join(getattr(entry, key) for entry in PIPELINES if issubclass(entry, cls))}."
        )

    @classmethod
    def component_dtypes(cls, dtype: torch.dtype | dict[str, torch.dtype]) -> torch.dtype | dict[str, torch.dtype]:
        """Dtypes of the components where `dtype` is asked for."""
        return dtype

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any):  # type: ignore[override]
        """Save the pipeline, see [`~diffusers.DiffusionPipeline.save_pretrained`], and its head profile beside it."""
        super().save_pretrained(str(save_directory), **kwargs)
        if self.head_profile is not None:
            self.head_profile.save_pretrained(Path(save_directory) / PROFILE_FOLDER)

    def load_head_profile(self, head_profile: str | Path | HeadProfile, **kwargs: Any):
        """
        Attach a head profile, which compression methods plan with.

        Args:
            head_profile (`str`, `Path` or [`HeadProfile`]):
                Folder, Hub repo, or the profile itself.
            kwargs:
                What [`HeadProfile.from_pretrained`] takes besides: `revision`, `token`, `cache_dir`.

        Raises:
            `ValueError`: if the profile was made for another model; the message names the difference.
        """
        if not isinstance(head_profile, HeadProfile):
            head_profile = HeadProfile.from_pretrained(str(head_profile), **kwargs)
        head_profile.check_fits(self.geometry())
        self.head_profile = head_profile

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the scale that is being drawn."""
        return self._interrupt

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The scales that the model draws where the call does not say otherwise."""

    @property
    def fallback_schedule(self) -> Schedule | None:
        """The scales of a profile that is made on the spot; `None` is the model's own."""
        return None

    def geometry(self, schedule: Schedule | None = None) -> Geometry:
        """What compression may know of the model: its schedule, layers and heads."""
        config = self.transformer.config
        return Geometry(
            schedule=schedule or self.schedule,
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
        )

    def prepare_cache(
        self,
        kv_budget: float | int | str | None = None,
        attention_budget: float | int | str | None = None,
        method: str | Method = DEFAULT_METHOD,
        kv_dtype: str | None = None,
        guided: bool = True,
        schedule: Schedule | None = None,
    ) -> Cache:
        """
        Make the cache of one call, with its plan checked against the budget.

        Args:
            kv_budget (`float`, `int` or `str`, *optional*):
                What may stay stored between steps: a fraction of the full cache, tokens per head, or bytes per image
                such as `"64MB"`. `None` keeps everything.
            attention_budget (`float`, `int` or `str`, *optional*):
                What a step may attend to; only for methods that separate it from `kv_budget`.
            method (`str` or [`Method`], *optional*, defaults to `"hack++"`):
                How tokens are chosen.
            kv_dtype (`"int8"`, *optional*):
                Storage type of keys and values. `None` is the type that attention reads.
            guided (`bool`, *optional*, defaults to `True`):
                Whether there are unconditional rows.
            schedule (`Schedule`, *optional*):
                The scales; the model's own by default.

        Raises:
            `TypeError`: if a budget is neither a number nor a string.
            `ValueError`: if a budget cannot be met, with the smallest that can.
        """
        method, storage, geometry = get_method(method), get_storage(kv_dtype), self.geometry(schedule)
        if kv_budget is None and attention_budget is None:
            if kv_dtype is None:
                return FullCache(geometry.schedule, geometry.num_layers, guided)
            method = Full()
        token_bytes = TokenBytes(
            rows_per_image=2 if guided else 1,
            itemsize=storage.itemsize(self._attention_dtype()),
            metadata=storage.metadata_bytes + method.metadata_bytes,
        )
        profile = self._profile_for(method, geometry.schedule)
        plan = make_plan(method, geometry, profile, token_bytes, kv_budget, attention_budget)
        return make_cache(plan, method, guided, storage)

    def _attention_dtype(self) -> torch.dtype:
        """The dtype of keys and values as attention reads them."""
        device_type = self._execution_device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.transformer.dtype

    def _profile_for(self, method: Method, schedule: Schedule) -> HeadProfile | None:
        """The profile that a method plans with; one made from a fixed input where none was attached."""
        if not method.needs_profile:
            return None
        if self.head_profile is not None:
            self.head_profile.check_holds(method.profile_arrays, method.name)
            return self.head_profile.for_schedule(schedule)
        if self._fallback_profile is None:
            from ..calibration.calibrate import calibrate

            logger.warning(
                f"No head profile is attached, so one is made now from a fixed input ({method.name!r} needs it). "
                "Calibrate properly with `hack-pipelines calibrate` and attach it with `pipe.load_head_profile(...)`."
            )
            self._fallback_profile = calibrate(
                self, num_samples=1, seed=0, progress=False, schedule=self.fallback_schedule
            )
        return self._fallback_profile.for_schedule(schedule)

    @abstractmethod
    def predict(
        self,
        step: int,
        scale_input: torch.Tensor | None,
        condition: Any,
        cache: Cache,
        settings: SamplingSettings | None = None,
    ) -> torch.Tensor:
        """
        Logits of one scale.

        Args:
            step (`int`):
                Index of the scale, from 0.
            scale_input (`torch.Tensor`, *optional*):
                What the tokenizer made of the scales before, `[images, n_k, channels]`; `None` at the first.
            condition (`torch.Tensor` or [`InfinityCondition`]):
                What the subclass encoded, a row of the batch each.
            cache ([`Cache`]):
                Holds the scales before.
            settings ([`SamplingSettings`], *optional*):
                For families that guide inside the transformer.

        Returns:
            `torch.Tensor`: `[rows, n_k, channels]` in float32.
        """

    @abstractmethod
    def log_likelihood(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token of a scale under unfiltered logits, `[images, n_k]`, in nats."""

    @abstractmethod
    def encode_inputs(self, inputs: Sequence[int | str], guided: bool) -> Any:
        """
        The condition of some inputs, as in [`~HackVARPipeline.predict`].

        Args:
            inputs (`Sequence[int | str]`):
                Class or prompt of every image.
            guided (`bool`):
                Whether the condition needs unconditional rows, which come second.
        """

    @abstractmethod
    def calibration_inputs(self, num_samples: int) -> list[int | str]:
        """The inputs that the model is calibrated with, the same on every call."""

    def draw_scales(
        self,
        condition: Any,
        cache: Cache,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Draw all scales, coarse to fine.

        Args:
            condition (`torch.Tensor` or [`InfinityCondition`]):
                As in [`~HackVARPipeline.predict`]; conditional rows first when guided. Has a length and a `device`.
            cache ([`Cache`]):
                A fresh cache; its schedule says what is drawn.
            settings ([`SamplingSettings`]):
                How tokens are drawn.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one an image.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipe, step, size, callback_kwargs)` after each scale.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`):
                What `callback_kwargs` holds.

        Returns:
            `tuple[torch.Tensor, list[torch.Tensor]]`: latents `[images, latent_channels, height, width]` in float32, and
            the tokens of every scale.
        """
        schedule = cache.schedule
        images = len(condition) // 2 if settings.guided else len(condition)
        latents = torch.zeros(
            images,
            self.vae.config["latent_channels"],
            *self.vae.latent_size(schedule.sizes[-1]),
            device=condition.device,
            dtype=torch.float32,
        )
        scale_input, all_tokens = None, []
        with self.progress_bar(total=len(schedule)) as progress_bar:
            for step, size in enumerate(schedule.sizes):
                if self.interrupt:
                    break
                logits = self.guided_logits(
                    self.predict(step, scale_input, condition, cache, settings), step, settings
                )
                tokens, codes = self.draw(logits, step, schedule, settings, generator)
                latents, scale_input = self.vae.accumulate(latents, codes, step, schedule)
                all_tokens.append(tokens)
                if callback_on_step_end is not None:
                    available = {"latents": latents, "tokens": tokens}
                    given = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, step, size, given) or {}
                    if returned.get("latents", latents) is not latents:
                        latents = returned["latents"].to(latents)
                        scale_input = self.vae.next_input(latents, step, schedule)
                progress_bar.update()
        return latents, all_tokens

    def guided_logits(self, logits: torch.Tensor, step: int, settings: SamplingSettings) -> torch.Tensor:
        """Logits of the images, out of those of all rows."""
        return guide(logits, settings.guidance[step], settings.guided)

    def draw(
        self,
        logits: torch.Tensor,
        step: int,
        schedule: Schedule,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[images, n_k]` of guided logits, and the codes that feed the latent: here the tokens themselves."""
        logits = self.filtered(logits, step, settings)
        tokens = draw_tokens(logits, generator)
        return tokens, tokens

    def filtered(self, logits: torch.Tensor, step: int, settings: SamplingSettings) -> torch.Tensor:
        """Guided logits after temperature, top-k and top-p of a scale."""
        if settings.temperature[step] != 1:
            logits = logits / settings.temperature[step]
        return filter_logits(logits, settings.top_k[step], settings.top_p[step])

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `[images, 3, height, width]` in [0, 1] of latents, running ones included."""
        return (self.vae.decode(latents) + 1) * 0.5

    def postprocess(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents as `output_type` says."""
        if output_type == "latent":
            return latents
        images = self.decode_latents(latents)
        processor = VaeImageProcessor(vae_scale_factor=self.vae.downscale_factor)
        return processor.postprocess(images.float(), output_type=output_type, do_denormalize=[False] * len(images))

    def generate(
        self,
        condition: Any,
        cache: Cache,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[..., dict] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> HackVARPipelineOutput | tuple:
        """The part of a call that all families share: draw the scales, decode, report."""
        watch = CudaPeak(condition.device)
        latents, tokens = self.draw_scales(
            condition, cache, settings, generator, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        report = cache.report()
        images = self.postprocess(latents, output_type)
        report.cuda_peak_delta = watch.delta()

        self.maybe_free_model_hooks()
        if not return_dict:
            return images, tokens, report
        return HackVARPipelineOutput(images=images, tokens=tokens, cache_report=report)

    def check_common_inputs(
        self,
        num_prompts: int,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ):
        """Refuse what no backbone can do, before any heavy work."""
        if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be a positive int but is {num_images_per_prompt!r}.")
        num_images = num_prompts * num_images_per_prompt
        if isinstance(generator, (list, tuple)) and len(generator) != num_images:
            raise ValueError(
                f"`generator` has {len(generator)} entries but {num_images} images are drawn: give one generator, or one "
                "for each image."
            )
        entries = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(entry is None or isinstance(entry, torch.Generator) for entry in entries):
            raise ValueError(f"`generator` must be a `torch.Generator` or a list of them but is {generator!r}.")
        if isinstance(generator, (list, tuple)) and any(entry is None for entry in generator):
            raise ValueError("`generator` must not hold `None` when it is a list: give one generator for each image.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, which are not in "
                f"{self._callback_tensor_inputs}."
            )


def read_model_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a folder in diffusers layout."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json, so it is no pipeline in diffusers layout. Convert original files with "
            "`hack-pipelines convert` or load them with `HackVARPipeline.from_original`."
        )
    index = read_json(folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder / 'model_index.json'} is damaged: it has no `_class_name`.")
    return index
