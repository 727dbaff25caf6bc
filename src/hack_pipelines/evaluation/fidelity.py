"""Distances between a compressed run and the run of the same seeds with the full cache."""

from collections.abc import Sequence

import torch

from ..cache import Cache
from ..methods import DEFAULT_METHOD, Method
from ..pipelines.pipeline_hack_var import HackVARPipeline


Tokens = Sequence[torch.Tensor]


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each image, `10 log10(1 / mean squared error)`, in decibels.

    Args:
        images, reference (`torch.Tensor`):
            `[images, channels, height, width]` in [0, 1], as `output_type="pt"` returns them.

    Returns:
        `torch.Tensor`: `[images]` in float64; infinite for an image that equals its reference.

    Raises:
        `ValueError`: if the shapes differ or values lie outside [0, 1].
    """
    check_images(images, reference)
    return -10 * (images.double() - reference.double()).square().mean(dim=(1, 2, 3)).log10()


def check_images(images: torch.Tensor, reference: torch.Tensor):
    """
    Refuse what are no two batches of images.

    Raises:
        `ValueError`: if the shapes differ or values lie outside [0, 1].
    """
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            "`images` and `reference` must have one shape, [images, channels, height, width], but have "
            f"{list(images.shape)} and {list(reference.shape)}."
        )
    for name, tensor in (("images", images), ("reference", reference)):
        if tensor.numel() and not (tensor.min() >= 0 and tensor.max() <= 1):
            raise ValueError(
                f"`{name}` must lie in [0, 1] but reach from {tensor.min().item():g} to {tensor.max().item():g}."
            )


def token_agreement(tokens: Tokens, reference: Tokens) -> torch.Tensor:
    """
    Share of the tokens of each image that equal those of the reference; of the bits, where tokens are made of bits.

    Args:
        tokens, reference (`Sequence[torch.Tensor]`):
            Ids `[images, n_k]` or bits `[images, n_k, bits]` of every scale, as a pipeline returns them.

    Returns:
        `torch.Tensor`: `[images]` in float64.

    Raises:
        `ValueError`: if the scales or shapes differ.
    """
    return torch.cat(matches(tokens, reference), dim=1).double().mean(1)


def token_agreement_by_scale(tokens: Tokens, reference: Tokens) -> torch.Tensor:
    """[`token_agreement`] of every scale on its own, `[images, scales]` in float64."""
    return torch.stack([equal.double().mean(1) for equal in matches(tokens, reference)], dim=1)


def first_differing_step(tokens: Tokens, reference: Tokens) -> torch.Tensor:
    """
    Index of the first scale, from 0, at which an image has another token than the reference.

    Args:
        tokens, reference (`Sequence[torch.Tensor]`):
            Ids `[images, n_k]` or bits `[images, n_k, bits]` of every scale, as a pipeline returns them.

    Returns:
        `torch.Tensor`: `[images]`, integers; the number of scales for an image that never differs.

    Raises:
        `ValueError`: if the scales or shapes differ.
    """
    same = torch.stack([equal.all(1) for equal in matches(tokens, reference)], dim=1)
    return same.long().cumprod(1).sum(1)


def matches(tokens: Tokens, reference: Tokens) -> list[torch.Tensor]:
    """Where tokens equal those of the reference, one row an image, of every scale."""
    shapes, expected = ([list(ids.shape) for ids in scales] for scales in (tokens, reference))
    if not shapes or shapes != expected:
        raise ValueError(
            f"`tokens` and `reference` must have the same scales but have the shapes {shapes} and {expected}."
        )
    return [(ids == others.to(ids.device)).flatten(1) for ids, others in zip(tokens, reference)]


def teacher_forced_nll(
    pipe: HackVARPipeline,
    tokens: torch.Tensor,
    inputs: Sequence[int | str],
    kv_budget: float | int | str | None = None,
    method: str | Method = DEFAULT_METHOD,
    batch_size: int = 32,
    attention_budget: float | int | str | None = None,
    kv_dtype: str | None = None,
) -> torch.Tensor:
    """
    What a model loses by compression, without the chaos of sampling: the negative log-likelihood of given tokens when
    every scale sees the true scales before it through a compressed cache.

    `-1/N sum_k sum_j ln p(token_j of scale k | true scales before k, input)`. The probabilities are those of the raw
    logits: no guidance, no temperature, no filter. With the full cache this is the training loss, the chain rule of
    next-scale prediction (arXiv 2404.02905, equation 5; for tokens made of bits, arXiv 2412.04431).

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
        tokens (`torch.Tensor`):
            Ids `[images, N]` or bits `[images, N, bits]`, all scales one after the other, as the image tokenizer's `tokenize`
            gives them for pictures.
        inputs (a list of `int` or `str`):
            Class or prompt of every image.
        kv_budget (`float`, `int` or `str`, *optional*):
            As in the pipeline's call. Bytes count one row an image here, because there is no guidance.
        method (`str` or [`Method`], *optional*, defaults to `"hack++"`):
            As in the pipeline's call.
        batch_size (`int`, *optional*, defaults to 32):
            Images that run together.
        attention_budget (`float`, `int` or `str`, *optional*):
            As in the pipeline's call.
        kv_dtype (`str`, *optional*):
            As in the pipeline's call.

    Returns:
        `torch.Tensor`: `[images]` in float64 on the CPU, nats per token.

    Raises:
        `ValueError`: if the tokens do not fit the model's schedule or the inputs, or the budget cannot be met.
    """
    check_tokens(pipe, tokens, inputs)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1 but is {batch_size}.")
    result = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(tokens), batch_size):
        cache = pipe.prepare_cache(kv_budget, attention_budget, method, kv_dtype, guided=False)
        part = slice(start, start + batch_size)
        result.append(nll_through(cache, pipe, tokens[part], inputs[part]))
    return torch.cat(result)


def check_tokens(pipe: HackVARPipeline, tokens: torch.Tensor, inputs: Sequence[int | str]):
    """
    Refuse tokens that do not belong to a model.

    Raises:
        `ValueError`: if they do not fit its schedule or the inputs.
    """
    schedule = pipe.schedule
    if tokens.ndim not in (2, 3) or tokens.shape[1] != schedule.total:
        raise ValueError(
            f"`tokens` must be [images, {schedule.total}] or [images, {schedule.total}, bits], all scales one after the "
            f"other, but are {list(tokens.shape)}."
        )
    if len(inputs) != len(tokens):
        raise ValueError(f"`inputs` must name one input an image but has {len(inputs)} for {len(tokens)} images.")


@torch.no_grad()
def nll_through(
    cache: Cache, pipe: HackVARPipeline, tokens: torch.Tensor, inputs: Sequence[int | str]
) -> torch.Tensor:
    """[`teacher_forced_nll`] of one batch through a fresh cache without guidance, which can report afterwards."""
    schedule = pipe.schedule
    condition = pipe.encode_inputs(inputs, guided=False)
    batch = tokens.to(condition.device)
    latents = pipe.prepare_latents(len(batch), schedule)
    scale_input, total = None, torch.zeros(len(batch), dtype=torch.float64)
    for step, true_tokens in enumerate(batch.split(schedule.lengths, dim=1)):
        logits = pipe.predict(step, scale_input, condition, cache)
        total -= pipe.log_likelihood(logits, true_tokens).double().sum(1).cpu()
        latents, scale_input = pipe.vae.accumulate(latents, true_tokens, step, schedule)
    return total / schedule.total
