"""Keys and values of tokens already seen, and the stream of next-token predictions that they make cheap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# a layer's keys and values of new tokens (b, n, c) → all keys and values to attend to (b, m, c)
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KeyValueCache:
    """The keys and values of every layer, in one tensor that is allocated once and filled in place.

    Args:
        n_layer: layers.
        batch_size: sequences.
        length: most tokens it can hold.
        n_embd: width of a key and of a value, over all heads.
        dtype, device: of the tensor.

    Attributes:
        entries: (n_layer, 2, batch_size, length, n_embd), keys then values.
        filled: number of tokens it holds.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        length: int,
        n_embd: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.entries = torch.zeros(n_layer, 2, batch_size, length, n_embd, dtype=dtype, device=device)
        self.filled = 0

    @property
    def length(self) -> int:
        """Most tokens it can hold."""
        return self.entries.shape[3]

    def layers(self, tokens: int) -> list[Remember]:
        """For each layer, what stores `tokens` more tokens behind those held and returns all."""
        if self.filled + tokens > self.length:
            raise ValueError(
                f"the cache holds {self.filled} of at most {self.length} tokens: {tokens} more do not fit"
            )
        stop = self.filled + tokens
        return [partial(_append, slot[:, :, :stop], self.filled) for slot in self.entries]


def _append(slot: Tensor, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Write behind the first `start` tokens of (2, b, stop, c); only what is filled is returned."""
    slot[0, :, start:], slot[1, :, start:] = keys, values
    return slot[0], slot[1]


def place(slot: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Write at `position` (1,) of (2, b, length, c); all is returned, for the caller to mask: shapes never change."""
    return slot[0].index_copy_(1, position, keys), slot[1].index_copy_(1, position, values)


class CompiledStep:
    """A model's one-token step under `torch.compile` (CUDA graphs on a GPU) with a cache of fixed shape."""

    kept: WeakKeyDictionary[nn.Module, CompiledStep] = WeakKeyDictionary()

    def __init__(self, model: Any, batch_size: int) -> None:
        self.cache = model.new_cache(batch_size, model.block_size)
        self.position = torch.zeros(1, dtype=torch.long, device=self.cache.entries.device)
        for static in (self.cache.entries, self.position):
            torch._dynamo.mark_static_address(static)  # CUDA graphs may write into them
        # the function, not the bound method: what `kept` holds must not keep the model alive
        self.step = torch.compile(type(model).step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @classmethod
    def of(cls, model: Any, batch_size: int) -> CompiledStep:
        """The model's compiled step, made anew only if the batch size, the number type or the device has changed."""
        known, fresh = cls.kept.get(model), model.new_cache(batch_size, 0).entries
        if known is None or known.key() != (batch_size, fresh.dtype, fresh.device):
            known = cls.kept[model] = cls(model, batch_size)
        known.cache.filled = 0
        return known

    def key(self) -> tuple[int, torch.dtype, torch.device]:
        """Batch size, number type and device."""
        entries = self.cache.entries
        return entries.shape[2], entries.dtype, entries.device

    def __call__(self, model: Any, token: Tensor) -> Tensor:
        """Logits (b, vocab) after one more token (b, 1)."""
        self.position.fill_(self.cache.filled)
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.step(model, token, self.position, self.cache.entries)
        self.cache.filled += 1
        return logits


class NextToken:
    """Logits of the next token of growing sequences.

    Call it with the whole sequences so far; what it has seen at the last call is not computed again. A model without
    a cache, and a sequence longer than the model's block (of which the last part is read), are computed in full.

    Args:
        model: a GPT, or anything that maps tokens (b, n) to (logits (b, n, vocab), …).
        batch_size: sequences.
        length: most tokens that will be fed.
        compiled: compile the one-token step.

    Raises:
        ValueError: `compiled`, but the model has no cache.
    """

    def __init__(self, model: Any, batch_size: int, length: int, compiled: bool = False) -> None:
        self.model = model
        self.block_size = getattr(model, "block_size", None)
        self.cache: KeyValueCache | None = None
        self.compiled: CompiledStep | None = None
        if compiled:
            if not caches(model):
                raise ValueError(f"{type(model).__name__} has no cache, so there is no step to compile")
            self.compiled = CompiledStep.of(model, batch_size)
            self.cache = self.compiled.cache
        elif caches(model):
            self.cache = model.new_cache(batch_size, min(length, model.block_size))

    def forget(self) -> None:
        """Begin other sequences."""
        if self.cache is not None:
            self.cache.filled = 0

    def __call__(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Logits (b, vocab) of the token after `tokens`, (b, n), which follow `embeddings`, (b, m, c), if given."""
        before = 0 if embeddings is None else embeddings.shape[1]
        total = before + tokens.shape[1]
        if self.cache is None or total > self.cache.length or total < self.model.n_unmasked:
            # the first n_unmasked tokens see later ones: until all are there, nothing computed can be kept
            recent = tokens if self.block_size is None else tokens[:, -self.block_size :]
            return self.model(recent, **({} if embeddings is None else {"embeddings": embeddings}))[0][:, -1]
        if self.cache.filled == 0:
            return self.model.extend(tokens, self.cache, embeddings)
        fresh = tokens[:, self.cache.filled - before :]
        if self.compiled is not None and fresh.shape[1] == 1:
            return self.compiled(self.model, fresh)
        return self.model.extend(fresh, self.cache)


def caches(model: Any) -> bool:
    """Whether a model can carry its keys and values on: a GPT whose forward pass is the published one."""
    return hasattr(model, "new_cache") and getattr(type(model), "cached_forward", None) is type(model).forward
