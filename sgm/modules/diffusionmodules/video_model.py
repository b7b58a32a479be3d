"""UNets over the frames of a clip: SVD and SV3D (`VideoUNet`), SV4D (`SpatialUNetModelWithTime`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from sgm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    SpatialTransformer,
    Timestep,
    TimestepBlock,
    TimestepEmbedSequential,
    TransposedUpsample,
    UNetModel,
    Upsample,
    checkpoint,
    conv_nd,
    count_flops_attn,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from sgm.modules.diffusionmodules.util import AlphaBlender
from sgm.modules.spacetime_attention import PostHocSpatialTransformerWithTimeMixingAndMotion, require_working
from sgm.modules.video_attention import SpatialVideoTransformer, frames_of

__all__ = [
    "AlphaBlender", "AttentionBlock", "AttentionPool2d", "Downsample", "PostHocResBlockWithTime",
    "PostHocSpatialTransformerWithTimeMixingAndMotion", "QKVAttention", "QKVAttentionLegacy", "ResBlock", "SpatialTransformer",
    "SpatialUNetModelWithTime", "SpatialVideoTransformer", "Timestep", "TimestepBlock", "TimestepEmbedSequential", "TransposedUpsample",
    "UNetModel", "Upsample", "VideoResBlock", "VideoUNet", "checkpoint", "conv_nd", "count_flops_attn", "linear", "normalization",
    "timestep_embedding", "zero_module",
]  # fmt: skip


class FrameResBlock(ResBlock):
    """A residual block over the pixels, blended with one over the frames of what it made."""

    wants = {"num_video_frames": "num_video_frames", "image_only_indicator": "image_only_indicator"}

    def make_time_block(self, kernel_size: int | Sequence[int], dropout: float) -> ResBlock:
        """The residual block over (b, c, t, h, w)."""
        return ResBlock(
            self.out_channels, self.emb_channels, dropout, dims=3, use_checkpoint=self.use_checkpoint, kernel_size=kernel_size,
            exchange_temb_dims=True,
        )  # fmt: skip

    def mix_frames(
        self,
        time_block: ResBlock,
        mixer: AlphaBlender,
        x: Tensor,
        emb: Tensor,
        frames: int | None,
        image_only: Tensor | None,
    ) -> Tensor:
        """Features (b·t, c, h, w) and embedding (b·t, d), blended with what `time_block` makes of the clips."""
        frames = frames_of(x, frames)
        clips = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        mixed = time_block(clips, rearrange(emb, "(b t) d -> b t d", t=frames))
        return rearrange(mixer(clips, mixed, image_only), "b c t h w -> (b t) c h w")


class VideoResBlock(FrameResBlock):
    """A residual block over the pixels, blended with one over the frames of what it made.

    Args:
        channels, emb_channels, dropout, out_channels, use_conv, use_scale_shift_norm, dims, use_checkpoint, up, down: of the block over
            pixels, see `ResBlock`.
        video_kernel_size: width of the convolutions over (t, h, w).
        merge_strategy, merge_factor: see `AlphaBlender`.

    Source: Blattmann et al. 2023 (Stable Video Diffusion).
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        video_kernel_size: int | Sequence[int] = 3,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__(
            channels,
            emb_channels,
            dropout,
            out_channels,
            use_conv,
            use_scale_shift_norm,
            dims,
            use_checkpoint,
            up,
            down,
        )
        self.time_stack = self.make_time_block(video_kernel_size, dropout)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy, "b t -> b 1 t 1 1")

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        num_video_frames: int | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Features (b·t, channels, h, w), embedding (b·t, emb_channels), marks of single images (b, t) → (b·t, out_channels, …)."""
        x = super().forward(x, emb)
        return self.mix_frames(
            self.time_stack, self.time_mixer, x, emb, num_video_frames, image_only_indicator
        )


class VideoUNet(UNetModel):
    """The UNet over the frames of a clip: SDXL's loop with blocks that mix frames.

    Args:
        in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult, conv_resample, dims,
            num_classes, use_checkpoint, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, resblock_updown,
            transformer_depth, context_dim, spatial_transformer_attn_type, use_linear_in_transformer, adm_in_channels: see `UNetModel`.
        transformer_depth_middle: blocks of the middle's transformer; as of the last level if None.
        time_downup: of three axes, resample the first, too.
        time_context_dim: width of a context of the clip's own, see `SpatialVideoTransformer`.
        extra_ff_mix_layer: see `VideoTransformerBlock` (ff_in).
        use_spatial_context, disable_temporal_crossattention: see `SpatialVideoTransformer`.
        merge_strategy, merge_factor: see `AlphaBlender`.
        video_kernel_size: see `VideoResBlock`.
        max_ddpm_temb_period: of the code of a frame's number.

    Source: Blattmann et al. 2023 (Stable Video Diffusion).
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        context_dim: int | Sequence[int] | None = None,
        time_downup: bool = False,
        time_context_dim: int | None = None,
        extra_ff_mix_layer: bool = False,
        use_spatial_context: bool = False,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        spatial_transformer_attn_type: str = "softmax",
        video_kernel_size: int | Sequence[int] = 3,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        disable_temporal_crossattention: bool = False,
        max_ddpm_temb_period: float = 10000,
    ) -> None:
        if context_dim is None:
            raise AssertionError("VideoUNet needs context_dim, the width of the context")
        # plain values, which the factories read while the network is built
        self.transformer_depth_middle, self.time_downup = transformer_depth_middle, time_downup
        self.merging: dict[str, Any] = {"merge_strategy": merge_strategy, "merge_factor": merge_factor}
        self.video_kernel_size = video_kernel_size
        self.time_options: dict[str, Any] = {
            "use_spatial_context": use_spatial_context, "time_context_dim": time_context_dim, "ff_in": extra_ff_mix_layer,
            "disable_temporal_crossattention": disable_temporal_crossattention, "max_time_embed_period": max_ddpm_temb_period,
        }  # fmt: skip
        super().__init__(
            in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult, conv_resample, dims,
            num_classes, use_checkpoint, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, resblock_updown,
            transformer_depth, context_dim, use_linear_in_transformer=use_linear_in_transformer,
            spatial_transformer_attn_type=spatial_transformer_attn_type, adm_in_channels=adm_in_channels,
        )  # fmt: skip

    def make_res_block(
        self, channels: int, out_channels: int, up: bool = False, down: bool = False
    ) -> nn.Module:
        """A residual block called with (x, emb, frames)."""
        return VideoResBlock(
            channels, self.emb_channels, self.dropout, self.video_kernel_size, **self.merging, out_channels=out_channels, dims=self.dims,
            use_checkpoint=self.use_checkpoint, use_scale_shift_norm=self.use_scale_shift_norm, up=up, down=down,
        )  # fmt: skip

    def make_transformer(
        self, channels: int, heads: int, width: int, depth: int, disable_self_attn: bool
    ) -> nn.Module:
        """A transformer called with (x, context, frames)."""
        return SpatialVideoTransformer(
            channels, heads, width, depth, context_dim=self.context_dim, use_linear=self.use_linear_in_transformer,
            checkpoint=self.use_checkpoint, attn_mode=self.spatial_transformer_attn_type, disable_self_attn=disable_self_attn,
            **self.merging, **self.time_options,
        )  # fmt: skip

    def make_middle_attention(self) -> nn.Module:
        """The transformer of the middle."""
        return self.make_attention(self.width, self.transformer_depth_middle or self.transformer_depth[-1])

    def make_resample(self, channels: int, up: bool) -> nn.Module:
        """A layer that doubles or halves the size."""
        if self.resblock_updown:
            return super().make_resample(channels, up)
        if up:
            return Upsample(channels, self.conv_resample, self.dims, third_up=self.time_downup)
        return Downsample(channels, self.conv_resample, self.dims, third_down=self.time_downup)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        time_context: Tensor | None = None,
        num_video_frames: int | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: (b·t, in_channels, h, w), the frames of a clip one after another.
            timesteps: (b·t,), fractions allowed.
            context: (b·t, m, context_dim).
            y: (b·t, …), exactly when num_classes is set, see `UNetModel`.
            time_context: (b, time_context_dim) or (b, m, time_context_dim).
            num_video_frames: t.
            image_only_indicator: (b, t), 1 for single images; wanted by merge_strategy "learned_with_images".

        Returns:
            (b·t, out_channels, h, w)

        Raises:
            ValueError: no number of frames, or one that does not divide the batch.
        """
        frames_of(x, num_video_frames)
        return self.predict(
            x, timesteps, context, y, time_context=time_context, num_video_frames=num_video_frames,
            image_only_indicator=image_only_indicator,
        )  # fmt: skip


class PostHocResBlockWithTime(FrameResBlock):
    """SV4D's residual block: as `VideoResBlock`, with other names, and single images are frames like any other.

    Args:
        channels, emb_channels, dropout, out_channels, use_conv, use_scale_shift_norm, dims, use_checkpoint, up, down: of the block over
            pixels, see `ResBlock`.
        time_kernel_size: width of the convolutions over (t·v, h, w).
        merge_strategy, merge_factor: see `AlphaBlender`.
        time_mix_legacy: must be False; the original never ran otherwise.
        replicate_time_mix_bug: accepted, as published; without effect.

    Raises:
        ValueError: time_mix_legacy=True.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        time_kernel_size: int | Sequence[int] = 3,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        time_mix_legacy: bool = True,
        replicate_time_mix_bug: bool = False,
    ) -> None:
        require_working(time_mix_legacy=(time_mix_legacy, False))
        super().__init__(
            channels,
            emb_channels,
            dropout,
            out_channels,
            use_conv,
            use_scale_shift_norm,
            dims,
            use_checkpoint,
            up,
            down,
        )
        self.time_mix_blocks = self.make_time_block(time_kernel_size, dropout)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy, "b t -> b 1 t 1 1")

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        num_video_frames: int | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Features (b·t·v, channels, h, w), embedding (b·t·v, emb_channels), t·v → (b·t·v, out_channels, …)."""
        x = super().forward(x, emb)
        nowhere = x.new_zeros(1, 1)  # the marks are not heeded, as published
        return self.mix_frames(self.time_mix_blocks, self.time_mixer, x, emb, num_video_frames, nowhere)


class SpatialUNetModelWithTime(UNetModel):
    """SV4D's UNet: the images of a clip seen from several sides, "(b t v)", mixed over pixels, views and moments.

    Args:
        in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult, conv_resample, dims,
            num_classes, use_checkpoint, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, resblock_updown,
            transformer_depth, context_dim, disable_self_attentions, num_attention_blocks, disable_middle_self_attn,
            spatial_transformer_attn_type, use_linear_in_transformer, adm_in_channels: see `UNetModel`. The embedding of time and label,
            4 · model_channels wide, also stands for the camera, so use_camera_emb wants adm_in_channels to be that.
        use_new_attention_order, replicate_time_mix_bug, view_context_dim, view_block_merge_factor: accepted; without effect.
        motion_context_dim: channels of the pictures of the views.
        extra_ff_mix_layer: see `VideoTransformerBlock` (ff_in).
        use_spatial_transformer, use_spatial_context, use_motion_attention: must be True.
        time_block_merge_strategy, time_block_merge_factor: see `AlphaBlender`; of the residual blocks and of the views.
        motion_block_merge_factor: of the moments, with separate_motion_merge_factor.
        time_kernel_size: see `PostHocResBlockWithTime`.
        legacy: the width of a head is that of the level over the number of heads, even where num_head_channels does not divide it.
        use_temporal_resblock: residual blocks over the images of a clip, not only over pixels.
        time_mix_legacy: must be False; the original never ran otherwise.
        disable_temporal_crossattention: no attention of views and moments to their contexts.
        max_ddpm_temb_period: of the codes of views and moments.
        use_camera_emb, use_3d_attention, separate_motion_merge_factor: see `PostHocSpatialTransformerWithTimeMixingAndMotion`.

    Raises:
        ValueError: an option with which the published network never ran.

    Source: Xie et al. 2024 (SV4D), section 3; Yao et al. 2025 (SV4D 2.0).
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = True,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        view_context_dim: int | None = None,
        motion_context_dim: int | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        extra_ff_mix_layer: bool = False,
        use_spatial_context: bool = False,
        time_block_merge_strategy: str = "fixed",
        time_block_merge_factor: float = 0.5,
        view_block_merge_factor: float = 0.5,
        motion_block_merge_factor: float = 0.5,
        spatial_transformer_attn_type: str = "softmax",
        time_kernel_size: int | Sequence[int] = 3,
        use_linear_in_transformer: bool = False,
        legacy: bool = True,
        adm_in_channels: int | None = None,
        use_temporal_resblock: bool = True,
        disable_temporal_crossattention: bool = False,
        time_mix_legacy: bool = True,
        max_ddpm_temb_period: float = 10000,
        replicate_time_mix_bug: bool = False,
        use_motion_attention: bool = True,
        use_camera_emb: bool = False,
        use_3d_attention: bool = False,
        separate_motion_merge_factor: bool = False,
    ) -> None:
        require_working(use_spatial_transformer=(use_spatial_transformer, True))
        # plain values, which the factories read while the network is built
        self.legacy_heads, self.use_temporal_resblock = legacy, use_temporal_resblock
        self.merging: dict[str, Any] = {
            "merge_strategy": time_block_merge_strategy, "merge_factor": time_block_merge_factor, "time_mix_legacy": time_mix_legacy,
        }  # fmt: skip
        self.time_kernel_size = time_kernel_size
        self.time_options: dict[str, Any] = {
            "motion_context_dim": motion_context_dim, "use_spatial_context": use_spatial_context, "ff_in": extra_ff_mix_layer,
            "merge_factor_motion": motion_block_merge_factor, "disable_temporal_crossattention": disable_temporal_crossattention,
            "max_time_embed_period": max_ddpm_temb_period, "use_camera_emb": use_camera_emb, "adm_in_channels": adm_in_channels,
            "use_3d_attention": use_3d_attention, "separate_motion_merge_factor": separate_motion_merge_factor,
            "use_motion_attention": use_motion_attention,
        }  # fmt: skip
        super().__init__(
            in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult, conv_resample, dims,
            num_classes, use_checkpoint, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, resblock_updown,
            transformer_depth, context_dim, disable_self_attentions, num_attention_blocks, disable_middle_self_attn,
            use_linear_in_transformer=use_linear_in_transformer, spatial_transformer_attn_type=spatial_transformer_attn_type,
            adm_in_channels=adm_in_channels,
        )  # fmt: skip

    def make_res_block(
        self, channels: int, out_channels: int, up: bool = False, down: bool = False
    ) -> nn.Module:
        """A residual block called with (x, emb), or with (x, emb, images of a clip)."""
        if not self.use_temporal_resblock:
            return super().make_res_block(channels, out_channels, up, down)
        return PostHocResBlockWithTime(
            channels, self.emb_channels, self.dropout, self.time_kernel_size, out_channels=out_channels, dims=self.dims,
            use_checkpoint=self.use_checkpoint, use_scale_shift_norm=self.use_scale_shift_norm, up=up, down=down, **self.merging,
        )  # fmt: skip

    def make_transformer(
        self, channels: int, heads: int, width: int, depth: int, disable_self_attn: bool
    ) -> nn.Module:
        """A transformer called with (x, context, camera, images of a clip, pictures of the views)."""
        return PostHocSpatialTransformerWithTimeMixingAndMotion(
            channels, heads, channels // heads if self.legacy_heads else width, depth, context_dim=self.context_dim,
            use_linear=self.use_linear_in_transformer, checkpoint=self.use_checkpoint, attn_mode=self.spatial_transformer_attn_type,
            disable_self_attn=disable_self_attn, **self.merging, **self.time_options,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        num_video_frames: int | None = None,
        image_only_indicator: Tensor | None = None,
        cond_view: Tensor | None = None,
        cond_motion: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Predict.

        Args:
            x: (b·t·v, in_channels, h, w).
            timesteps: (b·t·v,), fractions allowed.
            context: (b, t, context_dim).
            y: (b·t·v, …), exactly when num_classes is set, see `UNetModel`.
            num_video_frames: t·v.
            cond_view: (b·v, motion_context_dim, …), a picture of each view.
            image_only_indicator, cond_motion, ignored: accepted; as published, without effect.

        Returns:
            (b·t·v, out_channels, h, w)

        Raises:
            ValueError: a batch that does not consist of such clips.
        """
        frames_of(x, num_video_frames)
        return self.predict(x, timesteps, context, y, num_video_frames=num_video_frames, cond_view=cond_view)
