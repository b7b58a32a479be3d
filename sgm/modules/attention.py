"""Attention with sgm's options; the blocks themselves live in `ldm.modules.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules import attention as ldm
from ldm.modules.attention import (
    GEGLU,
    FeedForward,
    LinearAttention,
    Normalize,
    SpatialSelfAttention,
    default,
    exists,
    init_,
    max_neg_value,
    uniq,
    zero_module,
)
from ldm.modules.diffusionmodules.util import checkpoint
from taming.modules.attention import attention

__all__ = [
    "GEGLU", "BasicTransformerBlock", "BasicTransformerSingleLayerBlock", "CrossAttention", "FeedForward", "LinearAttention",
    "MemoryEfficientCrossAttention", "Normalize", "SelfAttention", "SimpleTransformer", "SpatialSelfAttention", "SpatialTransformer",
    "checkpoint", "default", "exists", "init_", "max_neg_value", "uniq", "zero_module",
]  # fmt: skip


class CrossAttention(ldm.CrossAttention):
    """`ldm`'s attention with further tokens, attention across frames and a choice of kernel.

    Args:
        query_dim, context_dim, heads, dim_head, dropout: as there.
        backend: the kernel of PyTorch's attention to insist on; None lets PyTorch choose.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        backend: SDPBackend | None = None,
    ) -> None:
        super().__init__(query_dim, context_dim, heads, dim_head, dropout)
        self.backend = backend

    def broadcast_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask itself: sgm's masks come broadcastable to (b, heads, n, m)."""
        return mask

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens (b, n, query_dim).
            context: (b, m, context_dim); the tokens if None.
            mask: broadcastable to (b, heads, n, m): bool, True = look at it, or numbers to add to the scores.
            additional_tokens: (b, k, query_dim), put before x and cut off the result.
            n_times_crossframe_attn_in_self: of so many consecutive batch entries (the frames of a clip), all look at the first.

        Returns:
            (b, n, query_dim)

        Raises:
            ValueError: a batch that does not divide into such groups, or a context of another width.
        """
        frames, extra = n_times_crossframe_attn_in_self, 0
        if additional_tokens is not None:
            extra = additional_tokens.shape[1]
            x = torch.cat([additional_tokens, x], dim=1)
        if frames:
            if x.shape[0] % frames:
                raise ValueError(
                    f"a batch of {x.shape[0]} does not divide into groups of n_times_crossframe_attn_in_self={frames} frames"
                )
            context = default(context, x)[::frames].repeat_interleave(frames, dim=0)
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return super().forward(x, context, mask)[:, extra:]


class MemoryEfficientCrossAttention(CrossAttention):
    """`CrossAttention` under the name of an old back-end (xformers), which knew no masks; every attention here is memory-efficient."""

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """As `CrossAttention`, without a mask."""
        if mask is not None:
            raise NotImplementedError(
                "MemoryEfficientCrossAttention takes no mask; use CrossAttention (attn_mode='softmax')"
            )
        return super().forward(x, context, None, additional_tokens, n_times_crossframe_attn_in_self)


ATTENTION_MODES: dict[str, Any] = {
    "softmax": CrossAttention,
    "softmax-xformers": MemoryEfficientCrossAttention,
}


class BasicTransformerBlock(ldm.BasicTransformerBlock):
    """Self-attention, cross-attention and a feed-forward network, each normalised first and added to its input.

    Args:
        dim, n_heads, d_head, dropout, context_dim, gated_ff, checkpoint, disable_self_attn, attn_mode: as in `ldm`.
        sdp_backend: see `CrossAttention`.
    """

    ATTENTION_MODES = ATTENTION_MODES

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
        sdp_backend: SDPBackend | None = None,
    ) -> None:
        super().__init__(
            dim, n_heads, d_head, dropout, context_dim, gated_ff, checkpoint, disable_self_attn, attn_mode
        )
        self.attn1.backend = self.attn2.backend = sdp_backend

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) → (b, n, dim); the other options are those of `CrossAttention`.

        Both attentions see the additional tokens; only self-attention goes across frames.
        """
        inputs = (x, context, additional_tokens, n_times_crossframe_attn_in_self)
        return checkpoint(self._forward, inputs, self.parameters(), self.checkpoint)

    def _forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        own, frames = (context, 0) if self.disable_self_attn else (None, n_times_crossframe_attn_in_self)
        x = x + self.attn1(self.norm1(x), own, None, additional_tokens, frames)
        x = x + self.attn2(self.norm2(x), context, None, additional_tokens)
        return x + self.ff(self.norm3(x))


class BasicTransformerSingleLayerBlock(nn.Module):
    """One attention (over a context, or over the tokens without one) and a feed-forward network.

    Args:
        dim, n_heads, d_head, dropout, context_dim, gated_ff, checkpoint, attn_mode: as of `BasicTransformerBlock`.
    """

    ATTENTION_MODES = ATTENTION_MODES

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        attn_mode: str = "softmax",
    ) -> None:
        super().__init__()
        attend = BasicTransformerBlock.attention_layer(attn_mode)
        self.attn1 = attend(dim, context_dim, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) → (b, n, dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        return x + self.ff(self.norm2(x))


class SpatialTransformer(ldm.SpatialTransformer):
    """Transformer blocks over the pixels of a feature map, added to it.

    Args:
        in_channels, n_heads, d_head, depth, dropout, context_dim, disable_self_attn, use_linear, use_checkpoint: as in `ldm`.
        attn_type: attn_mode of its blocks; "softmax-xformers" is the same attention.
        sdp_backend: see `CrossAttention`.
    """

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
        attn_type: str = "softmax",
        use_checkpoint: bool = True,
        sdp_backend: SDPBackend | None = None,
    ) -> None:
        # plain values, which make_block reads while the blocks are built
        self.attn_type, self.sdp_backend = attn_type, sdp_backend
        super().__init__(
            in_channels,
            n_heads,
            d_head,
            depth,
            dropout,
            context_dim,
            disable_self_attn,
            use_linear,
            use_checkpoint,
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
            dim, n_heads, d_head, dropout, context_dim, checkpoint=use_checkpoint, disable_self_attn=disable_self_attn,
            attn_mode=self.attn_type, sdp_backend=self.sdp_backend,
        )  # fmt: skip


class SimpleTransformer(nn.Module):
    """Transformer blocks over tokens.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        heads, dim_head: heads and their width.
        context_dim: width of the context, None for no context.
        dropout: rate inside.
        checkpoint: compute again in the backward pass instead of keeping intermediate results.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        context_dim: int | None = None,
        dropout: float = 0.0,
        checkpoint: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BasicTransformerBlock(dim, heads, dim_head, dropout, context_dim, checkpoint=checkpoint)
            for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) → (b, n, dim)."""
        for layer in self.layers:
            x = layer(x, context)
        return x


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, as in vision transformers.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        qkv_bias: bias of that projection.
        qk_scale: factor of the scores; 1/√(width of a head) if None. Only "math" heeds it.
        attn_drop: rate at which attention weights are dropped in training. Only "math" heeds it.
        proj_drop: rate after the output projection.
        attn_mode: "math", "torch" (attention in float32) or "xformers" (in the tokens' type).

    Raises:
        ValueError: unknown attn_mode, or a width that does not divide into heads.
    """

    ATTENTION_MODES = ("xformers", "torch", "math")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_mode: str = "xformers",
    ) -> None:
        super().__init__()
        if attn_mode not in self.ATTENTION_MODES:
            raise ValueError(f"attn_mode={attn_mode!r} is unknown; choose one of {self.ATTENTION_MODES}")
        if dim % num_heads:
            raise ValueError(f"dim={dim} does not divide into num_heads={num_heads} heads")
        self.num_heads, self.attn_mode = num_heads, attn_mode
        self.scale = default(qk_scale, (dim // num_heads) ** -0.5)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) → (b, n, dim)."""
        q, k, v = rearrange(self.qkv(x), "b n (three d) -> three b n d", three=3)
        dropout = 0.0
        if self.attn_mode == "torch":
            q, k, v = q.float(), k.float(), v.float()
        elif self.attn_mode == "math":
            q = q * (
                self.scale * (q.shape[-1] // self.num_heads) ** 0.5
            )  # attention divides by √(width of a head)
            dropout = self.attn_drop.p if self.training else 0.0
        out = attention(q, k, v, self.num_heads, dropout=dropout).to(x.dtype)
        return self.proj_drop(self.proj(out))
