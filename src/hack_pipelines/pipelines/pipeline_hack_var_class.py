"""Class-conditional images with VAR."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers.utils import replace_example_docstring

from ..cache.cache import Cache
from ..hub.registry import checked_reference
from ..methods import DEFAULT_METHOD, Method
from ..models.autoencoder_msvq import MultiScaleVQModel
from ..models.transformer_var import VARTransformer2DModel
from ..schedule import Schedule
from .class_labels import class_id, class_ids, labels_by_name
from .pipeline_hack_var import HackVARPipeline
from .pipeline_output import HackVARPipelineOutput
from .sampling import draw_tokens, gumbel_softmax
from .settings import SamplingSettings, callback_inputs, per_scale


# What the original recommends for the best FID: cfg 1.5, which is 2.5 here.
DEFAULT_SAMPLING = {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from hack_pipelines import HackVARPipeline

        >>> pipe = HackVARPipeline.from_pretrained("demo-class")
        >>> image = pipe(class_labels=0, kv_budget=0.3, generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


class HackVARClassPipeline(HackVARPipeline):
    """
    Class-conditional image generation with VAR and a compressed cache.

    Args:
        transformer ([`VARTransformer2DModel`]):
            Predicts the tokens of a scale.
        vae ([`MultiScaleVQModel`]):
            The image tokenizer.
        id2label (`dict`, *optional*):
            Names of the classes by id; several names of one class are separated by commas.
        sampling (`dict`, *optional*):
            Defaults of `guidance_scale`, `top_k` and `top_p` for this model.
        default_head_profile (`str`, *optional*):
            Hub repo of the head profile that belongs to this model, `"owner/name"` or `"owner/name@revision"`.
    """

    family: ClassVar[str] = "var"
    pipeline_tag: ClassVar[str] = "unconditional-image-generation"

    def __init__(
        self,
        transformer: VARTransformer2DModel,
        vae: MultiScaleVQModel,
        # diffusers compares these annotations with the classes of the values, so they take no parameters.
        id2label: dict | None = None,
        sampling: dict | None = None,
        default_head_profile: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            id2label={str(key): name for key, name in (id2label or {}).items()},
            sampling=sampling or DEFAULT_SAMPLING,
            default_head_profile=checked_reference("default_head_profile", default_head_profile),
        )

    @property
    def schedule(self) -> Schedule:
        return self.transformer.schedule

    @property
    def labels(self) -> dict[str, list[int]]:
        """Class ids by name. A class has its whole name and its synonyms; a few names of ImageNet belong to two classes."""
        return labels_by_name(self.config["id2label"])

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Ids of class names, `"golden retriever"` for example; case does not matter.

        Raises:
            `ValueError`: if a name is unknown, with the nearest ones, or if it belongs to several classes, with their ids.
        """
        num_classes = self.transformer.config["num_classes"]
        names = [label] if isinstance(label, str) else label
        return [class_id(name, self.config["id2label"], num_classes) for name in names]

    def encode_class_labels(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Class ids `[images]`, the null class as `num_classes`.

        Args:
            class_labels (`int`, `str`, a list of them, `torch.Tensor`, *optional*):
                Ids or names; -1 is the null class. `None` draws one at random.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Images of each.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws random classes, before any token, as the original does.
        """
        device = self.device_of(self.transformer)
        num_classes = self.transformer.config["num_classes"]
        if class_labels is None:
            uniform = torch.full((1, num_classes), 1 / num_classes, device=device)
            if isinstance(generator, list):
                return torch.cat([draw_classes(uniform, 1, entry) for entry in generator])
            return draw_classes(uniform, num_images_per_prompt, generator)
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        labels = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
        ids = class_ids(labels, self.config["id2label"], num_classes)
        return torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)

    def prepare_settings(
        self,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        more_smooth: bool = False,
    ) -> SamplingSettings:
        """
        Sampling settings with one entry a scale. A single guidance weight is ramped linearly from 1 at the first scale, as
        the original does; a list is taken as it is.

        Raises:
            `ValueError`: if a value is out of its range.
        """
        scales = len(self.schedule)
        vocab_size = self.transformer.config["vocab_size"]
        sampling = {**DEFAULT_SAMPLING, **self.config["sampling"]}
        if guidance_scale is None:
            guidance_scale = sampling["guidance_scale"]
        guidance = per_scale("guidance_scale", guidance_scale, scales, 0, 1000)
        if not isinstance(guidance_scale, (list, tuple)):
            guidance = tuple(1 + (weight - 1) * step / max(scales - 1, 1) for step, weight in enumerate(guidance))
        if top_k is None:
            top_k = min(int(sampling["top_k"]), vocab_size)
        return SamplingSettings(
            guidance=guidance,
            temperature=per_scale("temperature", temperature, scales, 0, 1000, open_lower=True),
            top_k=per_scale("top_k", top_k, scales, 0, vocab_size, whole=True),
            top_p=per_scale("top_p", sampling["top_p"] if top_p is None else top_p, scales, 0, 1, open_lower=True),
            more_smooth=more_smooth,
        )

    def predict(
        self,
        step: int,
        scale_input: torch.Tensor | None,
        condition: torch.Tensor,
        cache: Cache,
        settings: SamplingSettings | None = None,
    ) -> torch.Tensor:
        return self.transformer(scale_input, condition, step=step, kv_cache=cache, return_dict=False)[0]

    def log_likelihood(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    def encode_inputs(self, inputs: Sequence[int | str], guided: bool) -> torch.Tensor:
        condition = self.encode_class_labels(inputs)
        if guided:
            condition = torch.cat((condition, torch.full_like(condition, self.transformer.config["num_classes"])))
        return condition

    def calibration_inputs(self, num_samples: int) -> list[int | str]:
        num_classes = self.transformer.config["num_classes"]
        return [(2 * sample + 1) * num_classes // (2 * num_samples) for sample in range(num_samples)]

    def draw(
        self,
        logits: torch.Tensor,
        step: int,
        schedule: Schedule,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not settings.more_smooth:
            return super().draw(logits, step, schedule, settings, generator)
        logits = self.filtered(logits, step, settings)
        tokens = draw_tokens(logits, generator)
        progress = step / max(len(schedule) - 1, 1)
        sharpness = max(0.27 * (1 - 0.95 * progress), 0.005)
        return tokens, gumbel_softmax(logits * (1 + progress), sharpness, generator)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        more_smooth: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        Draw images of classes.

        Args:
            class_labels (`int`, `str`, a list of them, or `torch.Tensor`, *optional*):
                Class ids or names; -1 is the null class. `None` draws a class at random.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Images of each class.
            guidance_scale (`float` or `list[float]`, *optional*):
                Weight of guidance at the last scale, ramped linearly from 1 at the first, or one weight a scale; 1 is no
                guidance. The original's `cfg` is this minus 1. Defaults to the model's own, 2.5 for the released ones.
            temperature (`float` or `list[float]`, *optional*, defaults to 1.0):
                Divisor of the guided logits.
            top_k (`int` or `list[int]`, *optional*):
                Tokens that can be drawn; 0 is all, 1 is greedy. Defaults to the model's own, 900 for the released ones.
            top_p (`float` or `list[float]`, *optional*):
                Probability mass that can be drawn; 1 is all. Defaults to the model's own, 0.96 for the released ones.
            more_smooth (`bool`, *optional*, defaults to `False`):
                Feed the latent a soft mixture of codes: smoother pictures, not used for published figures.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, drawn from as the original does, or one an image, which makes every image independent
                of its batch.
            kv_budget (`float`, `int` or `str`, *optional*):
                What may stay stored between steps: a fraction of the full cache, tokens per head, or bytes per image
                such as `"64MB"`. `None` keeps everything.
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
        settings = self.prepare_settings(guidance_scale, temperature, top_k, top_p, more_smooth)
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        prompts = 1 if class_labels is None or isinstance(class_labels, (int, str)) else len(class_labels)
        self.check_common_inputs(
            prompts, num_images_per_prompt, generator, output_type, callback_on_step_end_tensor_inputs
        )
        labels = self.encode_class_labels(class_labels, num_images_per_prompt, generator)
        cache = self.prepare_cache(kv_budget, attention_budget, method, kv_dtype, settings.guided)
        if settings.guided:
            labels = torch.cat((labels, torch.full_like(labels, self.transformer.config["num_classes"])))

        return self.generate(
            labels,
            cache,
            settings,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )


def draw_classes(weights: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """`count` class ids drawn with `weights` `[1, classes]`."""
    device = weights.device if generator is None else generator.device
    drawn = torch.multinomial(weights.to(device), count, replacement=True, generator=generator)
    return drawn[0].to(weights.device)
