"""The UNet of SD 2.1 and SDXL in sgm's signature, over the build loop of `ldm.modules.diffusionmodules.openaimodel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldm.modules.diffusionmodules import openaimodel as ldm
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    Timestep,
    TimestepBlock,
    TimestepEmbedSequential,
    TransposedUpsample,
    Upsample,
    count_flops_attn,
)
from ldm.modules.diffusionmodules.util import (
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from sgm.modules.attention import SpatialTransformer

__all__ = [
    "AttentionBlock", "AttentionPool2d", "Downsample", "QKVAttention", "QKVAttentionLegacy", "ResBlock", "SpatialTransformer", "Timestep",
    "TimestepBlock", "TimestepEmbedSequential", "TransposedUpsample", "UNetModel", "Upsample", "checkpoint", "conv_nd", "count_flops_attn",
    "linear", "normalization", "timestep_embedding", "zero_module",
]  # fmt: skip


class ResBlock(ldm.ResBlock):
    """`ldm`'s residual block, also over frames with an embedding each, or without embedding.

    Args:
        channels, emb_channels, dropout, out_channels, use_conv, use_scale_shift_norm, dims, use_checkpoint, up, down, kernel_size:
            as there.
        exchange_temb_dims: the embedding is (b, t, emb_channels), one for each frame of features (b, c, t, h, w).
        skip_t_emb: the block has no use for an embedding, and no weights for one.

    Raises:
        ValueError: skip_t_emb with use_scale_shift_norm, which has nothing but the embedding to scale and shift by.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        kernel_size: int | Sequence[int] = 3,
        exchange_temb_dims: bool = False,
        skip_t_emb: bool = False,
    ) -> None:
        if skip_t_emb and use_scale_shift_norm:
            raise ValueError("use_scale_shift_norm=True scales by the embedding, so skip_t_emb must be False")
        super().__init__(
            channels, emb_channels, dropout, out_channels, use_conv, use_scale_shift_norm, dims, use_checkpoint, up, down, kernel_size
        )  # fmt: skip
        self.exchange_temb_dims, self.skip_t_emb = exchange_temb_dims, skip_t_emb
        if skip_t_emb:
            del self.emb_layers

    def embed(self, emb: Tensor, h: Tensor) -> Tensor:
        """What the embedding adds to the features h, (b, c, 1, …), (b, c, t, 1, 1) or zero."""
        if self.skip_t_emb:
            return h.new_zeros(())
        shift = super().embed(emb, h)
        return shift.transpose(1, 2) if self.exchange_temb_dims else shift


class UNetModel(ldm.UNetModel):
    """`ldm`'s UNet whose attention is always a transformer, with or without context.

    Args:
        in_channels, model_channels, out_channels, num_res_blocks, dropout, channel_mult, conv_resample, dims, use_checkpoint, num_heads,
            num_head_channels, num_heads_upsample, use_scale_shift_norm, resblock_updown, transformer_depth, disable_self_attentions,
            num_attention_blocks, disable_middle_self_attn, use_linear_in_transformer, adm_in_channels: as in `ldm`.
        attention_resolutions: *down-sampling factors* at which to attend; the middle attends without being named.
        num_classes: number of labels, "continuous" (one number an image), "timestep" (one number, embedded as time steps are) or
            "sequential" (a vector an image).
        context_dim: width of the context, one or a list with one for each block of a transformer; None makes all attention
            self-attention.
        disable_middle_transformer: no attention in the middle.
        spatial_transformer_attn_type: see `SpatialTransformer`.

    Source: Podell et al. 2023 (SDXL), section 2.1.
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
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        use_linear_in_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        adm_in_channels: int | None = None,
    ) -> None:
        # plain values, which the factories read while the network is built
        self.disable_middle_transformer = disable_middle_transformer
        self.spatial_transformer_attn_type = spatial_transformer_attn_type
        super().__init__(
            image_size=None, in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
            num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, dropout=dropout, channel_mult=channel_mult,
            conv_resample=conv_resample, dims=dims, num_classes=num_classes, use_checkpoint=use_checkpoint, num_heads=num_heads,
            num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_spatial_transformer=True, transformer_depth=transformer_depth, context_dim=context_dim,
            legacy=False, disable_self_attentions=disable_self_attentions, num_attention_blocks=num_attention_blocks,
            disable_middle_self_attn=disable_middle_self_attn, use_linear_in_transformer=use_linear_in_transformer,
            adm_in_channels=adm_in_channels,
        )  # fmt: skip

    @staticmethod
    def check_context(use_spatial_transformer: bool, context_dim: Any) -> None:
        """Nothing to check: transformers without context attend to themselves."""

    def make_transformer(
        self, channels: int, heads: int, width: int, depth: int, disable_self_attn: bool
    ) -> nn.Module:
        """A transformer called with (x, context)."""
        return SpatialTransformer(
            channels, heads, width, depth=depth, context_dim=self.context_dim, disable_self_attn=disable_self_attn,
            use_linear=self.use_linear_in_transformer, attn_type=self.spatial_transformer_attn_type, use_checkpoint=self.use_checkpoint,
        )  # fmt: skip

    def make_middle_attention(self) -> nn.Module:
        """The transformer of the middle, unless it is disabled."""
        return nn.Identity() if self.disable_middle_transformer else super().make_middle_attention()

    def make_label_embedding(self, num_classes: int | str, adm_in_channels: int | None) -> nn.Module:
        """Labels to (b, 4 · model_channels)."""
        if num_classes == "timestep":
            return nn.Sequential(Timestep(self.model_channels), self._two_layers(self.model_channels))
        return super().make_label_embedding(num_classes, adm_in_channels)
