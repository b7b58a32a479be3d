"""The building blocks of the first-stage networks: normalisation, resampling, residual and attention blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.attention import LinearAttention, attention
from taming.util import nearest


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal position code of Vaswani et al. 2017 as DDPM uses it: all sines, then all cosines.

    Args:
        timesteps: (n,), any number type.
        embedding_dim: width; an odd one ends in a column of zeros.

    Returns:
        (n, embedding_dim) in float32.

    Source: Ho et al. 2020, appendix B. The frequencies run to 1/10000 inclusive (`half - 1` intervals), unlike those
    of `ldm.modules.diffusionmodules.util.timestep_embedding`.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must have one axis, not shape {tuple(timesteps.shape)}")
    half = embedding_dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(code, (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """Swish, x·σ(x)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation with ε = 1e-6."""
    if in_channels % num_groups:
        raise ValueError(
            f"Group normalisation wants a multiple of {num_groups} channels, not {in_channels}; "
            f"choose ch and ch_mult so that every width divides by {num_groups}."
        )
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, 2h, 2w)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halving: a 3×3 convolution of stride 2 if `with_conv`, else the mean of 2×2 pixels."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h // 2, w // 2)."""
        if self.with_conv:
            # odd kernel, stride 2: zeros at the right and bottom only, as the published weights were trained
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, kernel_size=2, stride=2)


class ResnetBlock(nn.Module):
    """norm – swish – conv, twice, with an optional time embedding between, added to its input.

    Args:
        in_channels: channels in.
        out_channels: channels out; as many as in if None.
        conv_shortcut: where the widths differ, the shortcut is a 3×3 convolution instead of 1×1.
        dropout: rate before the second convolution.
        temb_channels: width of the time embedding; 0 builds no projection for one.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels = in_channels if out_channels is None else out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """(b, in, h, w) and (b, temb_channels) or None → (b, out, h, w)."""
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def attention(self, h: Tensor) -> Tensor:
        """Attention over the pixels of normalised features, (b, c, h, w) → (b, c, h, w)."""
        height, width = h.shape[-2:]
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        return rearrange(attention(q, k, v), "b (h w) c -> b c h w", h=height, w=width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        return x + self.proj_out(self.attention(self.norm(x)))


class LinAttnBlock(LinearAttention):
    """Single-head `LinearAttention` of full width; no normalisation and no residual, as published."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


def _identity(in_channels: int, **kwargs: Any) -> nn.Module:
    return nn.Identity()


ATTENTION_TYPES: dict[str, Any] = {
    "vanilla": AttnBlock,
    "vanilla-xformers": AttnBlock,  # an old back-end's name; the layer is the same
    "linear": LinAttnBlock,
    "none": _identity,
}


def make_attn(
    in_channels: int, attn_type: str = "vanilla", attn_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """The attention block that a configuration's `attn_type` names.

    Raises:
        AssertionError: unknown type (the published error class); the message lists the known ones.
    """
    if attn_type not in ATTENTION_TYPES:
        raise AssertionError(f"attn_type {attn_type!r} unknown. {nearest(attn_type, ATTENTION_TYPES)}")
    return ATTENTION_TYPES[attn_type](in_channels, **(attn_kwargs or {}))
