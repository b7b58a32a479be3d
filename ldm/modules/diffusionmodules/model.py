"""First-stage networks: those of `taming.modules.diffusionmodules`, importable here, and what rescales latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention
from ldm.modules.distributions.distributions import likeliest
from taming.modules.diffusionmodules.blocks import (
    ATTENTION_TYPES,
    AttnBlock,
    Downsample,
    LinAttnBlock,
    Normalize,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
    nonlinearity,
)
from taming.modules.diffusionmodules.model import Decoder, Encoder, Model, SimpleDecoder, UpsampleDecoder
from taming.util import freeze, instantiate_from_config

MemoryEfficientAttnBlock = AttnBlock  # the name of an old back-end; the layer is the same

__all__ = [
    "AttnBlock", "Decoder", "Downsample", "Encoder", "FirstStagePostProcessor", "LatentRescaler", "LinAttnBlock",
    "MemoryEfficientAttnBlock", "MemoryEfficientCrossAttentionWrapper", "MergedRescaleDecoder", "MergedRescaleEncoder", "Model", "Normalize",
    "Resize", "ResnetBlock", "SimpleDecoder", "Upsample", "UpsampleDecoder", "Upsampler", "get_timestep_embedding", "make_attn",
    "nonlinearity",
]  # fmt: skip


class MemoryEfficientCrossAttentionWrapper(CrossAttention):
    """Attention of an image's pixels to themselves or to a context, added to the image."""

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w), and a context (b, n, context_dim) or None → (b, c, h, w)."""
        out = super().forward(rearrange(x, "b c h w -> b (h w) c"), context=context, mask=mask)
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])


def _over_pixels(in_channels: int, **options: Any) -> nn.Module:
    return MemoryEfficientCrossAttentionWrapper(query_dim=in_channels, **options)


# a name that configurations may give as attn_type; its layer is at home here, above the table's own package
ATTENTION_TYPES["memory-efficient-cross-attn"] = _over_pixels


class LatentRescaler(nn.Module):
    """Residual blocks, a change of size, attention, residual blocks.

    Args:
        factor: of both sides, which are rounded.
        in_channels: channels in.
        mid_channels: width between, a multiple of 32.
        out_channels: channels out.
        depth: residual blocks before, and after.
    """

    def __init__(
        self, factor: float, in_channels: int, mid_channels: int, out_channels: int, depth: int = 2
    ) -> None:
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(in_channels, mid_channels, 3, padding=1)

        def blocks() -> nn.ModuleList:
            options: dict[str, Any] = {"in_channels": mid_channels, "temb_channels": 0, "dropout": 0.0}
            return nn.ModuleList(ResnetBlock(**options) for _ in range(depth))

        self.res_block1 = blocks()
        self.attn = AttnBlock(mid_channels)
        self.res_block2 = blocks()
        self.conv_out = nn.Conv2d(mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) → (b, out, round(h · factor), round(w · factor))."""
        height, width = (round(n * self.factor) for n in x.shape[2:])
        x = self.conv_in(x)
        for block in self.res_block1:
            x = block(x, None)
        x = self.attn(F.interpolate(x, size=(height, width)))
        for block in self.res_block2:
            x = block(x, None)
        return self.conv_out(x)


class MergedRescaleEncoder(nn.Module):
    """An `Encoder` and a `LatentRescaler` behind it: latents of another size than a power of two allows.

    Args:
        out_ch: channels out.
        rescale_factor: of the latents' sides.
        rescale_module_depth: residual blocks before and after the change of size.
        ch, resolution, …: as of `Encoder`.
    """

    def __init__(
        self,
        in_channels: int,
        ch: int,
        resolution: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.encoder = Encoder(
            ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resamp_with_conv=resamp_with_conv, in_channels=in_channels, resolution=resolution, z_channels=width, double_z=False,
        )  # fmt: skip
        self.rescaler = LatentRescaler(rescale_factor, width, width, out_ch, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_ch, h', w')."""
        return self.rescaler(self.encoder(x))


class MergedRescaleDecoder(nn.Module):
    """A `LatentRescaler` and a `Decoder` behind it, the mirror of `MergedRescaleEncoder`.

    Args:
        z_channels: channels of the latent; `z_channels * ch_mult[-1]` must be a multiple of 32.
        out_ch: channels of the image.
        rescale_factor: of the latents' sides.
        rescale_module_depth: residual blocks before and after the change of size.
        ch, resolution, …: as of `Decoder`.
    """

    def __init__(
        self,
        z_channels: int,
        out_ch: int,
        resolution: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = z_channels * ch_mult[-1]
        self.decoder = Decoder(
            ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resamp_with_conv=resamp_with_conv, in_channels=out_ch, resolution=resolution, z_channels=width,
        )  # fmt: skip
        self.rescaler = LatentRescaler(rescale_factor, z_channels, width, width, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        """(b, z_channels, h', w') → (b, out_ch, h, w)."""
        return self.decoder(self.rescaler(x))


class Upsampler(nn.Module):
    """Enlarges feature maps by about `out_size / in_size`: first by 1 + out_size mod in_size, then by doublings.

    Args:
        in_size: side of what comes in.
        out_size: side of what is wanted, at least `in_size`.
        in_channels: channels in, a multiple of 32.
        out_channels: channels out.
        ch_mult: width of the doubling levels, as a multiple of `in_channels`.
    """

    def __init__(
        self, in_size: int, out_size: int, in_channels: int, out_channels: int, ch_mult: int = 2
    ) -> None:
        super().__init__()
        if out_size < in_size:
            raise AssertionError(f"out_size={out_size} must be at least in_size={in_size}")
        levels = int(math.log2(out_size // in_size)) + 1
        factor = 1.0 + out_size % in_size
        self.rescaler = LatentRescaler(factor, in_channels, 2 * in_channels, in_channels)
        self.decoder = Decoder(
            ch=in_channels, out_ch=out_channels, ch_mult=[ch_mult] * levels, num_res_blocks=2, attn_resolutions=[],
            in_channels=in_channels, resolution=out_size, z_channels=in_channels,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_channels, h', w')."""
        return self.decoder(self.rescaler(x))


class Resize(nn.Module):
    """Interpolation by a factor.

    Args:
        in_channels: unused.
        learned: must be False.
        mode: of `torch.nn.functional.interpolate`.
    """

    def __init__(self, in_channels: int | None = None, learned: bool = False, mode: str = "bilinear") -> None:
        super().__init__()
        if learned:
            raise NotImplementedError("a learned resize was never published; pass learned=False")
        self.mode = mode

    def forward(self, x: Tensor, scale_factor: float = 1.0) -> Tensor:
        """(b, c, h, w) → (b, c, h · factor, w · factor); x itself if the factor is 1."""
        if scale_factor == 1.0:
            return x
        corners = None if self.mode in ("nearest", "nearest-exact", "area") else False
        return F.interpolate(x, mode=self.mode, align_corners=corners, scale_factor=scale_factor)


class FirstStagePostProcessor(nn.Module):
    """Features of a frozen first stage's latents, at ever smaller sizes.

    Args:
        ch_mult: width of each level, as a multiple of `n_channels`; every level halves the size.
        in_channels: channels of the latents, an even number.
        pretrained_model: the first stage; or
        pretrained_config: its configuration.
        reshape: return tokens instead of a map.
        n_channels: base width; the encoder's `ch` if None.
        dropout: rate in the residual blocks.

    Raises:
        AssertionError: neither first stage is given (the published error class).
    """

    pretrained_model: Any

    def __init__(
        self,
        ch_mult: Sequence[int],
        in_channels: int,
        pretrained_model: nn.Module | None = None,
        reshape: bool = False,
        n_channels: int | None = None,
        dropout: float = 0.0,
        pretrained_config: Any = None,
    ) -> None:
        super().__init__()
        if pretrained_config is None and pretrained_model is None:
            raise AssertionError("name a first stage: pretrained_model, or pretrained_config")
        first_stage = (
            instantiate_from_config(pretrained_config) if pretrained_model is None else pretrained_model
        )
        self.pretrained_model = freeze(first_stage)
        self.do_reshape = reshape
        width = self.pretrained_model.encoder.ch if n_channels is None else n_channels
        self.proj_norm = Normalize(in_channels, num_groups=in_channels // 2)
        self.proj = nn.Conv2d(in_channels, width, 3, padding=1)
        widths = [width, *(m * width for m in ch_mult)]
        self.model = nn.ModuleList(
            ResnetBlock(in_channels=w_in, out_channels=w_out, dropout=dropout)
            for w_in, w_out in pairwise(widths)
        )
        self.downsampler = nn.ModuleList(Downsample(w, with_conv=False) for w in widths[1:])

    @torch.no_grad()
    def encode_with_pretrained(self, x: Tensor) -> Tensor:
        """Latents of images, the posterior's mode where there is a posterior."""
        return likeliest(self.pretrained_model.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) → features (b, d, h', w'), or (b, h'·w', d) if so configured."""
        z = nonlinearity(self.proj(self.proj_norm(self.encode_with_pretrained(x))))
        for block, shrink in zip(self.model, self.downsampler, strict=True):
            z = shrink(block(z, None))
        return rearrange(z, "b c h w -> b (h w) c") if self.do_reshape else z
