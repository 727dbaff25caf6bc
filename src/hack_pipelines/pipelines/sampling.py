"""From logits to tokens, drawn as the original VAR draws them."""

import torch


def guide(logits: torch.Tensor, weight: float, guided: bool) -> torch.Tensor:
    """Classifier-free guidance `weight * cond - (weight - 1) * uncond` of rows that hold both, conditional ones first."""
    if not guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    # The original's order of operations: anything else changes the last bits.
    extra = weight - 1
    return (1 + extra) * conditional - extra * unconditional


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """
    Remove unlikely entries by setting them to minus infinity, first by rank, then by probability mass.

    Entries that tie with the k-th largest all survive. The running probability is taken in ascending order, and the
    largest entry always stays.

    Args:
        logits (`torch.Tensor`):
            `[..., vocab_size]`.
        top_k (`int`, *optional*, defaults to 0):
            Entries to keep; 0 keeps all.
        top_p (`float`, *optional*, defaults to 1.0):
            Probability mass to keep; 1 keeps all.

    Returns:
        `torch.Tensor`: filtered logits.
    """
    if top_k > 0:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1, descending=False)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def draw_tokens(
    logits: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """
    Draw one token a position.

    Args:
        logits (`torch.Tensor`):
            `[batch, tokens, vocab_size]`, filtered.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            One generator draws for the whole batch in one call, as the original does. With one generator an image, an
            image does not depend on its batch.

    Returns:
        `torch.Tensor`: ids `[batch, tokens]`.
    """
    if isinstance(generator, list):
        return torch.cat([draw_tokens(rows[None], entry) for rows, entry in zip(logits, generator)])
    probabilities = logits.softmax(-1).flatten(0, 1)
    device = probabilities.device if generator is None else generator.device
    drawn = torch.multinomial(probabilities.to(device), 1, replacement=True, generator=generator)
    return drawn.view(logits.shape[:2]).to(logits.device)


def gumbel_softmax(
    logits: torch.Tensor,
    temperature: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Weights over the vocabulary with Gumbel noise, `softmax((logits + g) / temperature)`.

    Args:
        logits (`torch.Tensor`):
            `[batch, tokens, vocab_size]`, filtered.
        temperature (`float`):
            The smaller, the harder the choice.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            As in [`draw_tokens`].
    """
    if isinstance(generator, list):
        return torch.cat([gumbel_softmax(rows[None], temperature, entry) for rows, entry in zip(logits, generator)])
    device = logits.device if generator is None else generator.device
    noise = -torch.empty(logits.shape, device=device).exponential_(generator=generator).log()
    return ((logits + noise.to(logits.device)) / temperature).softmax(-1)
