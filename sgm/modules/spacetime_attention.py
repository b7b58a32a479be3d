"""SV4D's attention: over the pixels of an image, over the views of a moment, over the moments of a view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from sgm.modules.video_attention import (
    GEGLU,
    AlphaBlender,
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
    VideoTransformerBlock,
    checkpoint,
    default,
    embed_positions,
    exists,
    linear,
    position_embedding,
    require_width,
    timestep_embedding,
    zero_module,
)

__all__ = [
    "GEGLU", "AlphaBlender", "BasicTransformerBlock", "BasicTransformerSingleLayerBlock", "BasicTransformerTimeMixBlock", "CrossAttention",
    "FeedForward", "LinearAttention", "MemoryEfficientCrossAttention", "Normalize", "PostHocSpatialTransformerWithTimeMixingAndMotion",
    "SelfAttention", "SimpleTransformer", "SpatialSelfAttention", "SpatialTransformer", "checkpoint", "default", "exists", "linear",
    "timestep_embedding", "zero_module",
]  # fmt: skip


class BasicTransformerTimeMixBlock(VideoTransformerBlock):
    """`VideoTransformerBlock` under SV4D's name."""


class Layout(NamedTuple):
    """How the images of a batch lie: "(b t v)", with places h·w."""

    b: int
    t: int
    v: int
    h: int
    w: int

    @classmethod
    def of(cls, x: Tensor, context: Tensor, cond_view: Tensor) -> Layout:
        """Read off the images (b·t·v, c, h, w), the context (b, t, d) and the pictures of the views (b·v, …)."""
        b, t = context.shape[:2]
        v = cond_view.shape[0] // b
        if b * t * v != x.shape[0]:
            raise ValueError(
                f"a batch of {x.shape[0]} images is not {b} clips × {t} moments (context) × {v} views (cond_view)"
            )
        return cls(b, t, v, *x.shape[-2:])


def require_working(**options: tuple[Any, Any]) -> None:
    """ValueError for options with which the published network never ran; each is (what came, what works)."""
    for name, (given, working) in options.items():
        if given != working:
            raise ValueError(f"{name}={given!r} never worked in the original; set {name}={working!r}")


class PostHocSpatialTransformerWithTimeMixingAndMotion(SpatialTransformer):
    """A `SpatialTransformer` with two blocks behind every block over the pixels: one over the views, one over the moments.

    Args:
        in_channels, n_heads, d_head, depth, dropout, use_linear, context_dim, disable_self_attn: as of `SpatialTransformer`; the tokens
            must be as wide as the map has channels.
        motion_context_dim: channels of the pictures of the views.
        use_spatial_context: the views look at the context of their moment; must be True.
        timesteps, time_context_dim, time_depth: accepted, as published.
        merge_strategy, merge_factor: see `AlphaBlender`; one α for all depths.
        merge_factor_motion: α of the moments, with separate_motion_merge_factor.
        ff_in, disable_temporal_crossattention: see `VideoTransformerBlock`.
        checkpoint: compute again in the backward pass instead of keeping intermediate results.
        attn_mode: see `BasicTransformerBlock`.
        time_mix_legacy: must be False; the original never ran otherwise.
        max_time_embed_period: of the codes of views and moments.
        use_camera_emb: a view is told by its camera instead of its number.
        adm_in_channels: width of the camera's embedding.
        use_3d_attention: SV4D 2.0's arrangement of the views.
        separate_motion_merge_factor: views and moments have an α each.
        use_motion_attention: must be True; the original never ran otherwise.

    Raises:
        ValueError: an option that never worked, or tokens of another width than the map has channels.

    Source: Xie et al. 2024 (SV4D), section 3; Yao et al. 2025 (SV4D 2.0).
    """

    wants = {
        "cam": "emb",  # as published: the embedding of time and label stands for the camera
        "timesteps": "num_video_frames",
        "cond_view": "cond_view",
        "cond_motion": "cond_motion",
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
        motion_context_dim: int | None = None,
        use_spatial_context: bool = False,
        timesteps: int | None = None,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        merge_factor_motion: float = 0.5,
        time_context_dim: int | None = None,
        ff_in: bool = False,
        checkpoint: bool = False,
        time_depth: int = 1,
        attn_mode: str = "softmax",
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        time_mix_legacy: bool = True,
        max_time_embed_period: float = 10000,
        use_camera_emb: bool = False,
        adm_in_channels: int | None = None,
        use_3d_attention: bool = False,
        separate_motion_merge_factor: bool = False,
        use_motion_attention: bool = True,
    ) -> None:
        require_working(
            time_mix_legacy=(time_mix_legacy, False),
            use_motion_attention=(use_motion_attention, True),
            use_spatial_context=(use_spatial_context, True),
        )
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
        self.use_camera_emb, self.use_3d_attention = use_camera_emb, use_3d_attention
        self.max_time_embed_period = max_time_embed_period
        self.position_width = in_channels

        def blocks(widths: Sequence[int | None]) -> nn.ModuleList:
            return nn.ModuleList(
                BasicTransformerTimeMixBlock(
                    inner, n_heads, d_head, dropout, width, checkpoint=checkpoint, ff_in=ff_in, inner_dim=inner, attn_mode=attn_mode,
                    disable_self_attn=disable_self_attn, disable_temporal_crossattention=disable_temporal_crossattention,
                )
                for width in widths
            )  # fmt: skip

        self.time_mix_blocks, self.motion_blocks = (
            blocks(self.context_dims),
            blocks([motion_context_dim] * depth),
        )
        if use_camera_emb and adm_in_channels is None:
            raise ValueError("use_camera_emb=True needs adm_in_channels, the width of the camera's embedding")
        self.time_mix_time_embed = position_embedding(
            adm_in_channels if use_camera_emb and adm_in_channels else in_channels, in_channels
        )
        self.time_mix_motion_embed = position_embedding(in_channels, in_channels)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)
        self.time_mixer_motion = (
            AlphaBlender(merge_factor_motion, merge_strategy) if separate_motion_merge_factor else None
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        cam: Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: Tensor | None = None,
        cond_view: Tensor | None = None,
        cond_motion: Tensor | None = None,
    ) -> Tensor:
        """Mix pixels, then views, then moments, block by block.

        Args:
            x: (b·t·v, c, h, w).
            context: (b, t, context_dim).
            cam: (b·t·v, adm_in_channels), with use_camera_emb; taken at each view's first moment.
            timesteps, image_only_indicator, cond_motion: accepted; as published, without effect.
            cond_view: (b·v, motion_context_dim, …), a picture of each view.

        Returns:
            (b·t·v, c, h, w)
        """
        if context is None or context.ndim != 3 or cond_view is None:
            given = [None if t is None else tuple(t.shape) for t in (context, cond_view)]
            raise ValueError(
                f"SV4D needs a context (b, t, d) and cond_view (b·v, c, h, w), not {given[0]} and {given[1]}"
            )
        at = Layout.of(x, context, cond_view)
        tokens = self.to_tokens(x)
        pixels_context = repeat(context, "b t d -> (b t v) 1 d", v=at.v)
        view_context = repeat(context, "b t d -> (b t n) 1 d", n=at.h * at.w)
        pictures = F.interpolate(cond_view, (at.h, at.w), mode="bilinear").to(x.dtype)
        motion_context = rearrange(pictures, "bv d h w -> (bv h w) 1 d")
        views, moments = self._view_position(tokens, cam, at), self._moment_position(tokens, at)
        motion_mixer = self.time_mixer if self.time_mixer_motion is None else self.time_mixer_motion
        nowhere = tokens.new_zeros(1, 1)  # no image counts as single, as published
        for block, view_block, motion_block in zip(
            self.transformer_blocks, self.time_mix_blocks, self.motion_blocks, strict=True
        ):
            tokens = self._over_views(block(tokens, context=pixels_context), at)
            tokens = self.time_mixer(tokens, view_block(tokens + views, view_context, at.v), nowhere)
            tokens = self._over_moments(tokens, at)
            tokens = motion_mixer(tokens, motion_block(tokens + moments, motion_context, at.t), nowhere)
            tokens = rearrange(tokens, "(b t) (v n) c -> (b t v) n c", t=at.t, v=at.v)
        return x + self.to_map(tokens, x)

    def _over_views(self, tokens: Tensor, at: Layout) -> Tensor:
        """Of (b·t·v, n, c), what the block over views gets: (b·v, t·n, c), or (b·v·n, t, c) with use_3d_attention.

        The block takes v consecutive entries as its sequence. In the second arrangement these are neighbouring pixels rather than
        views; the published weights were trained so.
        """
        pattern = "(b v n) t c" if self.use_3d_attention else "(b v) (t n) c"
        return rearrange(tokens, f"(b t v) n c -> {pattern}", t=at.t, v=at.v)

    def _over_moments(self, tokens: Tensor, at: Layout) -> Tensor:
        """What the block over moments gets, (b·t, v·n, c)."""
        pattern = "(b v n) t c" if self.use_3d_attention else "(b v) (t n) c"
        return rearrange(tokens, f"{pattern} -> (b t) (v n) c", b=at.b, t=at.t, v=at.v)

    def _view_position(self, tokens: Tensor, cam: Tensor | None, at: Layout) -> Tensor:
        """What tells views apart, one token for each sequence of `_over_views`."""
        if self.use_camera_emb:
            if cam is None:
                raise ValueError("use_camera_emb=True needs cam, (b·t·v, adm_in_channels)")
            first = rearrange(cam, "(b t v) d -> b t v d", b=at.b, t=at.t)[:, 0]
            position = rearrange(self.time_mix_time_embed(first), "b v c -> (b v) 1 c").to(tokens.dtype)
        else:
            position = self._numbered(self.time_mix_time_embed, at.v, tokens, at)
        return position.repeat_interleave(at.h * at.w, dim=0) if self.use_3d_attention else position

    def _moment_position(self, tokens: Tensor, at: Layout) -> Tensor:
        """What tells moments apart, (b·t, 1, c)."""
        return self._numbered(self.time_mix_motion_embed, at.t, tokens, at)

    def _numbered(self, network: nn.Sequential, count: int, tokens: Tensor, at: Layout) -> Tensor:
        codes = embed_positions(network, count, self.position_width, tokens, self.max_time_embed_period)
        return codes.repeat(at.b, 1, 1)
