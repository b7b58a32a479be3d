"""The trainable text transformer of the first text-to-image models: a pre-norm encoder over learned token embeddings."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import GEGLU, FeedForward
from taming.modules.attention import attention
from taming.util import default, nearest

__all__ = [
    "GEGLU",
    "AbsolutePositionalEmbedding",
    "Attention",
    "AttentionLayers",
    "Encoder",
    "FeedForward",
    "TransformerWrapper",
]

HEAD_WIDTH = 64


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector for each position, counted from 0 at each call.

    Args:
        dim: width.
        max_seq_len: number of positions.
    """

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, n, …) → (1, n, dim).

        Raises:
            ValueError: more tokens than positions.
        """
        n = x.shape[1]
        if n > self.emb.num_embeddings:
            raise ValueError(
                f"{n} tokens for {self.emb.num_embeddings} positions (max_seq_len); shorten the text or build a longer model"
            )
        return self.emb(torch.arange(n, device=x.device))[None]


class Attention(nn.Module):
    """Multi-head self-attention without biases before the scores.

    Args:
        dim: width in and out.
        dim_head, heads: width and number of heads.
        dropout: rate on the attention probabilities in training.
    """

    def __init__(self, dim: int, dim_head: int = HEAD_WIDTH, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        inner = dim_head * heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (b, n, dim).
            mask: (b, n), True for real tokens; as published it holds for queries and keys alike.

        Returns:
            (b, n, dim)
        """
        pairs = (
            None if mask is None else rearrange(mask, "b i -> b 1 i 1") & rearrange(mask, "b j -> b 1 1 j")
        )
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.training and self.dropout.p > 0:
            return self.to_out(
                self._merge(self.dropout(self.scores(q, k, pairs).softmax(dim=-1)) @ self._split(v))
            )
        return self.to_out(attention(q, k, v, self.heads, pairs))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return rearrange(x, "b h n d -> b n (h d)")

    def scores(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        """Scaled products (b, heads, n, n), for dropout and for looking at; the fast path never makes them."""
        scores = self._split(q) @ self._split(k).transpose(-1, -2) * self.scale
        return scores if pairs is None else scores.masked_fill(~pairs, -torch.finfo(scores.dtype).max)

    def maps(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention probabilities (b, heads, n, n)."""
        pairs = (
            None if mask is None else rearrange(mask, "b i -> b 1 i 1") & rearrange(mask, "b j -> b 1 1 j")
        )
        return self.scores(self.to_q(x), self.to_k(x), pairs).softmax(dim=-1)


class AttentionLayers(nn.Module):
    """Alternating attention and feed-forward layers, each normalised first and added to its input.

    Args:
        dim: width.
        depth: pairs of layers.
        heads: attention heads.
        causal: must be False; only encoders are used here.
        options: `ff_mult`, `ff_glu`, `ff_dropout` for the feed-forward networks, `attn_dim_head`, `attn_dropout` for the
            attentions.

    Raises:
        ValueError: an unknown option.
    """

    FF_OPTIONS = ("mult", "glu", "dropout")
    ATTENTION_OPTIONS = ("dim_head", "dropout")

    def __init__(self, dim: int, depth: int, heads: int = 8, causal: bool = False, **options: Any) -> None:
        super().__init__()
        if causal:
            raise ValueError("causal=True: only the encoder of x-transformers is part of this library")
        known = [f"ff_{o}" for o in self.FF_OPTIONS] + [f"attn_{o}" for o in self.ATTENTION_OPTIONS]
        for name in options:
            if name not in known:
                raise ValueError(f"AttentionLayers has no option {name!r}. {nearest(name, known)}")
        ff = {k.removeprefix("ff_"): v for k, v in options.items() if k.startswith("ff_")}
        attn = {k.removeprefix("attn_"): v for k, v in options.items() if k.startswith("attn_")}
        self.dim, self.depth = dim, depth
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads=heads, **attn)]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), FeedForward(dim, **ff)]))

    def forward(self, x: Tensor, mask: Tensor | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """(b, n, dim), mask (b, n) → (b, n, dim); attention probabilities are appended to `maps` if given."""
        pair: Any
        for pair in self.layers:
            norm, layer = pair
            h = norm(x)
            if isinstance(layer, Attention):
                if maps is not None:
                    maps.append(layer.maps(h, mask))
                h = layer(h, mask)
            else:
                h = layer(h)
            x = x + h
        return x


class Encoder(AttentionLayers):
    """`AttentionLayers` in which every token sees every other."""


class TransformerWrapper(nn.Module):
    """Tokens to embeddings, through the layers, to a final norm and logits.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: number of positions.
        attn_layers: the layers.
        emb_dim: width of the token embeddings; as the layers' if None.
        emb_dropout: rate on the sum of token and position embeddings.
        tie_embedding: logits from the token embeddings' own weights.
        use_pos_emb: add position embeddings.

    Source: Vaswani et al. 2017, with the layer norms moved before the layers (Xiong et al. 2020).
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        emb_dropout: float = 0.0,
        tie_embedding: bool = False,
        use_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        emb_dim = default(emb_dim, dim)
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len) if use_pos_emb else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embedding else nn.Linear(dim, num_tokens)

    def forward(
        self,
        x: Tensor,
        return_embeddings: bool = False,
        mask: Tensor | None = None,
        return_attn: bool = False,
    ) -> Any:
        """Run the transformer.

        Args:
            x: token ids (b, n).
            return_embeddings: stop before the logits.
            mask: (b, n), True for real tokens.
            return_attn: also return the attention probabilities, a list of (b, heads, n, n).

        Returns:
            Logits (b, n, num_tokens) or embeddings (b, n, dim).
        """
        maps: list[Tensor] | None = [] if return_attn else None
        h = self.token_emb(x)
        if self.pos_emb is not None:
            h = h + self.pos_emb(x)
        h = self.norm(self.attn_layers(self.project_emb(self.emb_dropout(h)), mask, maps))
        if not return_embeddings:
            h = self.to_logits(h) if self.to_logits is not None else h @ self.token_emb.weight.t()
        return (h, maps) if return_attn else h
