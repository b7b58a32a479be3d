"""Attention over tokens and images: the transformer blocks inside the UNet."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import checkpoint, zero_module
from ldm.modules.prompt_cache import once
from taming.modules.attention import LinearAttention, attention
from taming.modules.diffusionmodules.blocks import AttnBlock, Normalize
from taming.util import default, exists

__all__ = [
    "GEGLU", "BasicTransformerBlock", "CrossAttention", "FeedForward", "LinearAttention", "MemoryEfficientCrossAttention", "Normalize",
    "SpatialSelfAttention", "SpatialTransformer", "default", "exists", "init_", "max_neg_value", "uniq", "zero_module",
]  # fmt: skip


def uniq(arr: Iterable[Any]) -> Iterable[Any]:
    """The distinct elements, in their order."""
    return dict.fromkeys(arr).keys()


def max_neg_value(t: Tensor) -> float:
    """The most negative number of a tensor's type."""
    return -torch.finfo(t.dtype).max


def init_(tensor: Tensor) -> Tensor:
    """Fill in place with uniform numbers of ±1/√(last axis)."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    return tensor.uniform_(-bound, bound)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another: value · GELU(gate).

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim_in) → (…, dim_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The two-layer network of a transformer block.

    Args:
        dim: width in.
        dim_out: width out; as in if None.
        mult: the hidden width is int(dim · mult).
        glu: gated (`GEGLU`) instead of plain GELU.
        dropout: rate between the layers.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: float = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim_out)."""
        return self.net(x)


class SpatialSelfAttention(AttnBlock):
    """Single-head self-attention over all pixels, added to its input."""


class CrossAttention(nn.Module):
    """Multi-head attention of tokens over a context, or over themselves without one.

    The environment variable ATTN_PRECISION=fp32, read at construction, computes attention in float32 even under
    autocast, for weights whose scores overflow half precision. Within `prompt_cache` (every run of a sampler), keys and values of a
    context are computed once, unless the layer is being trained.

    Args:
        query_dim: width of the tokens, in and out.
        context_dim: width of the context; as the tokens' if None.
        heads: number of heads.
        dim_head: width of a head.
        dropout: rate after the output projection.

    Source: Rombach et al. 2022, section 3.3.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.scale = dim_head**-0.5
        self.heads = heads
        self.precise = os.environ.get("ATTN_PRECISION") == "fp32"
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens (b, n, query_dim).
            context: (b, m, context_dim).
            mask: bool over the context, (b, …) with m entries a sample; True = look at it.

        Returns:
            (b, n, query_dim)

        Raises:
            ValueError: a context of another width or shape than the layer was built for, or none where it needs one.
        """
        tokens = default(context, x)
        if tokens.ndim != 3 or tokens.shape[-1] != self.to_k.in_features:
            raise ValueError(self._misfit(context))
        q = self.to_q(x)
        if context is None or self.training:
            k, v = self._keys_and_values(tokens)
        else:
            k, v = once(self, self._keys_and_values, context)
        mask = self.broadcast_mask(mask)
        if self.precise:
            with torch.autocast(x.device.type, enabled=False):
                out = attention(q.float(), k.float(), v.float(), self.heads, mask).to(q.dtype)
        else:
            out = attention(q, k, v, self.heads, mask)
        return self.to_out(out)

    def _misfit(self, context: Tensor | None) -> str:
        """Why a context cannot be looked at."""
        wanted = f"this cross-attention was built for context_dim={self.to_k.in_features}"
        if context is None:
            return f"no context was given, but {wanted}; pass the encoded condition"
        if context.ndim != 3:
            return f"the context has the shape {tuple(context.shape)}, but {wanted}: (batch, tokens, {self.to_k.in_features})"
        return (
            f"the context has width {context.shape[-1]}, but {wanted}. "
            "Is it the text encoder that the checkpoint was trained with?"
        )

    def broadcast_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask as `attention` wants it: broadcastable to (b, heads, n, m)."""
        return mask if mask is None else rearrange(mask, "b ... -> b 1 1 (...)")

    def _keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(tokens), self.to_v(tokens)


class MemoryEfficientCrossAttention(CrossAttention):
    """`CrossAttention` under the name of an old back-end; every attention here is memory-efficient."""


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each normalised first and added to its input.

    Args:
        dim: width of the tokens.
        n_heads, d_head: heads and their width.
        dropout: rate inside.
        context_dim: width of the context; None makes the second attention a self-attention, too.
        gated_ff: gated feed-forward network.
        checkpoint: compute again in the backward pass instead of keeping intermediate results.
        disable_self_attn: the first attention looks at the context, too.
        attn_mode: a name in ATTENTION_MODES, the table of attention layers.

    Raises:
        ValueError: unknown attn_mode.
    """

    ATTENTION_MODES: dict[str, Any] = {
        "softmax": CrossAttention,
        "softmax-xformers": MemoryEfficientCrossAttention,
    }

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
        attn_mode: str = "softmax",
    ) -> None:
        super().__init__()
        attend = self.attention_layer(attn_mode)
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        self.attn1 = attend(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = attend(dim, context_dim, n_heads, d_head, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    @classmethod
    def attention_layer(cls, mode: str) -> Any:
        """The attention layer of this name."""
        if mode not in cls.ATTENTION_MODES:
            raise ValueError(
                f"attention mode {mode!r} is unknown; choose one of {sorted(cls.ATTENTION_MODES)}"
            )
        return cls.ATTENTION_MODES[mode]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) → (b, n, dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it.

    Args:
        in_channels: channels of the map.
        n_heads, d_head: heads and their width; the tokens are n_heads · d_head wide.
        depth: number of blocks.
        dropout: rate inside.
        context_dim: width of the context, or a list with one for each block (a list of equal ones may have any length); None for no
            context.
        disable_self_attn: see `BasicTransformerBlock`.
        use_linear: project in and out with linear layers (SD v2) instead of 1×1 convolutions.
        use_checkpoint: see `BasicTransformerBlock`.
    """

    wants: Mapping[str, str] = {}  # see `TimestepEmbedSequential`

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels)
        self.proj_in: nn.Module = (
            nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        )
        if isinstance(context_dim, Sequence) and len(set(context_dim)) == 1:
            context_dim = context_dim[0]
        self.context_dims: list[int | None] = self._per_block(context_dim, depth, "context_dim")
        self.transformer_blocks = nn.ModuleList(
            self.make_block(inner, n_heads, d_head, dropout, width, use_checkpoint, disable_self_attn)
            for width in self.context_dims
        )
        self.proj_out = zero_module(
            nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1)
        )

    def make_block(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float,
        context_dim: int | None,
        use_checkpoint: bool,
        disable_self_attn: bool,
    ) -> nn.Module:
        """A transformer block called with (tokens, context=…)."""
        return BasicTransformerBlock(
            dim,
            n_heads,
            d_head,
            dropout,
            context_dim,
            checkpoint=use_checkpoint,
            disable_self_attn=disable_self_attn,
        )

    @staticmethod
    def _per_block(given: Any, depth: int, name: str) -> list[Any]:
        """One entry for each block: a single one is shared."""
        if not isinstance(given, Sequence) or isinstance(given, str):
            return [given] * depth
        if len(given) not in (1, depth):
            raise ValueError(
                f"{len(given)} entries of {name} for {depth} transformer blocks; give one, or one for each"
            )
        return list(given) * (depth if len(given) == 1 else 1)

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """(b, c, h, w), context (b, m, context_dim) or a list of them → (b, c, h, w)."""
        contexts = self._per_block(context, len(self.transformer_blocks), "context")
        tokens = self.to_tokens(x)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            tokens = block(tokens, context=block_context)
        # in this order: the sum keeps the layout of x, where tokens left the map permuted
        return x + self.to_map(tokens, x)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(b, c, h, w), normalised and projected, → (b, h·w, n_heads · d_head)."""
        x = self.norm(x)
        if self.use_linear:
            return self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.proj_in(x), "b c h w -> b (h w) c")

    def to_map(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(b, h·w, n_heads · d_head), projected back, → (b, c, h, w), the shape of x."""
        if self.use_linear:
            return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[-2])
        return self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[-2]))
