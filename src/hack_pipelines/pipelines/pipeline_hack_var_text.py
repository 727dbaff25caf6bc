"""Text to image with Infinity."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils import logging, replace_example_docstring
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..cache.cache import Cache
from ..hub.registry import checked_reference
from ..methods import DEFAULT_METHOD, Method
from ..models.autoencoder_bsq import MultiScaleBSQModel
from ..models.infinity_schedules import (
    DEFAULT_SAMPLING,
    PIXEL_CLASSES,
    RATIOS,
    nearest_schedule,
    template_schedule,
)
from ..models.transformer_infinity import InfinityCondition, InfinityTransformer2DModel
from ..schedule import Schedule
from .calibration_prompts import CALIBRATION_PROMPTS
from .pipeline_hack_var import HackVARPipeline
from .pipeline_output import HackVARPipelineOutput
from .sampling import draw_tokens, filter_logits
from .settings import SamplingSettings, callback_inputs, is_whole, per_scale


logger = logging.get_logger(__name__)

VALUES_OF_A_BIT = 2
# Rows of the learned features for no text that stand for a short prompt where there is no text encoder.
NO_TEXT_LENGTH = 8
TEXT_MAX_LENGTH = 512
NATIVE_RATIO, NATIVE_PIXEL_CLASS = 1.0, "1M"

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from hack_pipelines import HackVARPipeline

        >>> pipe = HackVARPipeline.from_pretrained("demo")
        >>> image = pipe("a red apple", kv_budget=0.3, generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


class HackVARTextPipeline(HackVARPipeline):
    """
    Text-to-image generation with Infinity and a compressed cache.

    Args:
        transformer ([`InfinityTransformer2DModel`]):
            Predicts the bits of a scale.
        vae ([`MultiScaleBSQModel`]):
            The image tokenizer.
        text_encoder ([`~transformers.T5EncoderModel`], *optional*):
            Makes features of a prompt. Without one the pipeline takes `prompt_embeds` only.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The text encoder's tokenizer.
        sampling (`dict`, *optional*):
            Defaults of `guidance_scale`, `temperature`, `top_k` and `top_p` for this model.
        scale_schedule (`list`, *optional*):
            Height and width of every token map of the model's own size. `None` is the released 1024 x 1024.
        default_head_profile (`str`, *optional*):
            Hub repo of the head profile that belongs to this model, `"owner/name"` or `"owner/name@revision"`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    # Nothing but decoding needs the tokenizer's weights: bits are signs, not rows of a table.
    _exclude_from_cpu_offload = []
    _optional_components = ["text_encoder", "tokenizer"]
    family: ClassVar[str] = "infinity"
    pipeline_tag: ClassVar[str] = "text-to-image"

    text_encoder: T5EncoderModel | None
    tokenizer: Any

    def __init__(
        self,
        transformer: InfinityTransformer2DModel,
        vae: MultiScaleBSQModel,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        # diffusers compares these annotations with the classes of the values, so they take no parameters.
        sampling: dict | None = None,
        scale_schedule: list | None = None,
        default_head_profile: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        schedule = scale_schedule or [list(size) for size in template_schedule(NATIVE_RATIO, NATIVE_PIXEL_CLASS).sizes]
        self.register_to_config(
            sampling=sampling or DEFAULT_SAMPLING,
            scale_schedule=schedule,
            default_head_profile=checked_reference("default_head_profile", default_head_profile),
        )

    @classmethod
    def component_dtypes(cls, dtype: torch.dtype | dict[str, torch.dtype]) -> torch.dtype | dict[str, torch.dtype]:
        """The text encoder is float16 wherever the rest is half precision: that is how the original runs it."""
        if isinstance(dtype, dict) or dtype == torch.float32:
            return dtype
        return {"text_encoder": torch.float16, "default": dtype}

    @property
    def schedule(self) -> Schedule:
        return Schedule(tuple((int(height), int(width)) for height, width in self.config["scale_schedule"]))

    def draws(self, schedule: Schedule) -> bool:
        """A model of Infinity's sizes draws all of them."""
        return super().draws(schedule) or (is_template(self.schedule) and is_template(schedule))

    @property
    def fallback_schedule(self) -> Schedule | None:
        """
        The seven scales of the smallest pixel class, which every larger one begins with: they cost a twentieth of a
        megapixel, and no more memory than a small budget leaves.
        """
        own = self.schedule
        if not is_template(own):
            return None
        return Schedule(own.sizes[: min(PIXEL_CLASSES.values())])

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        """Height and width in pixels of what is drawn along a schedule."""
        height, width = self.vae.latent_size(schedule.sizes[-1])
        return height * self.vae.downscale_factor, width * self.vae.downscale_factor

    def resolve_schedule(
        self,
        height: int | None = None,
        width: int | None = None,
        scale_schedule: Sequence[Sequence[int]] | None = None,
    ) -> Schedule:
        """
        The scales of a call. Sizes are those that Infinity was trained on; another one is answered with the nearest: first by
        its ratio of sides, then by its number of pixels. A model with a schedule of its own draws that one.

        Args:
            height, width (`int`, *optional*):
                In pixels; the model's own by default.
            scale_schedule (`Sequence`, *optional*):
                Height and width of every token map instead.

        Raises:
            `ValueError`: if a side is no positive whole number, or the token maps are no schedule for this model.
        """
        if scale_schedule is not None:
            if height is not None or width is not None:
                raise ValueError("Give either `scale_schedule` or `height` and `width`, not both.")
            return self._checked_schedule(scale_schedule)
        own = self.schedule
        own_height, own_width = self.image_size(own)
        if height is None and width is None:
            return own
        for name, side in (("height", height), ("width", width)):
            if side is not None and (not is_whole(side) or side < 1):
                raise ValueError(f"`{name}` must be a positive whole number of pixels but is {side!r}.")
        wanted = (height or own_height, width or own_width)
        schedule = nearest_schedule(*wanted) if is_template(own) else own
        size = self.image_size(schedule)
        if size != wanted:
            logger.warning(
                f"{wanted[0]} x {wanted[1]} (height x width) is not a size that this model draws: taking the nearest, "
                f"{size[0]} x {size[1]}."
            )
        return schedule

    def _checked_schedule(self, sizes: Sequence[Sequence[int]]) -> Schedule:
        most = self.transformer.config["num_levels"]
        pairs = isinstance(sizes, (list, tuple)) and all(
            isinstance(size, (list, tuple)) and len(size) == 2 and all(is_whole(side) and side > 0 for side in size)
            for size in sizes
        )
        if not pairs or not 1 <= len(sizes) <= most or tuple(sizes[0]) != (1, 1):
            raise ValueError(
                f"`scale_schedule` must be a list of 1 to {most} pairs (height, width) of positive whole numbers that "
                f"starts with (1, 1), but is {sizes!r}."
            )
        return Schedule(tuple((int(height), int(width)) for height, width in sizes))

    def prepare_settings(
        self,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
        schedule: Schedule | None = None,
    ) -> SamplingSettings:
        """
        Sampling settings with one entry a scale; a single number holds for all of them.

        Raises:
            `ValueError`: if a value is out of its range.
        """
        scales = len(schedule or self.schedule)
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        defaults = {**DEFAULT_SAMPLING, **self.config["sampling"]}
        value: dict[str, Any] = {name: defaults[name] if entry is None else entry for name, entry in given.items()}
        layers = self.transformer.config["num_layers"]
        if (
            not isinstance(guidance_layers, (list, tuple))
            or not guidance_layers
            or not all(is_whole(place) and -layers < place <= 0 for place in guidance_layers)
        ):
            raise ValueError(
                f"`guidance_layers` must list whole numbers from {1 - layers} to 0, where 0 is the logits and -1 the last "
                f"block, but is {guidance_layers!r}."
            )
        return SamplingSettings(
            guidance=per_scale("guidance_scale", value["guidance_scale"], scales, 0, 1000),
            temperature=per_scale("temperature", value["temperature"], scales, 0, 1000, open_lower=True),
            top_k=per_scale("top_k", value["top_k"], scales, 0, 2**31, whole=True),
            top_p=per_scale("top_p", value["top_p"], scales, 0, 1, open_lower=True),
            guidance_layers=tuple(guidance_layers),
        )

    @property
    def text_max_length(self) -> int:
        """The most text tokens that the transformer reads; without a transformer that of the released models."""
        return TEXT_MAX_LENGTH if self.transformer is None else self.transformer.config["text_max_length"]

    @property
    def _text_device(self) -> torch.device:
        """Where text features go."""
        return self._execution_device if self.transformer is None else self.device_of(self.transformer)

    def enable_group_offload(self, *args: Any, **kwargs: Any):
        """
        Offload groups of layers, see [`~diffusers.DiffusionPipeline.enable_group_offload`].

        Raises:
            `ValueError`: if leaves of the text encoder are to go to disk, which loses its shared embedding.
        """
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        excluded = given.get("exclude_modules") or ()
        to_disk = given.get("offload_to_disk_path") and given.get("offload_type") == "leaf_level"
        if to_disk and self.text_encoder is not None and "text_encoder" not in excluded:
            raise ValueError(
                "With `offload_type='leaf_level'` and `offload_to_disk_path` the text encoder would lose its embedding, which two "
                "of its modules share: pass `exclude_modules=['text_encoder']`, or `offload_type='block_level'`."
            )
        super().enable_group_offload(*args, **kwargs)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        prompt_embeds: Sequence[torch.Tensor] | torch.Tensor | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> InfinityCondition:
        """
        Text features of every image.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from: one for all prompts, or one each. `None` and `""` take the learned features that
                stand for no text.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Images of each prompt.
            guided (`bool`, *optional*, defaults to `True`):
                Whether there are unconditional rows.
            prompt_embeds (`list[torch.Tensor]`, *optional*):
                Features `[length, text_channels]` of every prompt, without padding, instead of `prompt`.
            negative_prompt_embeds (`list[torch.Tensor]`, *optional*):
                Likewise, instead of `negative_prompt`.

        Raises:
            `ValueError`: if neither or both of text and features are given, or they do not fit the model.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Give either `prompt` or `prompt_embeds`.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Give either `negative_prompt` or `negative_prompt_embeds`, not both.")
        prompts = None if prompt is None else checked_prompts("prompt", prompt)
        given = None if prompt_embeds is None else self._checked_embeds("prompt_embeds", prompt_embeds)
        count = len(prompts or given or ())
        negatives: list[torch.Tensor | None] | None = None
        if negative_prompt_embeds is not None:
            negatives = [*self._checked_embeds("negative_prompt_embeds", negative_prompt_embeds)]
        negative_prompts = None
        if negative_prompt is not None:
            negative_prompts = checked_prompts("negative_prompt", negative_prompt)
            if isinstance(negative_prompt, str):
                negative_prompts *= count
        for name, entries in (("negative_prompt", negative_prompts), ("negative_prompt_embeds", negatives)):
            if entries is not None and len(entries) != count:
                raise ValueError(f"`{name}` has {len(entries)} entries for {count} prompts: give one for each prompt.")
        if prompts is not None:
            given = self._encode_texts(prompts)
        if negative_prompts is not None and guided:
            texts = [text for text in negative_prompts if text]
            features = iter(self._encode_texts(texts) if texts else [])
            negatives = [next(features) if text else None for text in negative_prompts]
        return InfinityCondition(
            repeated(given or [], num_images_per_prompt),
            None if negatives is None else repeated(negatives, num_images_per_prompt),
            guided,
        )

    def _checked_embeds(self, name: str, embeds: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
        config = self.transformer.config
        entries = list(embeds) if isinstance(embeds, (list, tuple)) or getattr(embeds, "ndim", 0) == 3 else []
        if not entries:
            raise ValueError(f"`{name}` must be a list of tensors [length, {config['text_channels']}], one a prompt.")
        for entry in entries:
            fits = isinstance(entry, torch.Tensor) and entry.ndim == 2 and entry.is_floating_point()
            if not fits or entry.shape[1] != config["text_channels"]:
                what = list(entry.shape) if isinstance(entry, torch.Tensor) else type(entry).__name__
                raise ValueError(
                    f"`{name}` must hold floating tensors [length, {config['text_channels']}] but holds {what}."
                )
            if not 1 <= len(entry) <= config["text_max_length"]:
                raise ValueError(
                    f"`{name}` must have 1 to {config['text_max_length']} text tokens each but has {len(entry)}: cut it, "
                    "and leave padding out."
                )
        return [entry.to(self._text_device) for entry in entries]

    def _encode_texts(self, texts: list[str]) -> list[torch.Tensor]:
        """Features `[length, text_channels]` of each text in float32."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "This pipeline has no text encoder: give `prompt_embeds`, or load it with one "
                "(`from_original(..., text_encoder=...)`, `hack-pipelines convert --text-encoder ...`)."
            )
        length = self.text_max_length
        self._warn_of_cuts(texts, length)
        # Padded to the full length, as the original encodes: in half precision another length rounds otherwise.
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device_of(self.text_encoder))
        features = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        features = features.to(self._text_device, torch.float32)
        return [rows[:count] for rows, count in zip(features, tokens.attention_mask.sum(1).tolist())]

    def _warn_of_cuts(self, texts: list[str], length: int):
        """Tell what of a text is beyond the most tokens that the model reads; the last of them is the end mark."""
        for ids in self.tokenizer(texts, truncation=False, verbose=False).input_ids:
            if len(ids) > length:
                cut = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning(
                    f"A prompt has {len(ids)} tokens but the model reads {length}. This part of it was cut: {cut!r}"
                )

    def encode_inputs(self, inputs: Sequence[int | str], guided: bool) -> InfinityCondition:
        if self.text_encoder is None and not any(inputs):
            features = self.transformer.unconditional_features(NO_TEXT_LENGTH)
            return InfinityCondition([features] * len(inputs), guided=guided)
        return self.encode_prompt([str(entry) for entry in inputs], guided=guided)

    def calibration_inputs(self, num_samples: int) -> list[int | str]:
        """Built-in prompts in turn; without a text encoder no text, which stands for the learned features."""
        if self.text_encoder is None:
            return [""] * num_samples
        return [CALIBRATION_PROMPTS[sample % len(CALIBRATION_PROMPTS)] for sample in range(num_samples)]

    def predict(
        self,
        step: int,
        scale_input: torch.Tensor | None,
        condition: InfinityCondition,
        cache: Cache,
        settings: SamplingSettings | None = None,
    ) -> torch.Tensor:
        guidance = None
        if settings is not None and condition.guided and settings.guidance[step] != 1:
            layers = self.transformer.config["num_layers"]
            guidance = {layers + place: settings.guidance[step] for place in settings.guidance_layers if place}
        return self.transformer(
            scale_input,
            condition,
            cache.schedule,
            step=step,
            kv_cache=cache,
            layer_guidance=guidance,
            return_dict=False,
        )[0]

    def guided_logits(self, logits: torch.Tensor, step: int, settings: SamplingSettings) -> torch.Tensor:
        # The original's order of operations: anything else changes the last bits.
        logits = logits * (1 / settings.temperature[step])
        if not settings.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        weight = settings.guidance[step]
        if weight == 1 or 0 not in settings.guidance_layers:
            return conditional
        return weight * conditional + (1 - weight) * unconditional

    def draw(
        self,
        logits: torch.Tensor,
        step: int,
        schedule: Schedule,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits `[images, n_k, bits_per_token]` of guided logits, in uint8; they are the codes, too."""
        by_bit = logits.unflatten(-1, (-1, VALUES_OF_A_BIT)).flatten(1, 2)
        filtered = filter_logits(by_bit, min(settings.top_k[step], VALUES_OF_A_BIT), settings.top_p[step])
        bits = draw_tokens(filtered, generator).view(*logits.shape[:2], -1).to(torch.uint8)
        return bits, bits

    def log_likelihood(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        by_bit = logits.unflatten(-1, (-1, VALUES_OF_A_BIT)).log_softmax(-1)
        return by_bit.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1).sum(-1)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
        scale_schedule: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Sequence[torch.Tensor] | torch.Tensor | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | torch.Tensor | None = None,
        kv_budget: float | int | str | None = None,
        attention_budget: float | int | str | None = None,
        method: str | Method = DEFAULT_METHOD,
        kv_dtype: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> HackVARPipelineOutput | tuple:
        r"""
        Draw images of prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. What lies beyond the text encoder's most tokens is cut, with a warning that shows it.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance steers away from, one for all prompts or one each. `None` and `""` take the learned features
                that stand for no text.
            height, width (`int`, *optional*):
                Of the images, in pixels. The model's own by default; a size that it does not draw is answered with the
                nearest that it does, which is logged.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Images of each prompt.
            guidance_scale (`float` or `list[float]`, *optional*):
                Weight of guidance, one for all scales or one a scale; 1 is no guidance. Defaults to the model's own, 3 for the
                released ones.
            temperature (`float` or `list[float]`, *optional*):
                Divisor of the logits before guidance, likewise. Defaults to the model's own: 0.5 for the released 2B, 1
                for the 8B.
            top_k (`int` or `list[int]`, *optional*):
                Values of a bit that can be drawn: 1 is greedy, anything else both. Defaults to the model's own.
            top_p (`float` or `list[float]`, *optional*):
                Probability mass that can be drawn: the less likely value of a bit is dropped at or below `1 - top_p`.
                Defaults to the model's own, 0.97 for the released ones.
            guidance_layers (`Sequence[int]`, *optional*, defaults to `(0,)`):
                Where guidance acts: 0 is on the logits, -1 on the output of the last block, -2 of the one before it. The
                original's `cfg_insertion_layer`.
            scale_schedule (`Sequence`, *optional*):
                Height and width of every token map, coarse to fine, instead of `height` and `width`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one an image, which makes every image independent of its batch. The original draws one
                image at a time, with one generator.
            prompt_embeds (`list[torch.Tensor]`, *optional*):
                Text features `[length, text_channels]` of every prompt, without padding, instead of `prompt`.
            negative_prompt_embeds (`list[torch.Tensor]`, *optional*):
                Likewise, instead of `negative_prompt`.
            kv_budget (`float`, `int` or `str`, *optional*):
                What may stay stored between steps: a fraction of the full cache, tokens per head, or bytes per image
                such as `"512MB"`. `None` keeps everything.
            attention_budget (`float`, `int` or `str`, *optional*):
                What a step may attend to; only for methods that separate it from `kv_budget`.
            method (`str` or [`Method`], *optional*, defaults to `"hack++"`):
                How tokens are chosen when `kv_budget` is given.
            kv_dtype (`"int8"`, *optional*):
                Storage type of keys and values; `None` is the type that attention reads.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`HackVARPipelineOutput`] rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipe, step, size, callback_kwargs)` after each scale, with the height and
                width of its token map; may return changed `latents`. Preview them with `pipe.decode_latents(latents)`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                What `callback_kwargs` holds, out of `latents` and `tokens`.

        Examples:

        Returns:
            [`HackVARPipelineOutput`] or `tuple`: images, tokens and cache report.
        """
        self._interrupt = False
        schedule = self.resolve_schedule(height, width, scale_schedule)
        settings = self.prepare_settings(guidance_scale, temperature, top_k, top_p, guidance_layers, schedule)
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        given = prompt if prompt is not None else prompt_embeds
        prompts = 1 if given is None or isinstance(given, str) else len(given)
        self.check_common_inputs(
            prompts, num_images_per_prompt, generator, output_type, callback_on_step_end_tensor_inputs
        )
        cache = self.prepare_cache(kv_budget, attention_budget, method, kv_dtype, settings.guided, schedule)
        condition = self.encode_prompt(
            prompt, negative_prompt, num_images_per_prompt, settings.guided, prompt_embeds, negative_prompt_embeds
        )
        return self.generate(
            condition,
            cache,
            settings,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )


def is_template(schedule: Schedule) -> bool:
    """Whether a schedule is one of those that Infinity was trained on, so that the others suit the model, too."""
    return any(template_schedule(ratio, name) == schedule for ratio in RATIOS for name in PIXEL_CLASSES)


def checked_prompts(name: str, prompts: str | Sequence[str]) -> list[str]:
    """One or several texts as a list."""
    entries = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(text, str) for text in entries):
        raise ValueError(f"`{name}` must be a text or a list of at least one text but is {prompts!r}.")
    return list(entries)


def repeated(entries: Sequence, count: int) -> list:
    """Every entry `count` times in a row."""
    return [entry for entry in entries for _ in range(count)]
