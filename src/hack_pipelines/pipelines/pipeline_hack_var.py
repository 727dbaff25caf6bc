"""The loop over scales, for every backbone."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import get_parameter_device
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo

from ..cache import Cache, FullCache, make_cache
from ..cache.budget import TokenBytes, make_plan
from ..cache.report import CudaPeak
from ..cache.storage import get_storage
from ..convert import load_original
from ..hub.cards import CARD_NAME
from ..hub.checks import check_weights
from ..hub.files import read_json
from ..hub.originals import OriginalRepo
from ..hub.registry import checked_reference
from ..hub.sources import locate
from ..hub.upload import upload
from ..methods import DEFAULT_METHOD, Full, Geometry, Method, get_method
from ..profiles.head_profile import HeadProfile
from ..schedule import Schedule
from .head_profiles import PROFILE_FOLDER, find_head_profile
from .model_card import pipeline_card
from .pipeline_output import HackVARPipelineOutput
from .sampling import draw_tokens, filter_logits, guide
from .settings import SamplingSettings, is_whole


logger = logging.get_logger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What would run code that came with a model.
CODE_OPTIONS = ("custom_pipeline", "custom_revision", "trust_remote_code")


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
    pipeline_tag: ClassVar[str]
    """What the Hub calls its task."""

    transformer: Any
    vae: Any
    head_profile: HeadProfile | None = None
    _fallback_profile: HeadProfile | None = None
    _original: OriginalRepo | None = None
    _interrupt = False
    _num_timesteps = 0

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        variant: str | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        head_profile: str | Path | HeadProfile | bool | None = None,
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
                this is half precision, as the original runs it; a `dict` by component decides otherwise. `torch_dtype`,
                its former name in diffusers, is taken too.
            head_profile (`str`, `Path`, [`HeadProfile`] or `False`, *optional*):
                Profile to attach: a folder, a Hub repo (`"owner/name"` or `"owner/name@revision"`), the profile itself;
                `False` is none. By default the one in the model's own `head_profile` folder, else the one that its
                configuration names as `default_head_profile`, else the one that is registered for a released model.
            kwargs:
                Everything else that [`~diffusers.DiffusionPipeline.from_pretrained`] takes: `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`, `device_map`, components. Those for the Hub, except
                `revision`, also count for the profile.

        Returns:
            [`HackVARPipeline`]: of the subclass that the folder names.

        Raises:
            `ValueError`: if the folder is no pipeline of this package, a weight is missing or has another shape, a
                profile that was asked for or named does not exist or fit, or both `dtype` and `torch_dtype` are given.
            `ConnectionError`: if something is not in the cache and cannot be fetched.
        """
        refuse_code(kwargs)
        torch_dtype = kwargs.pop("torch_dtype", None)
        if dtype is not None and torch_dtype is not None:
            raise ValueError(
                f"`dtype` is {dtype} and `torch_dtype`, its former name, is {torch_dtype}: give `dtype` alone."
            )
        dtype = torch_dtype if dtype is None else dtype
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        source = locate(str(name_or_path), variant, **hub_options)
        index = read_model_index(source.folder)
        subclass = cls._subclass("name", index["_class_name"], source.folder)
        components = [name for name in index if not name.startswith("_") and name not in kwargs]
        check_weights(source.folder, components, source.variant)
        default = kwargs.get("default_head_profile", index.get("default_head_profile"))
        profile = find_head_profile(head_profile, source, default, hub_options)
        # Said also where it is the default: transformers would take the dtype of its files.
        kwargs["dtype"] = subclass.component_dtypes(torch.float32 if dtype is None else dtype)
        if source.variant is not None:
            kwargs["variant"] = source.variant
        pipe: Any = super(HackVARPipeline, subclass).from_pretrained(
            str(source.folder), use_safetensors=True, **kwargs
        )
        pipe._original = source.original
        # Without a transformer there is nothing to draw with, and nothing that a profile could fit.
        if profile is not None and pipe.transformer is not None:
            pipe.load_head_profile(profile)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **kwargs: Any) -> str:
        """
        Fetch a model, and the head profile that belongs to it, so that [`~HackVARPipeline.from_pretrained`] needs no network.

        Args:
            pretrained_model_name (`str` or `Path`):
                As in [`~HackVARPipeline.from_pretrained`].
            kwargs:
                `variant`, `head_profile`, `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, as
                there. What else diffusers hands over has no meaning here.

        Returns:
            `str`: the folder, in diffusers layout.

        Raises:
            `ValueError`, `ConnectionError`: as in [`~HackVARPipeline.from_pretrained`].
        """
        refuse_code(kwargs)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        source = locate(str(pretrained_model_name), kwargs.get("variant"), **hub_options)
        default = read_model_index(source.folder).get("default_head_profile")
        find_head_profile(kwargs.get("head_profile"), source, default, hub_options)
        return str(source.folder)

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

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        license: str | None = None,
        base_model: str | None = None,
        results: str | Path | None = None,
        repo_id: str | None = None,
        **kwargs: Any,
    ):
        """
        Save the pipeline, with its head profile in the folder `head_profile`, and a card where there is none.

        Args:
            save_directory (`str` or `Path`):
                The folder.
            safe_serialization (`bool`, *optional*, defaults to `True`):
                Whether weights are safetensors. Others, which are pickles, are neither uploaded nor read.
            variant (`str`, *optional*):
                Part of the names of the weight files, `"bf16"` for example.
            max_shard_size (`int` or `str`, *optional*):
                Largest size of a weight file, `"5GB"` for example.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload the folder as well.
            license (`str`, *optional*):
                Of the weights, as the Hub names it, for the card. Known for models that were opened from the original
                authors' repos.
            base_model (`str`, *optional*):
                Hub repo of the model that this one was made from, for the card; known likewise.
            results (`str` or `Path`, *optional*):
                Folder of a `hack-pipelines compare`, whose tables go into the card.
            repo_id (`str`, *optional*):
                Where to; the name of the folder by default.
            kwargs:
                With `push_to_hub`, what [`~HackVARPipeline.push_to_hub`] takes besides.

        Raises:
            `ValueError`: if `results` is no comparison, or as in [`~HackVARPipeline.push_to_hub`].
        """
        folder = Path(save_directory)
        if kwargs and not push_to_hub:
            raise TypeError(f"`save_pretrained` takes {', '.join(kwargs)} with `push_to_hub=True` only.")
        if push_to_hub and not safe_serialization:
            raise ValueError("`safe_serialization` must stay `True` with `push_to_hub`: pickle files can run code.")
        if push_to_hub and repo_id is None:
            repo_id = folder.name
        if self._original is not None:
            license, base_model = license or self._original.license, base_model or self._original.name
        card = pipeline_card(
            self,
            license=license,
            base_model=base_model,
            results=results,
            repo_id=repo_id,
            revision=kwargs.get("tag") or kwargs.get("revision"),
        )
        if push_to_hub and license is None:
            logger.warning("The card names no licence of the weights: `license` says which one it is.")
        super().save_pretrained(str(folder), safe_serialization, variant, max_shard_size)
        if self.head_profile is not None:
            self.head_profile.save_pretrained(folder / PROFILE_FOLDER)
        if not (folder / CARD_NAME).exists():
            card.save(folder / CARD_NAME)
        if push_to_hub:
            message = kwargs.pop("commit_message", None) or f"Upload {type(self).__name__}"
            return upload(folder, str(repo_id), message, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        license: str | None = None,
        base_model: str | None = None,
        results: str | Path | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        replace_card: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> CommitInfo:
        """
        Upload the pipeline with its head profile and a model card, in one commit.

        Args:
            repo_id (`str`):
                Repo, which is made where it is missing.
            license, base_model, results (*optional*):
                For the card, see [`~HackVARPipeline.save_pretrained`].
            commit_message (`str`, *optional*):
                What the commit is called.
            private (`bool`, *optional*):
                Whether a repo that is made now can be seen by its owner only; the owner's setting by default.
            token (`str` or `bool`, *optional*):
                That may write; by default the one of `hf auth login`.
            revision (`str`, *optional*, defaults to `"main"`):
                Branch, which is made where it is missing.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to propose the commit as a pull request.
            tag (`str`, *optional*):
                Name of a tag for the commit, so that others can pin it.
            replace_card (`bool`, *optional*, defaults to `False`):
                Whether to write over a card on the Hub that somebody edited.
            variant, max_shard_size (*optional*):
                Of the weight files, see [`~HackVARPipeline.save_pretrained`].

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit.

        Raises:
            `ValueError`: if the tag is taken, the token may not write, or `results` is no comparison.
            `ConnectionError`: if the Hub cannot be reached.
        """
        with TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                variant=variant,
                max_shard_size=max_shard_size,
                license=license,
                base_model=base_model,
                results=results,
                push_to_hub=True,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tag=tag,
                replace_card=replace_card,
            )

    def load_head_profile(self, head_profile: str | Path | HeadProfile, **kwargs: Any):
        """
        Attach a head profile, which compression methods plan with.

        Args:
            head_profile (`str`, `Path` or [`HeadProfile`]):
                Folder, Hub repo (`"owner/name"` or `"owner/name@revision"`), or the profile itself.
            kwargs:
                What [`HeadProfile.from_pretrained`] takes besides: `revision`, `token`, `cache_dir`.

        Raises:
            `ValueError`: if the profile was made for another model; the message names the difference.
        """
        if not isinstance(head_profile, HeadProfile):
            head_profile = HeadProfile.from_pretrained(str(head_profile), **kwargs)
        # A model that draws several sizes reads a profile of any of them.
        recorded = head_profile.schedule
        head_profile.check_fits(self.geometry(recorded if self.draws(recorded) else None))
        self.head_profile = head_profile

    @property
    def num_timesteps(self) -> int:
        """Scales of the running or the last call: callbacks count steps by this name."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the scale that is being drawn."""
        return self._interrupt

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The scales that the model draws where the call does not say otherwise."""

    def draws(self, schedule: Schedule) -> bool:
        """Whether the model was made for these scales."""
        return schedule == self.schedule

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

    def enable_vae_slicing(self):
        """Decode one image of a batch at a time: the same images in less memory. As `pipe.vae.enable_slicing()`."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        """Decode all images of a batch together again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self):
        """Decode large images a square at a time, see [`PiecewiseDecoder`]. As `pipe.vae.enable_tiling()`."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self):
        """Decode images whole again."""
        self.vae.disable_tiling()

    def device_of(self, component: torch.nn.Module) -> torch.device:
        """
        Where a component computes: where the hooks of an offload or a device map bring it, else where it is. Components may
        be on different devices, which `_execution_device` knows one of.
        """
        for module in component.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return get_parameter_device(component)

    def _attention_dtype(self) -> torch.dtype:
        """The dtype of keys and values as attention reads them."""
        device_type = self.device_of(self.transformer).type
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
                f"No head profile is attached, so one is made now from a fixed input, for this process only ({method.name!r} "
                "needs it). `hack-pipelines calibrate --model MODEL --output MODEL/head_profile` makes a better one once, where "
                "the model's folder is opened with it; `--head-profile` or `pipe.load_head_profile(...)` attach any other."
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

    def prepare_latents(self, num_images: int, schedule: Schedule) -> torch.Tensor:
        """Running latents before the first scale: zeros `[images, latent_channels, height, width]` where the tokenizer is."""
        return torch.zeros(
            num_images,
            self.vae.config["latent_channels"],
            *self.vae.latent_size(schedule.sizes[-1]),
            device=self.device_of(self.vae),
            dtype=torch.float32,
        )

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
        latents = self.prepare_latents(len(condition) // 2 if settings.guided else len(condition), schedule)
        self._num_timesteps = len(schedule)
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
                        scale_input = self.vae.next_input(latents, step, schedule, tokens.device)
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
        return (self.vae.decode(latents.to(self.device_of(self.vae))) + 1) * 0.5

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


def refuse_code(options: dict[str, Any]):
    """Refuse options of diffusers that run code which came with a model."""
    given = [name for name in CODE_OPTIONS if options.get(name)]
    if given:
        raise ValueError(f"No code that comes with a model is run here: leave {', '.join(given)} out.")


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
    try:
        checked_reference("default_head_profile", index.get("default_head_profile"))
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'} is damaged: {error}") from error
    return index
