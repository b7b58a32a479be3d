"""GPT: a transformer that predicts each token from those before it (Radford et al. 2019)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.attention import attention
from taming.modules.transformer.cache import KeyValueCache, Remember, place
from taming.modules.transformer.kmeans import KMeans
from taming.modules.transformer.sampling import (
    ContextError,
    check_room,
    generate,
    sample,
    sample_with_past,
    top_k_logits,
)
from taming.util import count_params

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "CodeGPT",
    "ContextError",
    "DummyGPT",
    "GPT1Config",
    "GPTConfig",
    "KMeans",
    "generate",
    "sample",
    "sample_with_past",
    "top_k_logits",
]

logger = logging.getLogger(__name__)


class GPTConfig:
    """Sizes of a GPT; further ones are given by name.

    Args:
        vocab_size: number of tokens.
        block_size: most tokens it can see.
        kwargs: n_layer, n_head, n_embd, n_unmasked and dropout probabilities.
    """

    embd_pdrop = 0.1
    resid_pdrop = 0.1
    attn_pdrop = 0.1
    n_layer: int
    n_head: int
    n_embd: int
    n_unmasked: int = 0

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        for name, value in kwargs.items():
            setattr(self, name, value)


class GPT1Config(GPTConfig):
    """The first GPT: 12 layers, 12 heads, 768 channels."""

    n_layer = 12
    n_head = 12
    n_embd = 768


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and those before it; the first `n_unmasked` tokens all see one another.

    The mask is a buffer since published checkpoints hold it; a loaded one decides.

    Args:
        config: sizes.

    Raises:
        ValueError: n_embd is no multiple of n_head.
    """

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, block_size = config.n_embd, config.block_size
        if width % config.n_head:
            raise ValueError(f"n_embd={width} must be a multiple of n_head={config.n_head}")
        self.n_head = config.n_head
        self.n_unmasked = config.n_unmasked
        self.attn_pdrop = config.attn_pdrop
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(width, width)
        mask = torch.ones(block_size, block_size).tril()
        mask[: self.n_unmasked, : self.n_unmasked] = 1
        self.register_buffer("mask", mask[None, None])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        mask = state_dict.get(prefix + "mask")
        if mask is not None and not mask.is_meta and mask.shape == self.mask.shape:
            seen_by_first = int(mask[0, 0, 0].sum())
            self.n_unmasked = seen_by_first if seen_by_first > 1 else 0

    def sight(self, start: int, stop: int) -> dict[str, Any]:
        """Options of `attention` for the tokens from `start` to `stop` that look at all up to `stop`."""
        if stop - start == 1 and start >= self.n_unmasked:
            return {}
        if start == 0 and (self.n_unmasked <= 1 or stop == 1):
            return {"causal": True}
        return {"mask": self.mask[:, :, start:stop, :stop] > 0}

    def forward(
        self, x: Tensor, layer_past: Any = None, present: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (b, n, c).
            layer_past: keys and values before x, a pair of (b, heads, m, c / heads) or both stacked; x sees all of them
                and all of itself.
            present: also return the keys and values of x.

        Returns:
            (b, n, c), and the keys and values stacked as (2, b, heads, n, c / heads) or None.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        new = torch.stack([k, v]) if present else None
        if layer_past is None:
            sight = self.sight(0, x.shape[1])
        else:
            sight = {}
            k, v = (
                torch.cat([rearrange(past, "b h m d -> b m (h d)"), now], dim=1)
                for past, now in zip(layer_past, (k, v), strict=True)
            )
        dropout = self.attn_pdrop if self.training else 0.0
        y = self.resid_drop(self.proj(attention(q, k, v, self.n_head, dropout=dropout, **sight)))
        return y, None if new is None else rearrange(new, "s b n (h d) -> s b h n d", h=self.n_head)

    def cached(self, x: Tensor, remember: Remember, sight: Mapping[str, Any]) -> Tensor:
        """Attend from x, (b, n, c), to what `remember` returns for its keys and values."""
        k, v = remember(self.key(x), self.value(x))
        return self.proj(attention(self.query(x), k, v, self.n_head, **sight))


class Block(nn.Module):
    """Attention, then a two-layer network, each on normalised input and added to it.

    Args:
        config: sizes.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, x: Tensor, layer_past: Any = None, return_present: bool = False) -> Any:
        """(b, n, c) → (b, n, c); with `layer_past` or `return_present` also the keys and values, see `CausalSelfAttention`."""
        if return_present and self.training:
            raise AssertionError("keys and values are handed on in eval mode only")
        wanted = layer_past is not None or return_present
        y, present = self.attn(self.ln1(x), layer_past, present=wanted)
        x = x + y
        x = x + self.mlp(self.ln2(x))
        return (x, present) if wanted else x

    def cached(self, x: Tensor, remember: Remember, sight: Mapping[str, Any]) -> Tensor:
        """(b, n, c) → (b, n, c), with keys and values kept by `remember`."""
        x = x + self.attn.cached(self.ln1(x), remember, sight)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A GPT over tokens, with learned positions.

    Args:
        vocab_size: number of tokens.
        block_size: most tokens it can see.
        n_layer: blocks.
        n_head: heads of attention.
        n_embd: channels.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout of the embedded tokens, of what is added, of attention weights.
        n_unmasked: the first so many tokens (a condition) see one another in both directions.

    Example:
        >>> model = GPT(vocab_size=16, block_size=8, n_layer=1, n_head=2, n_embd=8)
        >>> logits, loss = model(torch.tensor([[3, 1, 4]]), targets=torch.tensor([[1, 4, 1]]))
        >>> tuple(logits.shape)
        (1, 3, 16)
    """

    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int = 12, n_head: int = 8, n_embd: int = 256,
        embd_pdrop: float = 0.0, resid_pdrop: float = 0.0, attn_pdrop: float = 0.0, n_unmasked: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        config = GPTConfig(
            vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
            embd_pdrop=embd_pdrop, resid_pdrop=resid_pdrop, attn_pdrop=attn_pdrop, n_unmasked=n_unmasked,
        )  # fmt: skip
        self.build(config, nn.Embedding(vocab_size, n_embd))

    def build(self, config: GPTConfig, tok_emb: nn.Module) -> None:
        """Make the layers over a given embedding of what comes in, and initialise them."""
        self.tok_emb = tok_emb
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.config = config
        self.block_size = config.block_size
        self.apply(_initialise)
        logger.info("%s with %.2f M parameters.", type(self).__name__, count_params(self) * 1e-6)

    def get_block_size(self) -> int:
        """Most tokens it can see."""
        return self.block_size

    @property
    def n_unmasked(self) -> int:
        """How many first tokens see one another; a loaded checkpoint decides."""
        return cast(Block, self.blocks[0]).attn.n_unmasked if len(self.blocks) else 0

    def embed(self, idx: Tensor, embeddings: Tensor | None, start: int) -> Tensor:
        """Tokens (b, n) behind vectors (b, m, c) → (b, m + n, c) with the positions from `start` on added.

        Raises:
            ContextError: more than the block holds.
            IndexError: a token that the vocabulary lacks.
        """
        try:
            x = self.tok_emb(idx)
        except IndexError as error:
            raise IndexError(
                f"tokens from {int(idx.min())} to {int(idx.max())} came in, but the transformer's vocab_size is "
                f"{self.config.vocab_size}: codes, classes and the start token all need a row"
            ) from error
        if embeddings is not None:
            x = torch.cat([embeddings, x], dim=1)
        stop = start + x.shape[1]
        check_room(self, stop)
        return self.drop(x + self.pos_emb[:, start:stop])

    def judge(self, x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(b, n, c) → logits (b, n, vocab), and their mean cross-entropy in nats if there are targets (b, n)."""
        logits = self.head(self.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(
        self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict each next token.

        Args:
            idx: tokens (b, n).
            embeddings: (b, m, n_embd), vectors that stand before the tokens.
            targets: (b, m + n), the right next tokens.

        Returns:
            Logits (b, m + n, vocab_size), and the mean cross-entropy in nats or None.

        Raises:
            ContextError: m + n is more than the block holds (an AssertionError, as published).
        """
        x = self.embed(idx, embeddings, 0)
        for block in self.blocks:
            x = block(x)
        return self.judge(x, targets)

    cached_forward = (
        forward  # what `extend` and `step` agree with: a subclass with another forward is sampled without
    )

    def forward_with_past(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        past_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The published interface of cached prediction, in eval mode; `generate` does without its copies.

        Args:
            idx: tokens (b, n), or one token (b, 1) if there is a past.
            embeddings: (b, m, n_embd), vectors that stand before the tokens.
            targets: the right next tokens.
            past: what earlier calls returned, in order.
            past_length: number of tokens in the past.

        Returns:
            Logits, loss or None, and keys and values of the new tokens, (n_layer, 2, b, heads, n, n_embd / heads).
        """
        if self.training:
            raise AssertionError("forward_with_past works in eval mode only: call model.eval() first")
        layers: Any = [None] * len(self.blocks)
        if past is not None:
            if past_length is None or idx.shape[1] != 1 or embeddings is not None:
                raise AssertionError("with a past, give past_length and one token at a time, (b, 1)")
            layers = torch.cat(list(past), dim=-2)
        x = self.embed(idx, embeddings, 0 if past is None else cast(int, past_length))
        presents = []
        for block, layer_past in zip(self.blocks, layers, strict=True):
            x, present = block(x, layer_past=layer_past, return_present=True)
            presents.append(present)
        return *self.judge(x, targets), torch.stack(presents)

    # --------------------------------------------------------------------------------------- with a cache

    def new_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """An empty cache for `length` tokens, in the number type in which keys are computed now."""
        weight = self.head.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        size = (len(self.blocks), batch_size, length, self.config.n_embd)
        return KeyValueCache(*size, dtype=dtype, device=weight.device)

    def extend(self, idx: Tensor, cache: KeyValueCache, embeddings: Tensor | None = None) -> Tensor:
        """Feed tokens (b, n), behind vectors (b, m, c) if given, after those in the cache, which then holds them, too.

        Returns:
            Logits of the next token, (b, vocab_size): those of `forward` at the last position.
        """
        x = self.embed(idx, embeddings, cache.filled)
        tokens = x.shape[1]
        layers = cache.layers(tokens)
        sight = cast(Block, self.blocks[0]).attn.sight(cache.filled, cache.filled + tokens) if layers else {}
        for block, remember in zip(self.blocks, layers, strict=True):
            x = cast(Block, block).cached(x, remember, sight)
        cache.filled += tokens
        return self.head(self.ln_f(x[:, -1]))

    def step(self, token: Tensor, position: Tensor, entries: Tensor) -> Tensor:
        """`extend` by one token, with shapes that never change, for `torch.compile` and CUDA graphs.

        Args:
            token: (b, 1).
            position: (1,), number of tokens in the cache.
            entries: a cache's tensor; written to.

        Returns:
            Logits of the next token, (b, vocab_size).
        """
        x = self.drop(self.tok_emb(token) + self.pos_emb.index_select(1, position))
        visible = (torch.arange(entries.shape[3], device=entries.device) <= position)[None, None, None]
        for block, slot in zip(self.blocks, entries.unbind(0), strict=True):
            x = cast(Block, block).cached(x, partial(place, slot, position), {"mask": visible})
        return self.head(self.ln_f(x[:, -1]))


def _initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, no biases; normalisation starts as the identity."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(cast(Tensor, module.bias))
    elif isinstance(module, nn.LayerNorm):
        nn.init.zeros_(module.bias)
        nn.init.ones_(module.weight)


class CodeGPT(GPT):
    """A GPT that reads vectors, such as latents, instead of tokens.

    Args:
        vocab_size: number of tokens to predict.
        block_size: most vectors it can see.
        in_channels: channels of a vector.
        n_layer, n_head, n_embd, embd_pdrop, resid_pdrop, attn_pdrop, n_unmasked: see `GPT`.
    """

    def __init__(
        self, vocab_size: int, block_size: int, in_channels: int, n_layer: int = 12, n_head: int = 8, n_embd: int = 256,
        embd_pdrop: float = 0.0, resid_pdrop: float = 0.0, attn_pdrop: float = 0.0, n_unmasked: int = 0,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        config = GPTConfig(
            vocab_size=vocab_size, block_size=block_size, in_channels=in_channels, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
            embd_pdrop=embd_pdrop, resid_pdrop=resid_pdrop, attn_pdrop=attn_pdrop, n_unmasked=n_unmasked,
        )  # fmt: skip
        self.build(config, nn.Linear(in_channels, n_embd))


class DummyGPT(nn.Module):
    """Adds a number to each token: a stand-in for tests.

    Args:
        add_value: the number.
    """

    def __init__(self, add_value: int = 1) -> None:
        super().__init__()
        self.add_value = add_value

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """Tokens → tokens plus the number, None."""
        return idx + self.add_value, None
