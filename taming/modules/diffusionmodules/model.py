"""Encoder and Decoder of every first stage (VQGAN, KL autoencoder), and the DDPM U-Net they descend from.

All of them assemble their levels through two overridable factories (`make_res_block`, `make_attention`), so that a
later chapter exchanges a block (a temporal one for video, say) without another copy of the loop.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import (
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
from taming.modules.diffusionmodules.variants import SimpleDecoder, UpsampleDecoder
from taming.util import nearest

__all__ = [
    "AttnBlock", "Decoder", "Downsample", "Encoder", "LinAttnBlock", "Model", "Normalize", "ResnetBlock",
    "SimpleDecoder", "Upsample", "UpsampleDecoder", "VUNet", "get_timestep_embedding", "make_attn", "nonlinearity",
]  # fmt: skip

logger = logging.getLogger(__name__)


class Levels(nn.Module):
    """A network made of resolution levels: what Encoder, Decoder and U-Net share.

    Args:
        ch: base width.
        ch_mult: width multiplier of each level, highest resolution first.
        num_res_blocks: residual blocks a level.
        attn_resolutions: sizes in pixels, counted from `resolution`, at which a level gets attention. It is decided
            here, not from the size of what comes in later.
        dropout: rate inside the residual blocks.
        resamp_with_conv: resample with convolutions rather than by copying and averaging.
        resolution: size of the training images.
        temb_channels: width of the time embedding, 0 for none.
        attn_type: a name `make_attn` knows.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        resamp_with_conv: bool,
        resolution: int,
        temb_channels: int,
        attn_type: str,
    ) -> None:
        super().__init__()
        self.ch = ch
        self.temb_ch = temb_channels
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.attn_type = attn_type
        self._dropout, self._with_conv = dropout, resamp_with_conv
        self._widths = [ch * m for m in ch_mult]
        self._attends = [resolution // 2**i in attn_resolutions for i in range(len(ch_mult))]

    def make_res_block(self, in_channels: int, out_channels: int) -> nn.Module:
        """A residual block that is called with (x, time embedding)."""
        return ResnetBlock(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_ch,
            dropout=self._dropout,
        )

    def make_attention(self, channels: int) -> nn.Module:
        """An attention block that is called with x."""
        return make_attn(channels, attn_type=self.attn_type)

    def make_level(self, widths_in: Sequence[int], level: int) -> nn.Module:
        """Residual blocks of one level (as many as `widths_in`), each with attention where the level attends."""
        stage, width = nn.Module(), self._widths[level]
        stage.block = nn.ModuleList(self.make_res_block(w, width) for w in widths_in)
        stage.attn = nn.ModuleList(self.make_attention(width) for _ in widths_in if self._attends[level])
        return stage

    def make_mid(self, channels: int, in_channels: int | None = None) -> nn.Module:
        """The middle at the lowest resolution: block, attention (always, whatever `attn_resolutions` says), block."""
        mid = nn.Module()
        mid.block_1 = self.make_res_block(in_channels or channels, channels)
        mid.attn_1 = self.make_attention(channels)
        mid.block_2 = self.make_res_block(channels, channels)
        return mid

    def make_down(self, skips: bool = False) -> tuple[nn.ModuleList, list[int]]:
        """The descending levels, and the widths of what they leave behind (for skip connections)."""
        down, width, left = nn.ModuleList(), self.ch, [self.ch]
        for i, next_width in enumerate(self._widths):
            stage = self.make_level(
                [width] + [next_width] * (self.num_res_blocks - 1) if self.num_res_blocks else [], i
            )
            width = next_width if self.num_res_blocks else width
            left += [width] * self.num_res_blocks
            if i != self.num_resolutions - 1:
                stage.downsample = Downsample(width, self._with_conv)
                left.append(width)
            down.append(stage)
        return down, left

    def make_up(self, width: int, skips: list[int] | None = None) -> tuple[nn.ModuleList, int]:
        """The ascending levels, lowest resolution last in the list, and the width they end with.

        Args:
            width: channels that come from the middle.
            skips: widths to concatenate, last used first; None for a decoder without skip connections.
        """
        up = nn.ModuleList()
        skips = list(skips) if skips is not None else None
        for i in reversed(range(self.num_resolutions)):
            widths_in = []
            for _ in range(self.num_res_blocks + 1):
                widths_in.append(width + (skips.pop() if skips is not None else 0))
                width = self._widths[i]
            stage = self.make_level(widths_in, i)
            if i != 0:
                stage.upsample = Upsample(width, self._with_conv)
            up.insert(0, stage)
        return up, width

    @staticmethod
    def steps(stage: Any) -> Iterator[tuple[Any, Any]]:
        """The residual blocks of a level, each with its attention or None."""
        for i, block in enumerate(stage.block):
            yield block, stage.attn[i] if len(stage.attn) else None

    @staticmethod
    def run_mid(mid: Any, h: Tensor, temb: Tensor | None, **conditions: Any) -> Tensor:
        """Apply what `make_mid` made."""
        h = mid.attn_1(mid.block_1(h, temb, **conditions), **conditions)
        return mid.block_2(h, temb, **conditions)


class Encoder(Levels):
    """Images to latents: `z_channels` channels at 1/2^(levels-1) of the size (twice as many if `double_z`).

    The parameters are those of `Levels`, and:

    Args:
        out_ch: unused; configurations give encoder and decoder the same options.
        in_channels: channels of the image.
        z_channels: channels of the latent.
        double_z: put out mean and log-variance.
        use_linear_attn: `attn_type="linear"`.
        ignored: options of the decoder; any other name gets a warning.

    Source: Esser et al. 2021 (VQGAN), table 7.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored: Any,
    ) -> None:
        super().__init__(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resamp_with_conv=resamp_with_conv, resolution=resolution, temb_channels=0,
            attn_type="linear" if use_linear_attn else attn_type,
        )  # fmt: skip
        _warn_about(ignored)
        self.in_channels = in_channels
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, widths = self.make_down()
        self.mid = self.make_mid(widths[-1])
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) in [-1, 1] → (b, z or 2z, h / 2^(levels-1), w / 2^(levels-1))."""
        h = self.conv_in(x)
        stage: Any
        for i, stage in enumerate(self.down):
            for block, attend in self.steps(stage):
                h = block(h, None)
                h = attend(h) if attend is not None else h
            if i != self.num_resolutions - 1:
                h = stage.downsample(h)
        h = self.run_mid(self.mid, h, None)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(Levels):
    """Latents to images, the mirror of `Encoder` with one more residual block a level.

    Args:
        double_z: unused; configurations give encoder and decoder the same options.
        give_pre_end: return the features before the last normalisation (`norm_out`, `conv_out` exist all the same).
        tanh_out: squash the output to (-1, 1).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored: Any,
    ) -> None:
        super().__init__(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resamp_with_conv=resamp_with_conv, resolution=resolution, temb_channels=0,
            attn_type="linear" if use_linear_attn else attn_type,
        )  # fmt: skip
        _warn_about(ignored)
        self.in_channels = in_channels
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        size = resolution // 2 ** (self.num_resolutions - 1)
        self.z_shape = (1, z_channels, size, size)
        self.last_z_shape: torch.Size | None = None
        width = self._widths[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = self.make_mid(width)
        self.up, width = self.make_up(width)
        self.norm_out = Normalize(width)
        self.conv_out: Any = self.make_conv_out(width, out_ch)

    def make_conv_out(self, channels: int, out_channels: int) -> nn.Module:
        """The last layer."""
        return nn.Conv2d(channels, out_channels, 3, padding=1)

    def get_last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss."""
        return self.conv_out.weight

    def forward(self, z: Tensor, **conditions: Any) -> Tensor:
        """(b, z_channels, h, w) → (b, out_ch, h·2^(levels-1), w·2^(levels-1)); conditions go to every block and to the last layer."""
        self.last_z_shape = z.shape
        h = self.run_mid(self.mid, self.conv_in(z), None, **conditions)
        for i in reversed(range(self.num_resolutions)):
            stage: Any = self.up[i]
            for block, attend in self.steps(stage):
                h = block(h, None, **conditions)
                h = attend(h, **conditions) if attend is not None else h
            if i != 0:
                h = stage.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)), **conditions)
        return torch.tanh(h) if self.tanh_out else h


class Model(Levels):
    """The U-Net of DDPM, with attention at chosen resolutions.

    Args:
        use_timestep: whether `forward` wants a time step. The projections for one exist either way.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        use_timestep: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resamp_with_conv=resamp_with_conv, resolution=resolution, temb_channels=4 * ch,
            attn_type="linear" if use_linear_attn else attn_type,
        )  # fmt: skip
        self.in_channels = in_channels
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList(
                [nn.Linear(ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)]
            )
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, skips = self.make_down()
        self.mid = self.make_mid(skips[-1], self.mid_channels(skips[-1]))
        self.up, width = self.make_up(skips[-1], skips)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def mid_channels(self, width: int) -> int:
        """Channels that enter the middle, when `width` come from the descent."""
        return width

    def embed(self, t: Tensor | None) -> Tensor | None:
        """The time embedding, (b,) → (b, 4 ch), or None for a network without time."""
        if not self.use_timestep:
            return None
        if t is None:
            raise ValueError("this Model was built with use_timestep=True, so forward needs t")
        layers: Any = self.temb.dense
        first, second = layers
        return second(nonlinearity(first(get_timestep_embedding(t, self.ch))))

    def descend(self, x: Tensor, temb: Tensor | None) -> list[Tensor]:
        """The features after every block on the way down, the lowest last."""
        features = [self.conv_in(x)]
        stage: Any
        for i, stage in enumerate(self.down):
            for block, attend in self.steps(stage):
                h = block(features[-1], temb)
                features.append(attend(h) if attend is not None else h)
            if i != self.num_resolutions - 1:
                features.append(stage.downsample(features[-1]))
        return features

    def ascend(self, h: Tensor, features: list[Tensor], temb: Tensor | None) -> Tensor:
        """From the middle up to the output, taking the features of the descent back in, last first."""
        for i in reversed(range(self.num_resolutions)):
            stage: Any = self.up[i]
            for block, attend in self.steps(stage):
                h = block(torch.cat([h, features.pop()], dim=1), temb)
                h = attend(h) if attend is not None else h
            if i != 0:
                h = stage.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))

    def get_last_layer(self) -> Tensor:
        """The weight of the output convolution."""
        return self.conv_out.weight

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """(b, in_channels, h, w), steps (b,) → (b, out_ch, h, w); a context of the same size joins x's channels."""
        if context is not None:
            x = torch.cat([x, context], dim=1)
        temb = self.embed(t)
        features = self.descend(x, temb)
        return self.ascend(self.run_mid(self.mid, features[-1], temb), features, temb)


class VUNet(Model):
    """A `Model` without time that takes a latent into its middle.

    Args:
        c_channels: channels of the input image (the condition).
        in_channels: unused, as published.
        z_channels: channels of the latent.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        c_channels: int,
        resolution: int,
        z_channels: int,
        use_timestep: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__(
            ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions,
            dropout=dropout, resamp_with_conv=resamp_with_conv, in_channels=c_channels, resolution=resolution,
            use_timestep=use_timestep,
        )  # fmt: skip
        _warn_about(ignored)
        self.z_in = nn.Conv2d(z_channels, self._widths[-1], 1)

    def mid_channels(self, width: int) -> int:
        """Room for the latent beside the descent's features."""
        return 2 * width

    def forward(self, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """(b, c_channels, h, w) and a latent (b, z_channels, h / 2^(levels-1), …) → (b, out_ch, h, w)."""
        temb = self.embed(t)
        features = self.descend(x, temb)
        h = torch.cat([features[-1], self.z_in(z)], dim=1)
        return self.ascend(self.run_mid(self.mid, h, temb), features, temb)


# options of one first-stage network that another, given the same ddconfig, has no use for
_SHARED_OPTIONS = {
    "ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv", "in_channels", "resolution",
    "z_channels", "double_z", "use_linear_attn", "attn_type", "give_pre_end", "tanh_out", "c_channels", "use_timestep",
}  # fmt: skip


def _warn_about(ignored: Mapping[str, Any]) -> None:
    for name in sorted(set(ignored) - _SHARED_OPTIONS):
        warnings.warn(
            f"first-stage option {name!r} is unknown and has no effect. {nearest(name, _SHARED_OPTIONS)}",
            stacklevel=3,
        )
