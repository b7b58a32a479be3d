"""Smaller decoders of the first-stage family; `model.py` re-exports them under their published path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import Normalize, ResnetBlock, Upsample, nonlinearity


class SimpleDecoder(nn.Module):
    """Three residual blocks between 1×1 convolutions, one doubling, an output convolution.

    Args:
        in_channels: channels in, a multiple of 32.
        out_channels: channels out.
    """

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **ignored: Any) -> None:
        super().__init__()

        def block(width_in: int, width_out: int) -> ResnetBlock:
            return ResnetBlock(in_channels=width_in, out_channels=width_out, temb_channels=0, dropout=0.0)

        self.model = nn.ModuleList(
            [
                nn.Conv2d(in_channels, in_channels, 1),
                block(in_channels, 2 * in_channels),
                block(2 * in_channels, 4 * in_channels),
                block(4 * in_channels, 2 * in_channels),
                nn.Conv2d(2 * in_channels, in_channels, 1),
                Upsample(in_channels, with_conv=True),
            ]
        )
        self.norm_out = Normalize(in_channels)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) → (b, out, 2h, 2w)."""
        for layer in self.model:
            x = layer(x, None) if isinstance(layer, ResnetBlock) else layer(x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class UpsampleDecoder(nn.Module):
    """Levels of residual blocks with a doubling between them, lowest resolution first.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        ch: base width.
        num_res_blocks: residual blocks a level, less one.
        resolution: size of the output.
        ch_mult: width multiplier of each level, from the lowest resolution up.
        dropout: rate inside the blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        num_res_blocks: int,
        resolution: int,
        ch_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.res_blocks = nn.ModuleList()
        self.upsample_blocks = nn.ModuleList()
        width = in_channels
        for level, multiplier in enumerate(ch_mult):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(
                    ResnetBlock(
                        in_channels=width, out_channels=ch * multiplier, temb_channels=0, dropout=dropout
                    )
                )
                width = ch * multiplier
            self.res_blocks.append(blocks)
            if level != self.num_resolutions - 1:
                self.upsample_blocks.append(Upsample(width, True))
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) → (b, out, h·2^(levels-1), w·2^(levels-1))."""
        blocks: Any
        for level, blocks in enumerate(self.res_blocks):
            for block in blocks:
                x = block(x, None)
            if level != self.num_resolutions - 1:
                x = self.upsample_blocks[level](x)
        return self.conv_out(nonlinearity(self.norm_out(x)))
