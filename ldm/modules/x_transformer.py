"""The text transformer of the first text-to-image models, and the variants of it that its options name.

By default it is a pre-norm encoder over learned token and position embeddings, each layer added to its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.modules.attention import GEGLU, FeedForward
from ldm.modules.x_transformer_variants import (
    CROSS,
    FEED,
    SELF,
    AbsolutePositionalEmbedding,
    FixedPositionalEmbedding,
    GRUGating,
    Residual,
    Rezero,
    RMSNorm,
    Scale,
    ScaleNorm,
    layer_types,
)
from taming.modules.attention import attention
from taming.util import default, nearest

__all__ = [
    "GEGLU", "AbsolutePositionalEmbedding", "Attention", "AttentionLayers", "Encoder", "FeedForward", "FixedPositionalEmbedding",
    "GRUGating", "Intermediates", "LayerIntermediates", "RMSNorm", "Residual", "Rezero", "Scale", "ScaleNorm", "TransformerWrapper",
]  # fmt: skip

HEAD_WIDTH = 64


class Intermediates(NamedTuple):
    """Scores before (and without) masks, and probabilities, each (b, heads, n, m); None where nobody asked for them."""

    pre_softmax_attn: Tensor | None = None
    post_softmax_attn: Tensor | None = None


@dataclass
class LayerIntermediates:
    """What went into each self-attention layer (before its norm), and `Intermediates` of each attention."""

    hiddens: list[Tensor] = field(default_factory=list)
    attn_intermediates: list[Intermediates] = field(default_factory=list)


class Attention(nn.Module):
    """Multi-head attention without biases before the scores, over the tokens themselves or over a context.

    Args:
        dim: width in and out, and of a context.
        dim_head, heads: width and number of heads.
        causal: a token sees none after itself.
        talking_heads: mix the heads' scores, and their probabilities (Shazeer et al. 2020).
        sparse_topk: keep so many scores for each query (Zhao et al. 2019, "Explicit Sparse Transformer").
        num_mem_kv: so many learned keys and values that all queries see (Sukhbaatar et al. 2019).
        dropout: rate on the attention probabilities in training.
        on_attn: gate the result by itself (Huang et al. 2019, "Attention on Attention").
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = HEAD_WIDTH,
        heads: int = 8,
        causal: bool = False,
        talking_heads: bool = False,
        sparse_topk: int | None = None,
        num_mem_kv: int = 0,
        dropout: float = 0.0,
        on_attn: bool = False,
    ) -> None:
        super().__init__()
        if sparse_topk is not None and sparse_topk < 1:
            raise ValueError(f"sparse_topk={sparse_topk}: a query must keep at least one score")
        self.scale, self.heads, self.causal = dim_head**-0.5, heads, causal
        self.talking_heads, self.sparse_topk, self.num_mem_kv = talking_heads, sparse_topk, num_mem_kv
        inner = dim_head * heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        if talking_heads:
            self.pre_softmax_proj = nn.Parameter(torch.randn(heads, heads))
            self.post_softmax_proj = nn.Parameter(torch.randn(heads, heads))
        if num_mem_kv:
            self.mem_k = nn.Parameter(torch.randn(heads, num_mem_kv, dim_head))
            self.mem_v = nn.Parameter(torch.randn(heads, num_mem_kv, dim_head))
        self.to_out: nn.Module = (
            nn.Sequential(nn.Linear(inner, dim * 2), nn.GLU()) if on_attn else nn.Linear(inner, dim)
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        sinusoidal_emb: nn.Module | None = None,
        prev_attn: Tensor | None = None,
        mem: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Intermediates]:
        """Attend.

        Args:
            x: (b, n, dim).
            context: (b, m, dim) to look at instead of x.
            mask: (b, n), True for real tokens; as published it holds for queries and keys alike.
            context_mask: (b, m), the same for the context.
            sinusoidal_emb: gives positions that are added to what queries and keys are made of, but not to the values.
            prev_attn: scores to add, of a layer before.
            mem: (b, k, dim), tokens of an earlier call, seen before those of x.
            keep: return scores and probabilities.

        Returns:
            (b, n, dim), and the `Intermediates`.

        Raises:
            ValueError: a context of another width.
        """
        source = default(context, x)
        if source.shape[-1] != self.to_k.in_features:
            raise ValueError(
                f"the context has width {source.shape[-1]}, but this attention was built for dim={self.to_k.in_features}"
            )
        allowed = self._allowed(x, source, mask, mask if context is None else context_mask, mem)
        if mem is not None:
            source = torch.cat([mem, source], dim=1)
        queries, keys = x, source
        if sinusoidal_emb is not None:
            queries = queries + sinusoidal_emb(queries, offset=keys.shape[1] - queries.shape[1])
            keys = keys + sinusoidal_emb(keys)
        q, k, v = self.to_q(queries), self.to_k(keys), self.to_v(source)
        if self.num_mem_kv:
            k, v = (
                torch.cat([repeat(learned, "h n d -> b n (h d)", b=len(x)), own], dim=1)
                for learned, own in ((self.mem_k, k), (self.mem_v, v))
            )
        if keep or prev_attn is not None or self.talking_heads or self.sparse_topk:
            out, seen = self._explicit(q, k, v, allowed, prev_attn)
            return self.to_out(out), seen
        dropout = self.dropout.p if self.training else 0.0
        return self.to_out(attention(q, k, v, self.heads, allowed, dropout=dropout)), Intermediates()

    def _allowed(
        self, x: Tensor, source: Tensor, mask: Tensor | None, key_mask: Tensor | None, mem: Tensor | None
    ) -> Tensor | None:
        """Which query may see which key, (b or 1, 1, n, m), True for yes; every memory is seen. None if all see all."""
        n, m = x.shape[1], source.shape[1]
        pairs = None
        if mask is not None or key_mask is not None:
            rows, columns = (
                torch.ones(len(x), length, dtype=torch.bool, device=x.device) if given is None else given
                for given, length in ((mask, n), (key_mask, m))
            )
            pairs = rearrange(rows, "b i -> b 1 i 1") & rearrange(columns, "b j -> b 1 1 j")
        if self.causal:
            earlier = torch.ones(1, 1, n, m, dtype=torch.bool, device=x.device).tril(m - n)
            pairs = earlier if pairs is None else pairs & earlier
        remembered = self.num_mem_kv + (0 if mem is None else mem.shape[1])
        return pairs if pairs is None else F.pad(pairs, (remembered, 0), value=True)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, prev_attn: Tensor | None
    ) -> tuple[Tensor, Intermediates]:
        """Attention with its scores written out, for the variants that change them and for looking at them."""
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * self.scale  # (b, heads, n, m)
        if prev_attn is not None:
            scores = scores + prev_attn
        before = scores
        if self.talking_heads:
            scores = torch.einsum("b h i j, h k -> b k i j", scores, self.pre_softmax_proj)
        floor = -torch.finfo(scores.dtype).max
        if allowed is not None:
            scores = scores.masked_fill(~allowed, floor)
        if self.sparse_topk and self.sparse_topk < scores.shape[-1]:
            smallest_kept = scores.topk(self.sparse_topk, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < smallest_kept, floor)
        probabilities = scores.softmax(dim=-1)
        weights = self.dropout(probabilities)
        if self.talking_heads:
            weights = torch.einsum("b h i j, h k -> b k i j", weights, self.post_softmax_proj)
        return rearrange(weights @ v, "b h n d -> b n (h d)"), Intermediates(before, probabilities)


NORMS = {
    "use_rezero": nn.Identity,
    "use_rmsnorm": RMSNorm,
    "use_scalenorm": ScaleNorm,
}  # the first that is set counts


class AttentionLayers(nn.Module):
    """Attention and feed-forward layers, in turn; each is normalised first and added to its input unless options say otherwise.

    Each entry of `layers` is (norm, layer, residual).

    Args:
        dim: width.
        depth: how often the layers repeat.
        heads: attention heads.
        causal: tokens see none after themselves.
        cross_attend: an attention over a context after each over the tokens.
        only_cross: and none over the tokens.
        use_scalenorm, use_rmsnorm: other norms than `LayerNorm`.
        use_rezero: no norms, and `Rezero` around each attention (not around the feed-forward networks, as published).
        position_infused_attn: positions go to queries and keys of each self-attention (Press et al. 2021, "Shortformer").
        custom_layers, par_ratio, sandwich_coef: other orders of layers, see `layer_types`.
        residual_attn, cross_residual_attn: add the scores of the layer before (He et al. 2021, "RealFormer").
        macaron: a feed-forward network before each attention, too, and each counts half (Lu et al. 2019).
        pre_norm: False normalises the sum after each layer but the last instead.
        gate_residual: `GRUGating` instead of sums.
        options: `ff_mult`, `ff_glu`, `ff_dropout` for the feed-forward networks, and for the attentions `attn_` and a name of
            `ATTENTION_OPTIONS`; see `Attention`.

    Raises:
        ValueError: an unknown option, or an order of layers that does not work out.
    """

    FF_OPTIONS = ("mult", "glu", "dropout")
    ATTENTION_OPTIONS = ("dim_head", "dropout", "talking_heads", "sparse_topk", "num_mem_kv", "on_attn")

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        causal: bool = False,
        cross_attend: bool = False,
        only_cross: bool = False,
        use_scalenorm: bool = False,
        use_rmsnorm: bool = False,
        use_rezero: bool = False,
        position_infused_attn: bool = False,
        custom_layers: Sequence[str] | None = None,
        sandwich_coef: int | None = None,
        par_ratio: int | None = None,
        residual_attn: bool = False,
        cross_residual_attn: bool = False,
        macaron: bool = False,
        pre_norm: bool = True,
        gate_residual: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        ff, attn = self._sorted(options)
        self.dim, self.depth, self.pre_norm, self.cross_attend = dim, depth, pre_norm, cross_attend
        self.has_pos_emb = position_infused_attn
        self.pia_pos_emb = FixedPositionalEmbedding(dim) if position_infused_attn else None
        self.passes_scores = {SELF: residual_attn, CROSS: cross_residual_attn}
        block = (SELF if not (cross_attend and only_cross) else "") + (CROSS if cross_attend else "") + FEED
        self.layer_types = layer_types(
            FEED + block if macaron else block, depth, custom_layers, par_ratio, sandwich_coef
        )
        chosen = {"use_rezero": use_rezero, "use_rmsnorm": use_rmsnorm, "use_scalenorm": use_scalenorm}
        norm = next((made for name, made in NORMS.items() if chosen[name]), nn.LayerNorm)
        makers: dict[str, Callable[[], nn.Module]] = {
            SELF: partial(Attention, dim, heads=heads, causal=causal, **attn),
            CROSS: partial(Attention, dim, heads=heads, **attn),
            FEED: partial(FeedForward, dim, **ff),
        }
        wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {}
        if use_rezero:
            wrappers |= {SELF: Rezero, CROSS: Rezero}
        if macaron:
            wrappers[FEED] = partial(Scale, 0.5)
        after: Callable[[], nn.Module] = partial(GRUGating, dim) if gate_residual else Residual
        self.layers = nn.ModuleList(
            nn.ModuleList([norm(dim), wrappers.get(letter, _as_it_is)(makers[letter]()), after()])
            for letter in self.layer_types
        )

    def _sorted(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the feed-forward networks and those of the attentions, without their prefixes."""
        groups = {"ff_": self.FF_OPTIONS, "attn_": self.ATTENTION_OPTIONS}
        known = [prefix + name for prefix, names in groups.items() for name in names]
        for name in options:
            if name not in known:
                own = [p for p in inspect.signature(AttentionLayers).parameters if p != "options"]
                raise ValueError(f"AttentionLayers has no option {name!r}. {nearest(name, [*known, *own])}")
        ff, attn = (
            {k.removeprefix(prefix): v for k, v in options.items() if k.startswith(prefix)}
            for prefix in groups
        )
        return ff, attn

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        return_hiddens: bool = False,
        return_attn: bool | None = None,
    ) -> Any:
        """Run the layers.

        Args:
            x: (b, n, dim).
            context: (b, m, dim), for cross-attention.
            mask: (b, n), True for real tokens.
            context_mask: (b, m), True for what of the context is real.
            mems: what an earlier call had in `hiddens`, (b, k, dim) for each self-attention.
            return_hiddens: also return the `LayerIntermediates`.
            return_attn: with scores and probabilities in them; as `return_hiddens` if None.

        Returns:
            (b, n, dim), on request with `LayerIntermediates`.

        Raises:
            AssertionError: a context is missing, or given to layers without cross-attention (the published error class).
            ValueError: not as many memories as self-attentions.
        """
        self._check(context, mems)
        keep = return_hiddens if return_attn is None else return_attn
        seen, memories = LayerIntermediates(), iter(mems or ())
        options: dict[str, dict[str, Any]] = {
            SELF: {"mask": mask, "sinusoidal_emb": self.pia_pos_emb},
            CROSS: {"mask": mask, "context": context, "context_mask": context_mask},
        }
        entry: Any
        for number, (letter, entry) in enumerate(zip(self.layer_types, self.layers, strict=True), start=1):
            norm, layer, residual = entry
            h = norm(x) if self.pre_norm else x
            if letter == SELF:
                seen.hiddens.append(x)
                options[SELF]["mem"] = next(memories, None)
            if letter == FEED:
                h = layer(h)
            else:
                passes_on = self.passes_scores[letter]
                h, found = layer(h, keep=keep or passes_on, **options[letter])
                seen.attn_intermediates.append(found)
                if passes_on:
                    options[letter]["prev_attn"] = found.pre_softmax_attn
            x = residual(h, x)
            if not self.pre_norm and number < len(self.layers):
                x = norm(x)
        return (x, seen) if return_hiddens else x

    def _check(self, context: Tensor | None, mems: Sequence[Tensor] | None) -> None:
        if self.cross_attend != (context is not None):
            raise AssertionError(
                "these layers attend to a context: pass one"
                if self.cross_attend
                else "a context was given to layers without cross-attention; build them with cross_attend=True"
            )
        if mems is not None and len(mems) != self.layer_types.count(SELF):
            raise ValueError(
                f"{len(mems)} memories for {self.layer_types.count(SELF)} self-attentions; pass what return_mems gave"
            )


def _as_it_is(layer: nn.Module) -> nn.Module:
    return layer


class Encoder(AttentionLayers):
    """`AttentionLayers` in which every token sees every other.

    Raises:
        AssertionError: `causal` is given (the published error class).
    """

    def __init__(self, dim: int, depth: int, **options: Any) -> None:
        if "causal" in options:
            raise AssertionError("an Encoder is never causal; use AttentionLayers(causal=True)")
        super().__init__(dim, depth, causal=False, **options)


class TransformerWrapper(nn.Module):
    """Tokens to embeddings, through the layers, to a final norm and logits.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: number of positions.
        attn_layers: the layers.
        emb_dim: width of the token embeddings; as the layers' if None.
        max_mem_len: so many tokens a layer are remembered for the next call, see `forward`.
        emb_dropout: rate on the sum of token and position embeddings.
        num_memory_tokens: so many learned tokens go before each text (Burtsev & Sapunov 2020).
        tie_embedding: logits from the token embeddings' own weights.
        use_pos_emb: add position embeddings, unless the layers bring positions of their own.

    Raises:
        ValueError: tied embeddings of another width than the layers.

    Source: Vaswani et al. 2017, with the layer norms moved before the layers (Xiong et al. 2020).
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        max_mem_len: int = 0,
        emb_dropout: float = 0.0,
        num_memory_tokens: int | None = None,
        tie_embedding: bool = False,
        use_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        emb_dim = default(emb_dim, dim)
        if tie_embedding and emb_dim != dim:
            raise ValueError(f"tie_embedding needs emb_dim={emb_dim} to be the width of the layers, {dim}")
        self.max_seq_len, self.num_tokens, self.max_mem_len = max_seq_len, num_tokens, max_mem_len
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        has_positions = use_pos_emb and not attn_layers.has_pos_emb
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len) if has_positions else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embedding else nn.Linear(dim, num_tokens)
        self.num_memory_tokens = default(num_memory_tokens, 0)
        if self.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim))

    def forward(
        self,
        x: Tensor,
        return_embeddings: bool = False,
        mask: Tensor | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Run the transformer.

        Args:
            x: token ids (b, n).
            return_embeddings: stop before the logits.
            mask: (b, n), True for real tokens.
            return_mems: also return what `mems` of the next call should be, a list of (b, ≤ max_mem_len, dim).
            return_attn: also return the attention probabilities, a list of (b, heads, n, n).
            mems: of the call before.
            options: `context`, `context_mask` for layers with cross-attention.

        Returns:
            Logits (b, n, num_tokens) or embeddings (b, n, dim).

        Raises:
            ValueError: memories asked for with `max_mem_len` 0.
        """
        if return_mems and self.max_mem_len < 1:
            raise ValueError(
                f"max_mem_len={self.max_mem_len}: build the TransformerWrapper with max_mem_len ≥ 1"
            )
        h = self.token_emb(x)
        if self.pos_emb is not None:
            h = h + self.pos_emb(x)
        h = self.project_emb(self.emb_dropout(h))
        if self.num_memory_tokens:
            h = torch.cat([repeat(self.memory_tokens, "n d -> b n d", b=len(h)), h], dim=1)
            mask = None if mask is None else F.pad(mask, (self.num_memory_tokens, 0), value=True)
        h, seen = self.attn_layers(
            h, mask=mask, mems=mems, return_hiddens=True, return_attn=return_attn, **options
        )
        h = self.norm(h)[:, self.num_memory_tokens :]
        if not return_embeddings:
            h = self.to_logits(h) if self.to_logits is not None else h @ self.token_emb.weight.t()
        extras: list[Any] = [self._remembered(seen.hiddens, mems)] if return_mems else []
        if return_attn:
            extras.append([found.post_softmax_attn for found in seen.attn_intermediates])
        return (h, *extras) if extras else h

    def _remembered(self, hiddens: Sequence[Tensor], mems: Sequence[Tensor] | None) -> list[Tensor]:
        """The last `max_mem_len` tokens of each layer's memory and input."""
        longer = (
            hiddens if mems is None else [torch.cat(pair, dim=1) for pair in zip(mems, hiddens, strict=True)]
        )
        return [tokens[:, -self.max_mem_len :].detach() for tokens in longer]
