"""The UNet of the diffusion models, with time steps, labels and cross-attention.

One build loop serves every network of this family: `UNetBackbone` assembles encoder, middle and decoder through three
factories (`make_res_block`, `make_attention`, `make_resample`), which other networks override.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    Timestep,
    TimestepBlock,
    TimestepEmbedSequential,
    TransposedUpsample,
    Upsample,
    count_flops_attn,
)
from ldm.modules.diffusionmodules.util import conv_nd, linear, normalization, timestep_embedding, zero_module

__all__ = [
    "AttentionBlock", "AttentionPool2d", "Downsample", "EncoderUNetModel", "QKVAttention", "QKVAttentionLegacy", "ResBlock", "Timestep",
    "TimestepBlock", "TimestepEmbedSequential", "TransposedUpsample", "UNetBackbone", "UNetModel", "Upsample", "convert_module_to_f16",
    "convert_module_to_f32", "count_flops_attn",
]  # fmt: skip


def convert_module_to_f16(x: nn.Module) -> None:
    """Does nothing, as published: half precision comes from autocast or from `.half()`."""


def convert_module_to_f32(x: nn.Module) -> None:
    """Does nothing, as published."""


class UNetBackbone(nn.Module):
    """Time embedding, encoder and middle of a UNet, assembled through three factories.

    The options are those of `UNetModel`. After construction `skip_channels` holds the widths of the encoder's
    outputs, `width` and `ds` the width and the down-sampling factor that it ended with.
    """

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        if num_heads == -1 and num_head_channels == -1:
            raise AssertionError("set num_heads or num_head_channels")
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels = model_channels
        self.num_res_blocks = per_level(num_res_blocks, levels, "num_res_blocks")
        self.attention_resolutions = attention_resolutions
        self.dropout, self.channel_mult, self.conv_resample, self.dims = (
            dropout,
            channel_mult,
            conv_resample,
            dims,
        )
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm, self.resblock_updown = use_scale_shift_norm, resblock_updown
        self.use_new_attention_order = use_new_attention_order
        self.use_spatial_transformer = use_spatial_transformer
        self.transformer_depth = per_level(transformer_depth, levels, "transformer_depth")
        self.context_dim = list(context_dim) if isinstance(context_dim, Sequence) else context_dim
        self.legacy = legacy
        self.disable_self_attentions = per_level(
            disable_self_attentions or False, levels, "disable_self_attentions"
        )
        self.num_attention_blocks = per_level(
            num_attention_blocks or max(self.num_res_blocks) + 1, levels, "num_attention_blocks"
        )
        self.disable_middle_self_attn = disable_middle_self_attn
        self.use_linear_in_transformer = use_linear_in_transformer
        self.predict_codebook_ids = False

        self.emb_channels = model_channels * 4
        self.time_embed = self._two_layers(model_channels)
        if num_classes is not None:
            self.label_emb = self.make_label_embedding(num_classes, adm_in_channels)
        self._build_encoder()
        self._build_middle()

    # ------------------------------------------------------------------------------------------- factories

    def make_res_block(
        self, channels: int, out_channels: int, up: bool = False, down: bool = False
    ) -> nn.Module:
        """A residual block called with (x, emb)."""
        return ResBlock(
            channels, self.emb_channels, self.dropout, out_channels, dims=self.dims, use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm, up=up, down=down,
        )  # fmt: skip

    def make_attention(
        self, channels: int, depth: int, disable_self_attn: bool = False, upward: bool = False
    ) -> nn.Module:
        """An attention block called with x, or a transformer of `depth` blocks called with (x, context)."""
        if self.use_spatial_transformer:
            heads = self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
            width = (
                channels // heads if self.legacy or self.num_head_channels == -1 else self.num_head_channels
            )
            return self.make_transformer(channels, heads, width, depth, disable_self_attn)
        # as published: without legacy, num_heads fixes the heads' width and with it the decoder's heads, too
        width = (
            self.num_head_channels
            if self.legacy or self.num_head_channels != -1
            else channels // self.num_heads
        )
        return AttentionBlock(
            channels, num_heads=self.num_heads_upsample if upward else self.num_heads, num_head_channels=width,
            use_checkpoint=self.use_checkpoint, use_new_attention_order=self.use_new_attention_order,
        )  # fmt: skip

    def make_transformer(
        self, channels: int, heads: int, width: int, depth: int, disable_self_attn: bool
    ) -> nn.Module:
        """A transformer called with (x, context)."""
        return SpatialTransformer(
            channels, heads, width, depth=depth, context_dim=self.context_dim, disable_self_attn=disable_self_attn,
            use_linear=self.use_linear_in_transformer, use_checkpoint=self.use_checkpoint,
        )  # fmt: skip

    def make_middle_attention(self) -> nn.Module:
        """What stands between the two residual blocks of the middle."""
        return self.make_attention(self.width, self.transformer_depth[-1], self.disable_middle_self_attn)

    def make_resample(self, channels: int, up: bool) -> nn.Module:
        """A layer that doubles or halves the size."""
        if self.resblock_updown:
            return self.make_res_block(channels, channels, up=up, down=not up)
        return (Upsample if up else Downsample)(channels, self.conv_resample, self.dims)

    # ---------------------------------------------------------------------------------------------- build

    def _two_layers(self, width: int) -> nn.Sequential:
        return nn.Sequential(
            linear(width, self.emb_channels), nn.SiLU(), linear(self.emb_channels, self.emb_channels)
        )

    def make_label_embedding(self, num_classes: int | str, adm_in_channels: int | None) -> nn.Module:
        """Labels to (b, 4 · model_channels)."""
        if isinstance(num_classes, int):
            return nn.Embedding(num_classes, self.emb_channels)
        if num_classes == "continuous":
            return linear(1, self.emb_channels)
        if num_classes == "sequential":
            if adm_in_channels is None:
                raise AssertionError(
                    "num_classes='sequential' needs adm_in_channels, the width of the vector"
                )
            return nn.Sequential(self._two_layers(adm_in_channels))
        raise ValueError(
            f"num_classes={num_classes!r} is unknown; give a number, 'continuous' or 'sequential'"
        )

    def _level(
        self, channels: int, out_channels: int, level: int, attends: bool, upward: bool = False
    ) -> list[nn.Module]:
        """A residual block and, where the level attends, its attention."""
        layers = [self.make_res_block(channels, out_channels)]
        if attends:
            layers.append(
                self.make_attention(
                    out_channels, self.transformer_depth[level], self.disable_self_attentions[level], upward
                )
            )
        return layers

    def _build_encoder(self) -> None:
        width, self.ds = self.model_channels, 1
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, width, 3, padding=1))]
        )
        self.skip_channels = [width]
        for level, mult in enumerate(self.channel_mult):
            for block in range(self.num_res_blocks[level]):
                attends = self.ds in self.attention_resolutions and block < self.num_attention_blocks[level]
                layers = self._level(width, mult * self.model_channels, level, attends)
                width = mult * self.model_channels
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.skip_channels.append(width)
            if level != len(self.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self.make_resample(width, up=False)))
                self.skip_channels.append(width)
                self.ds *= 2
        self.width = width

    def _build_middle(self) -> None:
        self.middle_block = TimestepEmbedSequential(
            self.make_res_block(self.width, self.width),
            self.make_middle_attention(),
            self.make_res_block(self.width, self.width),
        )

    def _build_decoder(self) -> None:
        width, ds, skips = self.width, self.ds, list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for block in range(self.num_res_blocks[level] + 1):
                attends = ds in self.attention_resolutions and block < self.num_attention_blocks[level]
                layers = self._level(
                    width + skips.pop(), mult * self.model_channels, level, attends, upward=True
                )
                width = mult * self.model_channels
                if level and block == self.num_res_blocks[level]:
                    layers.append(self.make_resample(width, up=True))
                    ds //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

    # ------------------------------------------------------------------------------------------------ run

    def convert_to_fp16(self) -> None:
        """Does nothing, as published: half precision comes from autocast or from `.half()`."""

    def convert_to_fp32(self) -> None:
        """Does nothing, as published."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.time_embed.parameters()).dtype

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The type to compute in: the configured one where autocast can follow it, else the weights' own."""
        weights = self.weight_dtype
        return (
            self.dtype if torch.is_autocast_enabled(x.device.type) and weights == torch.float32 else weights
        )

    def embed(self, timesteps: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """Time embedding, with that of the label added, (b, 4 · model_channels).

        Raises:
            AssertionError: a label without num_classes, or none with it (the published error class).
        """
        if (y is not None) != (self.num_classes is not None):
            raise AssertionError(
                f"num_classes={self.num_classes!r}, so y must {'' if self.num_classes is not None else 'not '}be given: "
                "labels go with a class-conditional model only"
            )
        t_emb = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(t_emb.to(self.weight_dtype))
        if y is not None:
            if y.shape[0] != batch:
                raise AssertionError(f"{y.shape[0]} labels for {batch} images")
            emb = emb + self.label_emb(y if y.dtype in (torch.int64, torch.int32) else y.to(emb.dtype))
        return emb

    def encode(self, h: Tensor, emb: Tensor, context: Any, **conditions: Any) -> tuple[Tensor, list[Tensor]]:
        """The middle's output, and those of the encoder's blocks."""
        skips = []
        for module in self.input_blocks:
            h = module(h, emb, context, **conditions)
            skips.append(h)
        return self.middle_block(h, emb, context, **conditions), skips


class UNetModel(UNetBackbone):
    """The noise predictor: a UNet with attention, time steps, and optionally labels and cross-attention.

    Args:
        image_size: stored only.
        in_channels, out_channels: channels in and out.
        model_channels: base width, a multiple of 32.
        num_res_blocks: residual blocks a level, one number or one for each level.
        attention_resolutions: *down-sampling factors* (1, 2, 4, …) at which to attend.
        dropout: rate inside the residual blocks.
        channel_mult: width multiplier of each level.
        conv_resample: resample with convolutions rather than by copying and averaging.
        dims: 1, 2 or 3 axes.
        num_classes: number of labels, "continuous" (one number an image) or "sequential" (a vector an image).
        use_checkpoint: compute again in the backward pass instead of keeping intermediate results.
        use_fp16, use_bf16: the type to compute in under autocast.
        num_heads, num_head_channels: number of heads, or width of one; one of them must be set.
        num_heads_upsample: heads in the decoder, for models without transformers.
        use_scale_shift_norm, resblock_updown: see `ResBlock`; the latter also resamples inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.
        use_spatial_transformer: transformers with cross-attention instead of attention blocks; needs context_dim.
        transformer_depth: blocks of each transformer, one number or one for each level.
        context_dim: width of the context.
        n_embed: predict logits over so many codes instead of noise.
        legacy: how heads are counted, see `make_attention`.
        disable_self_attentions: for each level, whether the transformers' self-attention looks at the context.
        num_attention_blocks: for each level, attention only after so many residual blocks.
        disable_middle_self_attn: as disable_self_attentions, for the middle.
        use_linear_in_transformer: see `SpatialTransformer`.
        adm_in_channels: width of the vector for num_classes="sequential".
        patch_size: fold squares of this size into channels before the first layer and unfold them after the last
            (space-to-depth): fewer, wider positions, for small machines.

    Raises:
        AssertionError: context_dim without use_spatial_transformer or the other way round, or no head count.
        ValueError: an option with as many entries as there are not levels.

    Source: Dhariwal & Nichol 2021, section 3; Rombach et al. 2022, section 3.3.
    """

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        patch_size: int = 1,
    ) -> None:
        self.check_context(use_spatial_transformer, context_dim)
        fold = patch_size**2
        super().__init__(
            image_size, in_channels * fold, model_channels, out_channels * fold, num_res_blocks, attention_resolutions, dropout,
            channel_mult, conv_resample, dims, num_classes, use_checkpoint, use_fp16, use_bf16, num_heads, num_head_channels,
            num_heads_upsample, use_scale_shift_norm, resblock_updown, use_new_attention_order, use_spatial_transformer,
            transformer_depth, context_dim, legacy, disable_self_attentions, num_attention_blocks, disable_middle_self_attn,
            use_linear_in_transformer, adm_in_channels,
        )  # fmt: skip
        self.in_channels, self.out_channels, self.patch_size = in_channels, out_channels, patch_size
        self.predict_codebook_ids = n_embed is not None
        self._build_decoder()
        self.out = nn.Sequential(
            normalization(model_channels * channel_mult[0]),
            nn.SiLU(),
            zero_module(conv_nd(dims, model_channels * channel_mult[0], out_channels * fold, 3, padding=1)),
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(
                normalization(model_channels * channel_mult[0]),
                conv_nd(dims, model_channels * channel_mult[0], n_embed, 1),
            )

    @staticmethod
    def check_context(use_spatial_transformer: bool, context_dim: int | Sequence[int] | None) -> None:
        """Raise AssertionError if one is set without the other."""
        if use_spatial_transformer and context_dim is None:
            raise AssertionError("use_spatial_transformer needs context_dim, the width of the context")
        if context_dim is not None and not use_spatial_transformer:
            raise AssertionError("context_dim is only used with use_spatial_transformer=True")

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Any = None,
        y: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Predict.

        Args:
            x: (b, in_channels, …).
            timesteps: (b,), whole numbers or fractions.
            context: (b, m, context_dim), or a list with one for each transformer block.
            y: labels (b,), numbers (b, 1) or vectors (b, adm_in_channels), exactly when num_classes is set.

        Returns:
            (b, out_channels, …), or logits (b, n_embed, …).

        Raises:
            ValueError: sizes that cannot be halved as often as the network does.
        """
        return self.predict(x, timesteps, context, y)

    def predict(
        self, x: Tensor, timesteps: Tensor | None, context: Any, y: Tensor | None, **conditions: Any
    ) -> Tensor:
        """`forward`, with further conditions by name for the layers that want them."""
        if timesteps is None:
            raise ValueError("the UNet needs timesteps, (b,)")
        self._check_size(x)
        emb = self.embed(timesteps, y, x.shape[0])
        h = F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        h, skips = self.encode(h.type(self.compute_dtype(x)), emb, context, **conditions)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context, **conditions)
        h = h.type(x.dtype) if x.dtype == torch.float32 and self.weight_dtype == torch.float32 else h
        if self.predict_codebook_ids:
            return self.id_predictor(h)
        h = self.out(h)
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h

    def _check_size(self, x: Tensor) -> None:
        factor = self.ds * self.patch_size
        odd = [n for n in x.shape[2 + (self.dims == 3) :] if n % factor]
        if odd:
            raise ValueError(
                f"the UNet halves its input {int(math.log2(factor))} times, so every side must be a multiple of {factor}, not "
                f"{' × '.join(map(str, x.shape[2:]))} (latent sizes: an image's height and width divided by the first stage's factor)"
            )


class EncoderUNetModel(UNetBackbone):
    """Encoder and middle of the UNet with a pooled output: the classifier on noisy images.

    The options are those of `UNetModel` without labels and context, and:

    Args:
        pool: "adaptive" (mean, then linear), "attention" (`AttentionPool2d`; needs num_head_channels), "spatial" or
            "spatial_v2" (a two-layer head on the means of every block's features).

    Raises:
        NotImplementedError: unknown pool.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        *args: Any,
        **ignored: Any,
    ) -> None:
        super().__init__(
            image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult,
            conv_resample, dims, use_checkpoint=use_checkpoint, use_fp16=use_fp16, num_heads=num_heads,
            num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order,
        )  # fmt: skip
        self.pool = pool
        features = sum(self.skip_channels) + self.width
        if pool == "adaptive":
            head = zero_module(conv_nd(dims, self.width, out_channels, 1))
            self.out = nn.Sequential(
                normalization(self.width), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), head, nn.Flatten()
            )
        elif pool == "attention":
            if num_head_channels == -1:
                raise AssertionError("pool='attention' needs num_head_channels")
            pooling = AttentionPool2d(image_size // self.ds, self.width, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(self.width), nn.SiLU(), pooling)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        elif pool == "spatial_v2":
            self.out = nn.Sequential(
                nn.Linear(features, 2048), normalization(2048), nn.SiLU(), nn.Linear(2048, out_channels)
            )
        else:
            raise NotImplementedError(
                f"pool={pool!r} is unknown; choose adaptive, attention, spatial or spatial_v2"
            )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """(b, in_channels, h, w), steps (b,) → (b, out_channels)."""
        emb = self.embed(timesteps, None, x.shape[0])
        h, skips = self.encode(x.type(self.compute_dtype(x)), emb, None)
        if self.pool.startswith("spatial"):
            return self.out(torch.cat([f.type(x.dtype).mean(dim=(2, 3)) for f in [*skips, h]], dim=-1))
        return self.out(h.type(x.dtype))


def per_level(value: Any, levels: int, name: str) -> list[Any]:
    """One value for each level: a single one is repeated, a list must have the right length.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(
            f"{name} has {len(value)} entries for {levels} levels of channel_mult; give one number, or one for each level"
        )
    return list(value)
