"""Drawing tokens from a transformer, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taming.modules.transformer.cache import NextToken

logger = logging.getLogger(__name__)


class ContextError(AssertionError, IndexError):
    """More tokens than a transformer's block holds (both published error classes)."""


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """Logits (…, vocab) with all but the `k` largest at -inf; those equal to the k-th stay, too."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p_logits(logits: Tensor, p: float) -> Tensor:
    """Logits (…, vocab) with all at -inf but the likeliest ones that reach probability `p` together.

    The first one that passes `p` stays, so at least one does.

    Source: Holtzman et al. 2020 (nucleus sampling), section 3.1.
    """
    ordered, places = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = torch.zeros_like(probabilities)
    before[..., 1:] = probabilities.cumsum(dim=-1)[..., :-1]
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before > p)
    return logits.masked_fill(drop, -torch.inf)


@dataclass(frozen=True)
class Draw:
    """How a token is picked from logits.

    Args:
        temperature: logits are divided by it, above 0.
        top_k: draw among the k likeliest; None or 0 for all.
        top_p: draw among the likeliest that reach this probability together; None or 1 for all.
        sample: draw by chance; False takes the likeliest.
        generator: source of randomness; None takes PyTorch's global one.
        vocabulary: draw among the first so many tokens, those that are codes; None for all.

    Raises:
        ValueError: an option out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    sample: bool = True
    generator: torch.Generator | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0; for the likeliest token say sample=False"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or 0 or None for all tokens")
        if self.top_p is not None and self.top_p < 0:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1, or be None for all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (…, vocab) → probabilities, filtered first by k, then by p."""
        logits = logits.float() / self.temperature
        if self.top_k:
            logits = top_k_logits(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1.0:
            logits = top_p_logits(logits, self.top_p)
        return logits.softmax(dim=-1)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (b, vocab) → tokens (b, 1); one call of `torch.multinomial` if drawn by chance."""
        logits = logits[..., : self.vocabulary]
        if not self.sample:
            return logits.argmax(dim=-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Logits pushed away from what the model says without the condition: u + scale (c - u).

    Args:
        logits: (2 b, vocab), those with the condition, c, then those without it, u.
        scale: 1 gives c, 0 gives u.

    Returns:
        (b, vocab)

    Source: Ho & Salimans 2022, equation 6, for tokens as in Sun et al. 2024 (LlamaGen), section 2.2.
    """
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def check_room(model: Any, tokens: int) -> None:
    """Refuse to feed more tokens than a model's block holds.

    Raises:
        ContextError: too many.
    """
    block_size = getattr(model, "block_size", None)
    if block_size is not None and tokens > block_size:
        raise ContextError(
            f"{tokens} tokens would be fed to a transformer whose block holds {block_size}: draw fewer, give a shorter "
            "prompt, or slide a window (taming.models.sliding_window)"
        )


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    sample: bool = True,
    guidance: float = 1.0,
    null_prompt: Tensor | None = None,
    embeddings: Tensor | None = None,
    crop: bool = False,
    generator: torch.Generator | None = None,
    vocabulary: int | None = None,
    progress: bool = False,
    callback: Callable[[int], Any] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Continue sequences: the prompt in one pass, then token by token from a cache of keys and values.

    Args:
        model: a GPT in eval mode, or anything that maps tokens (b, n) to (logits (b, n, vocab), …).
        prompt: tokens (b, n); n may be 0 behind `embeddings`.
        steps: number of tokens to draw.
        temperature, top_k, top_p, sample, generator, vocabulary: see `Draw`.
        guidance: strength of classifier-free guidance; 1 for none. Guided sampling runs twice the batch.
        null_prompt: (b, n), the prompt without its condition; needed if `guidance` is not 1.
        embeddings: (b, m, c), vectors before the prompt.
        crop: read only the last `block_size` tokens where there are more (slow: nothing can be kept then).
        progress: show a bar.
        callback: called with the number of each step before it.
        compiled: compile the one-token step; worth it for many tokens on a GPU.

    Returns:
        The new tokens, (b, steps).

    Raises:
        ContextError: prompt and new tokens exceed the model's block, without `crop`.
        ValueError: an option out of range, or nothing to begin with.
    """
    draw = Draw(temperature, top_k, top_p, sample, generator, vocabulary)
    before = 0 if embeddings is None else embeddings.shape[1]
    (batch, given), total = prompt.shape, before + prompt.shape[1] + max(steps, 1) - 1
    _check_prompt(prompt, steps, before, guidance, null_prompt)
    if not crop:
        check_room(model, total)
    guided = guidance != 1.0 and null_prompt is not None
    rows = [prompt, null_prompt] if guided else [prompt]
    tokens = torch.empty(len(rows), batch, given + steps, dtype=torch.long, device=prompt.device)
    tokens[:, :, :given] = torch.stack(rows)  # type: ignore[arg-type]
    flat = tokens.flatten(0, 1)
    if embeddings is not None:
        embeddings = embeddings.repeat(len(rows), 1, 1)
    stream = NextToken(model, len(flat), total, compiled)
    for step in tqdm(range(steps), desc="tokens", disable=not progress):
        if callback is not None:
            callback(step)
        logits = stream(flat[:, : given + step], embeddings)
        if guided:
            logits = guide(logits, guidance)
        tokens[:, :, given + step] = draw(logits)[:, 0]
    return tokens[0, :, given:].clone()


def _check_prompt(
    prompt: Tensor, steps: int, before: int, guidance: float, null_prompt: Tensor | None
) -> None:
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    if before + prompt.shape[1] == 0:
        raise ValueError("there is nothing to continue: give at least one token (a class or a start token)")
    if guidance != 1.0 and (null_prompt is None or null_prompt.shape != prompt.shape):
        raise ValueError(
            f"guidance={guidance} compares with a prompt that lacks the condition: null_prompt must be "
            f"{tuple(prompt.shape)}, not {None if null_prompt is None else tuple(null_prompt.shape)}"
        )


def sample(
    model: Any,
    x: Tensor,
    steps: int,
    temperature: float = 1.0,
    sample: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Continue sequences; context beyond the block is cut off at the front. Puts the model into eval mode.

    Args:
        model: a GPT.
        x: tokens (b, n).
        steps: number of tokens to add.
        temperature, sample, top_k: see `Draw`.

    Returns:
        The prompt and the new tokens, (b, n + steps).
    """
    model.eval()
    new = generate(model, x, steps, temperature=temperature, sample=sample, top_k=top_k, crop=True)
    return torch.cat([x, new], dim=1)


def sample_with_past(
    x: Tensor,
    model: Any,
    steps: int,
    temperature: float = 1.0,
    sample_logits: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[int], Any] | None = None,
) -> Tensor:
    """Continue sequences within the block. Mind the order of the arguments, which `sample` has otherwise.

    Args:
        x: tokens (b, n).
        model: a GPT in eval mode.
        steps: number of tokens to draw.
        temperature, top_k, top_p: see `Draw`; as published, `top_p` counts only if `top_k` is given (0 for all tokens).
        sample_logits: draw by chance; False takes the likeliest.
        callback: called with the number of each step before it.

    Returns:
        The new tokens alone, (b, steps).

    Raises:
        ContextError: prompt and new tokens exceed the model's block.
    """
    if top_k is None and top_p is not None and top_p < 1.0:
        logger.warning("top_p=%s is ignored, as published, unless top_k is given; top_k=0 means all", top_p)
        top_p = None
    return generate(
        model, x, steps, temperature=temperature, sample=sample_logits, top_k=top_k, top_p=top_p, callback=callback
    )  # fmt: skip
