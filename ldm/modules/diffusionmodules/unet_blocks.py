"""The UNet's building blocks: resampling, residual and attention blocks; `openaimodel.py` re-exports them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from taming.modules.attention import attention


class TimestepBlock(nn.Module):
    """A module whose forward takes the time embedding as its second argument."""

    wants: Mapping[str, str] = {}  # see `TimestepEmbedSequential`

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(b, c, …) and (b, emb_channels) → (b, c', …)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands each layer the conditions it wants.

    Residual blocks (every `TimestepBlock`) get the time embedding, transformers the context. What else a layer wants stands in its
    table `wants`: argument of its forward → name of the condition.
    """

    def forward(self, x: Tensor, emb: Tensor, context: Any = None, **conditions: Any) -> Tensor:
        """Apply the layers in order."""
        given = {"emb": emb, "context": context, **conditions}
        for layer in self:
            if isinstance(layer, TimestepEmbedSequential):
                x = layer(x, emb, context, **conditions)
            elif isinstance(layer, TimestepBlock):
                x = layer(x, emb, **self._wanted(layer, given))
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, **self._wanted(layer, given))
            else:
                x = layer(x)
        return x

    @staticmethod
    def _wanted(layer: TimestepBlock | SpatialTransformer, given: Mapping[str, Any]) -> dict[str, Any]:
        return {argument: given.get(name) for argument, name in layer.wants.items()}


class Timestep(nn.Module):
    """`timestep_embedding` as a module without weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(b,) → (b, dim)."""
        return timestep_embedding(t, self.dim)


# ---------------------------------------------------------------------------------------------------------- resampling


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a convolution if `use_conv`.

    Args:
        channels: channels in.
        use_conv: whether a convolution follows.
        dims: 1, 2 or 3 axes; of three, the first keeps its size.
        out_channels: channels out; as in if None.
        padding: of the convolution.
        third_up: enlarge the first of three axes, too.
        kernel_size: of the convolution.
        scale_factor: how much larger.
    """

    def __init__(
        self,
        channels: int,
        use_conv: bool,
        dims: int = 2,
        out_channels: int | None = None,
        padding: int = 1,
        third_up: bool = False,
        kernel_size: int = 3,
        scale_factor: int = 2,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.third_up, self.scale_factor = third_up, scale_factor
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, …) → (b, out_channels, scale_factor·…)."""
        if x.shape[1] != self.channels:
            raise ValueError(f"Upsample was built for {self.channels} channels, not {x.shape[1]}")
        kept = int(self.dims == 3 and not self.third_up)
        sizes = x.shape[2:]
        x = F.interpolate(x, (*sizes[:kept], *(n * self.scale_factor for n in sizes[kept:])), mode="nearest")
        return self.conv(x) if self.use_conv else x


class TransposedUpsample(nn.Module):
    """Doubling by a transposed convolution without padding."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.up = nn.ConvTranspose2d(channels, self.out_channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, out_channels, 2h + ks - 2, 2w + ks - 2)."""
        return self.up(x)


class Downsample(nn.Module):
    """Halving: a convolution of stride 2 (padded on all sides) if `use_conv`, else an average.

    Args:
        channels: channels in.
        use_conv: convolution or average.
        dims: 1, 2 or 3 axes; of three, the first keeps its size.
        out_channels: channels out; as in if None.
        padding: of the convolution.
        third_down: halve the first of three axes, too.
    """

    def __init__(
        self,
        channels: int,
        use_conv: bool,
        dims: int = 2,
        out_channels: int | None = None,
        padding: int = 1,
        third_down: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = (1, 2, 2) if dims == 3 and not third_down else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels != channels:
            raise ValueError(
                f"an average cannot turn {channels} channels into {self.out_channels}; use a convolution"
            )
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, …) → (b, out_channels, …/2)."""
        if x.shape[1] != self.channels:
            raise ValueError(f"Downsample was built for {self.channels} channels, not {x.shape[1]}")
        return self.op(x)


# -------------------------------------------------------------------------------------------------------------- blocks


class ResBlock(TimestepBlock):
    """norm – swish – conv, twice, with the time embedding between, added to its input.

    Args:
        channels: channels in.
        emb_channels: width of the time embedding.
        dropout: rate before the second convolution.
        out_channels: channels out; as in if None.
        use_conv: where the widths differ, the shortcut is a convolution of width `kernel_size` instead of 1.
        use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added before it.
        dims: 1, 2 or 3 axes.
        use_checkpoint: compute again in the backward pass instead of keeping intermediate results.
        up, down: double or halve the size inside.
        kernel_size: odd width of the convolutions, one number or one for each axis.

    Source: Dhariwal & Nichol 2021, section 3.
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
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)
        conv = partial(conv_nd, dims, kernel_size=kernel, padding=tuple(k // 2 for k in kernel))
        self.channels, self.out_channels = channels, out_channels or channels
        self.emb_channels = emb_channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv(channels, self.out_channels))
        if self.updown:
            resample = Upsample if up else Downsample
            self.h_upd: nn.Module = resample(channels, False, dims)
            self.x_upd: nn.Module = resample(channels, False, dims)
        else:
            self.h_upd, self.x_upd = nn.Identity(), nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, self.out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv(self.out_channels, self.out_channels)),
        )
        if self.out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv(channels, self.out_channels)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(b, channels, …) and (b, emb_channels) → (b, out_channels, …)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_swish, conv = self.in_layers[:-1], self.in_layers[-1]
        h = conv(self.h_upd(norm_swish(x)))
        x = self.x_upd(x)
        shift = self.embed(emb, h)
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            norm, rest = self.out_layers[0], self.out_layers[1:]
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h

    def embed(self, emb: Tensor, h: Tensor) -> Tensor:
        """What the time embedding adds to the features h, or scale and shift of their norm: (b, c, 1, …)."""
        shift = self.emb_layers(emb).type(h.dtype)
        return shift.reshape(*shift.shape, *((1,) * (h.ndim - shift.ndim)))


def count_flops_attn(model: Any, _x: Any, y: Sequence[Tensor]) -> None:
    """Hook for the `thop` package: add the multiplications of an attention to `model.total_ops`."""
    b, c, *spatial = y[0].shape
    n = math.prod(spatial)
    model.total_ops += torch.DoubleTensor([2 * b * n**2 * c])


class QKVAttentionLegacy(nn.Module):
    """Attention over (b, heads · 3 · d, n): each head's queries, keys and values lie together."""

    layout = "b (h three d) n -> three b n (h d)"

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(b, 3 · heads · d, n) → (b, heads · d, n)."""
        if qkv.shape[1] % (3 * self.n_heads):
            raise ValueError(
                f"{qkv.shape[1]} channels cannot be queries, keys and values of {self.n_heads} heads"
            )
        q, k, v = rearrange(qkv, self.layout, three=3, h=self.n_heads)
        return rearrange(attention(q, k, v, self.n_heads), "b n c -> b c n")

    count_flops = staticmethod(count_flops_attn)


class QKVAttention(QKVAttentionLegacy):
    """Attention over (b, 3 · heads · d, n): all queries first, then all keys, then all values."""

    layout = "b (three h d) n -> three b n (h d)"


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, added to its input; on any number of axes.

    Args:
        channels: channels in and out.
        num_heads: number of heads, unless `num_head_channels` is set.
        num_head_channels: width of a head; -1 for channels / num_heads.
        use_checkpoint: accepted, as published: this block is always checkpointed.
        use_new_attention_order: `QKVAttention` instead of `QKVAttentionLegacy`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if num_head_channels != -1 and channels % num_head_channels:
            raise AssertionError(
                f"{channels} channels are not divisible by num_head_channels={num_head_channels}"
            )
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, …) → (b, c, …)."""
        return checkpoint(self._forward, (x,), self.parameters(), True)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        h = self.proj_out(self.attention(self.qkv(self.norm(flat))))
        return (flat + h).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Pooling by attention: a token of means looks at all pixels.

    Args:
        spacial_dim: height and width in.
        embed_dim: channels in.
        num_heads_channels: width of a head.
        output_dim: channels out; as in if None.

    Source: Radford et al. 2021 (CLIP), section 2.4.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(b, embed_dim, s, s) → (b, output_dim)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding[None].to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]
