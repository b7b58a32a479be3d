"""Attention over the frames of a clip, beside the attention over the pixels of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import checkpoint, linear, timestep_embedding
from sgm.modules.attention import (
    ATTENTION_MODES,
    GEGLU,
    BasicTransformerBlock,
    BasicTransformerSingleLayerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    MemoryEfficientCrossAttention,
    Normalize,
    SelfAttention,
    SimpleTransformer,
    SpatialSelfAttention,
    SpatialTransformer,
    default,
    exists,
    init_,
    max_neg_value,
    uniq,
    zero_module,
)
from sgm.modules.diffusionmodules.util import AlphaBlender

__all__ = [
    "GEGLU", "AlphaBlender", "BasicTransformerBlock", "BasicTransformerSingleLayerBlock", "CrossAttention", "FeedForward", "LinearAttention",
    "MemoryEfficientCrossAttention", "Normalize", "SelfAttention", "SimpleTransformer", "SpatialSelfAttention", "SpatialTransformer",
    "SpatialVideoTransformer", "TimeMixSequential", "VideoTransformerBlock", "checkpoint", "default", "exists", "init_", "linear",
    "max_neg_value", "timestep_embedding", "uniq", "zero_module",
]  # fmt: skip


class TimeMixSequential(nn.Sequential):
    """A sequence whose layers know the context and the number of frames."""

    def forward(self, x: Tensor, context: Tensor | None = None, timesteps: int | None = None) -> Tensor:
        """Apply the layers in order."""
        for layer in self:
            x = layer(x, context, timesteps)
        return x


class VideoTransformerBlock(nn.Module):
    """A transformer block whose tokens are the frames: every place of the image by itself.

    Args:
        dim: width in and out.
        n_heads, d_head: heads and their width.
        dropout: rate inside.
        context_dim: width of the context; None makes the second attention a self-attention, too.
        gated_ff: gated feed-forward networks.
        checkpoint: compute again in the backward pass instead of keeping intermediate results.
        timesteps: number of frames where `forward` is not told.
        ff_in: a feed-forward network in front, too; there is one whenever `inner_dim` is given.
        inner_dim: width of the attentions, as dim if None. Another width than dim has no residual around the feed-forward networks.
        attn_mode: see `BasicTransformerBlock`.
        disable_self_attn: the first attention looks at the context, too.
        disable_temporal_crossattention: no second attention.
        switch_temporal_ca_to_sa: the second attention looks at the frames instead of the context.

    Source: Blattmann et al. 2023 (Stable Video Diffusion).
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
        timesteps: int | None = None,
        ff_in: bool = False,
        inner_dim: int | None = None,
        attn_mode: str = "softmax",
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        switch_temporal_ca_to_sa: bool = False,
    ) -> None:
        super().__init__()
        attend = BasicTransformerBlock.attention_layer(attn_mode)
        inner = default(inner_dim, dim)
        self.is_res = inner == dim
        self.ff_in: nn.Module | None = None
        if ff_in or inner_dim is not None:
            self.norm_in = nn.LayerNorm(dim)
            self.ff_in = FeedForward(dim, dim_out=inner, dropout=dropout, glu=gated_ff)
        self.timesteps, self.checkpoint = timesteps, checkpoint
        self.disable_self_attn, self.switch_temporal_ca_to_sa = disable_self_attn, switch_temporal_ca_to_sa
        self.attn1 = attend(inner, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(inner, dim_out=dim, dropout=dropout, glu=gated_ff)
        self.attn2: nn.Module | None = None
        if not disable_temporal_crossattention:
            self.norm2 = nn.LayerNorm(inner)
            self.attn2 = attend(
                inner, None if switch_temporal_ca_to_sa else context_dim, n_heads, d_head, dropout
            )
        self.norm1, self.norm3 = nn.LayerNorm(inner), nn.LayerNorm(inner)

    def forward(self, x: Tensor, context: Tensor | None = None, timesteps: int | None = None) -> Tensor:
        """Mix frames.

        Args:
            x: (b·t, n, dim), the frames of a clip one after another.
            context: (b·n, m, context_dim), one for each place of each clip.
            timesteps: t, the number of frames; the constructor's if None.

        Returns:
            (b·t, n, dim)

        Raises:
            ValueError: no number of frames, or one that does not divide the batch.
        """
        timesteps = frames_of(x, default(timesteps, self.timesteps))
        return checkpoint(self._forward, (x, context, timesteps), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None, timesteps: int) -> Tensor:
        n = x.shape[1]
        x = rearrange(x, "(b t) n c -> (b n) t c", t=timesteps)
        if self.ff_in is not None:
            x = self._around(x, self.ff_in(self.norm_in(x)))
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), None if self.switch_temporal_ca_to_sa else context)
        x = self._around(x, self.ff(self.norm3(x)))
        return rearrange(x, "(b n) t c -> (b t) n c", n=n)

    def _around(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change if self.is_res else change

    def get_last_layer(self) -> Tensor:
        """The weight of the last layer."""
        last: Any = self.ff.net[-1]
        return last.weight


def frames_of(x: Tensor, timesteps: int | None) -> int:
    """The number of frames, if there is one and the batch consists of whole clips; ValueError otherwise."""
    if timesteps is None:
        raise ValueError(
            "a video network needs the number of frames: num_video_frames (timesteps of a transformer)"
        )
    if x.shape[0] % timesteps:
        raise ValueError(f"a batch of {x.shape[0]} images does not consist of clips of {timesteps} frames")
    return timesteps


def require_width(in_channels: int, inner: int) -> int:
    """The tokens' width, if codes as wide as the map can be added to them; ValueError otherwise."""
    if inner != in_channels:
        raise ValueError(
            f"n_heads · d_head = {inner} must be in_channels = {in_channels} in a video transformer"
        )
    return inner


def position_embedding(width: int, out: int) -> nn.Sequential:
    """The network that turns the code of a frame's (or a camera's) number into something to add to `out` channels."""
    hidden = 4 * out
    return nn.Sequential(linear(width, hidden), nn.SiLU(), linear(hidden, out))


def embed_positions(
    network: nn.Sequential, count: int, width: int, like: Tensor, max_period: float = 10000
) -> Tensor:
    """What `network` makes of the codes of 0 … count - 1, (count, 1, out)."""
    code = timestep_embedding(torch.arange(count, device=like.device), width, max_period=max_period)
    first: Any = network[0]
    return network(code.to(first.weight.dtype))[:, None].to(like.dtype)


class SpatialVideoTransformer(SpatialTransformer):
    """A `SpatialTransformer` with a block over the frames behind every block over the pixels.

    Args:
        in_channels, n_heads, d_head, depth, dropout, use_linear, context_dim, disable_self_attn: as of `SpatialTransformer`; the tokens
            must be as wide as the map has channels.
        use_spatial_context: the frames look at the first frame's context.
        timesteps: number of frames where `forward` is not told.
        merge_strategy, merge_factor: see `AlphaBlender`; one α for all depths.
        time_context_dim: width of the context of the frames, without use_spatial_context.
        ff_in, disable_temporal_crossattention: see `VideoTransformerBlock`.
        checkpoint: compute again in the backward pass instead of keeping intermediate results.
        time_depth: accepted, as published; there are as many blocks over frames as over pixels.
        attn_mode: see `BasicTransformerBlock`.
        max_time_embed_period: of the code of a frame's number.

    Raises:
        ValueError: tokens of another width than the map has channels.

    Source: Blattmann et al. 2023 (Stable Video Diffusion).
    """

    wants = {
        "time_context": "time_context",
        "timesteps": "num_video_frames",
        "image_only_indicator": "image_only_indicator",
    }

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        use_linear: bool = False,
        context_dim: int | Sequence[int] | None = None,
        use_spatial_context: bool = False,
        timesteps: int | None = None,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        time_context_dim: int | None = None,
        ff_in: bool = False,
        checkpoint: bool = False,
        time_depth: int = 1,
        attn_mode: str = "softmax",
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        max_time_embed_period: float = 10000,
    ) -> None:
        super().__init__(
            in_channels,
            n_heads,
            d_head,
            depth,
            dropout,
            context_dim,
            disable_self_attn,
            use_linear,
            attn_mode,
            checkpoint,
        )
        inner = require_width(in_channels, n_heads * d_head)
        self.use_spatial_context, self.timesteps = use_spatial_context, timesteps
        self.max_time_embed_period = max_time_embed_period
        self.time_stack = nn.ModuleList(
            VideoTransformerBlock(
                inner, n_heads, d_head, dropout, width if use_spatial_context else time_context_dim, checkpoint=checkpoint,
                timesteps=timesteps, ff_in=ff_in, inner_dim=inner, attn_mode=attn_mode, disable_self_attn=disable_self_attn,
                disable_temporal_crossattention=disable_temporal_crossattention,
            )
            for width in self.context_dims
        )  # fmt: skip
        self.time_pos_embed = position_embedding(in_channels, in_channels)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        time_context: Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Mix pixels, then frames, block by block.

        Args:
            x: (b·t, c, h, w), the frames of a clip one after another.
            context: (b·t, m, context_dim).
            time_context: (b, time_context_dim) or (b, m, time_context_dim), without use_spatial_context.
            timesteps: t, the number of frames; the constructor's if None.
            image_only_indicator: (b, t), 1 for single images; wanted by merge_strategy "learned_with_images".

        Returns:
            (b·t, c, h, w)
        """
        frames = frames_of(x, default(timesteps, self.timesteps))
        tokens = self.to_tokens(x)
        time_context = self._time_context(context, time_context, frames, tokens.shape[1])
        position = embed_positions(
            self.time_pos_embed, frames, self.in_channels, tokens, self.max_time_embed_period
        )
        position = position.repeat(len(x) // frames, 1, 1)  # (b·t, 1, c)
        for block, mix in zip(self.transformer_blocks, self.time_stack, strict=True):
            tokens = block(tokens, context=context)
            mixed = mix(tokens + position, time_context, frames)
            tokens = self.time_mixer(tokens, mixed, image_only_indicator)
        return x + self.to_map(tokens, x)

    def _time_context(
        self, context: Tensor | None, time_context: Tensor | None, frames: int, places: int
    ) -> Tensor | None:
        """The context of the frames, one for each place: (b·h·w, m, d)."""
        if self.use_spatial_context:
            if context is None or context.ndim != 3:
                raise ValueError(
                    f"use_spatial_context=True needs a context (b·t, m, d), not {None if context is None else tuple(context.shape)}"
                )
            time_context = context[::frames]
        if time_context is None:
            return None
        if time_context.ndim == 2:
            time_context = time_context[:, None]
        return time_context.repeat_interleave(places, dim=0)
