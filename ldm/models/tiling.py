"""Encoding and decoding pictures of any size in little memory, by tiles, by strips, and image by image.

Two ways, chosen by `Tiling.exact`:

- *blended*: overlapping tiles go through the network one after the other and fade into each other. Memory depends on the
  tile alone. All tiles are normalised alike, by statistics of the picture shrunk to a tile, and each attends to itself only,
  so the result is close, not equal.
- *exact*: layer by layer over the whole feature map, in strips of rows. Normalisation uses the statistics of the whole
  map, convolutions see the rows above and below their strip, attention sees everything: equal to rounding. Memory is that
  of two feature maps, several times less than without strips, and grows with the picture.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import AttnBlock, Downsample, ResnetBlock, Upsample
from taming.modules.diffusionmodules.model import Decoder, Encoder


@dataclass(frozen=True)
class Tiling:
    """How large pictures are cut.

    Args:
        size: side of a tile in pixels; pictures with no longer side are not cut. In exact mode, strips have as many
            pixels as such a tile.
        overlap: share of a tile that it shares with the next, in [0, 0.5].
        exact: equal to the whole picture's result, at the cost of more memory.
        slicing: one image of a batch at a time, whatever its size.

    Raises:
        ValueError: a size or an overlap that makes no tiles.
    """

    size: int = 512
    overlap: float = 0.25
    exact: bool = False
    slicing: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} is the side of a tile in pixels; choose 256 or more")
        if not 0 <= self.overlap <= 0.5:
            raise ValueError(f"overlap={self.overlap} is the share of a tile; choose it from 0 to 0.5")


class Tiled:
    """Mixed into a first stage: its `encoder` and `decoder` are run by `run_encoder` and `run_decoder`."""

    encoder: Encoder
    decoder: Decoder
    tiling: Tiling | None = None

    def enable_tiling(
        self, size: int = 512, overlap: float = 0.25, exact: bool = False, slicing: bool = True
    ) -> None:
        """From now on, cut pictures with a side above `size`; the parameters are those of `Tiling`."""
        self.tiling = Tiling(size, overlap, exact, slicing)

    def disable_tiling(self) -> None:
        """From now on, take pictures whole."""
        self.tiling = None

    def run_encoder(self, x: Tensor) -> Tensor:
        """The encoder's output, (b, c, h, w) → (b, z, h', w')."""
        return _run(self.encoder, x, self.tiling, 1, encode_by_strips)

    def run_decoder(self, h: Tensor) -> Tensor:
        """The decoder's output, (b, z, h', w') → (b, c, h, w)."""
        factor = 2 ** (self.decoder.num_resolutions - 1)
        return _run(self.decoder, h, self.tiling, factor, decode_by_strips)


def _run(
    network: Any,
    x: Tensor,
    tiling: Tiling | None,
    pixels: int,
    by_strips: Callable[[Any, Tensor, int], Tensor],
) -> Tensor:
    """The network's output by the way that `tiling` asks for; `pixels` is the picture's side over x's."""
    if tiling is None:
        return network(x)
    if tiling.slicing and len(x) > 1:
        return torch.cat([_run(network, one, tiling, pixels, by_strips) for one in x.split(1)])
    if max(x.shape[2:]) * pixels <= tiling.size:
        return network(x)
    if tiling.exact:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("exact tiling keeps no gradients; call disable_tiling() where they are needed")
        with torch.no_grad():
            return by_strips(network, x, tiling.size**2)
    factor = 2 ** (network.num_resolutions - 1)
    step = max(1, tiling.size // factor)  # side of a tile of latents
    grows = isinstance(network, Decoder)
    with _shared_statistics(network, _shrunk(x, step, 1 if grows else factor)):
        return _by_tiles(network, x, step, round(step * tiling.overlap), factor, grows)


# ------------------------------------------------------------------------------------------------------------- tiles


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length`, evenly spread, each sharing at least `overlap` with the next."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _fade(length: int, before: int, after: int) -> Tensor:
    """Weights that rise over the overlap before and fall over that after."""
    position = torch.arange(length) + 0.5
    rise = (position / before).clamp(max=1) if before else torch.ones(length)
    fall = ((length - position) / after).clamp(max=1) if after else torch.ones(length)
    return rise * fall


def _spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """Start, end, and the overlaps with the tiles before and after."""
    starts = tile_starts(length, tile, overlap)
    for i, start in enumerate(starts):
        end = min(start + tile, length)
        before = starts[i - 1] + tile - start if i else 0
        after = end - starts[i + 1] if i + 1 < len(starts) else 0
        yield start, end, before, after


def _shrunk(x: Tensor, tile: int, unit: int) -> Tensor:
    """x with its longer side that of a tile; sides are multiples of `unit`. Values are picked, for their mean would spread less."""
    scale = tile / max(n // unit for n in x.shape[2:])
    height, width = (max(1, round(n // unit * scale)) * unit for n in x.shape[2:])
    return F.interpolate(x, size=(height, width), mode="nearest-exact")


@contextlib.contextmanager
def _shared_statistics(network: nn.Module, example: Tensor) -> Iterator[None]:
    """Within, group normalisations use the statistics that they find in the example.

    With statistics of its own, a plain tile would have another brightness than its neighbours.
    """
    with contextlib.ExitStack() as undo:

        def fixed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
            factor, shift = _scale_and_shift(x, norm, x.shape[2] * x.shape[3])
            norm.forward = lambda input: torch.addcmul(shift, input, factor)  # type: ignore[method-assign]
            return norm.forward(x)

        for norm in (m for m in network.modules() if isinstance(m, nn.GroupNorm)):
            norm.forward = functools.partial(fixed, norm)  # type: ignore[method-assign]
            undo.callback(delattr, norm, "forward")
        network(example)
        yield


def _by_tiles(
    network: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int, grows: bool
) -> Tensor:
    """Overlapping tiles through a network, one after the other, blended.

    Args:
        network: multiplies (`grows`) or divides sides by `factor`.
        x: (b, c, h, w).
        tile: side of a tile, of the smaller of input and output.
        overlap: shared by neighbours, of the smaller, too.
        factor: between both.
        grows: x is the smaller.
    """
    into, out_of = (1, factor) if grows else (factor, 1)
    height, width = (n // into for n in x.shape[2:])
    result: Any = None
    sums = (
        x.new_zeros(height * out_of, 1),
        x.new_zeros(width * out_of),
    )  # of the weights; three tiles may meet
    for top, bottom, above, below in _spans(height, tile, overlap):
        row = x[:, :, top * into : bottom * into if bottom < height else None]
        for left, right, before, after in _spans(width, tile, overlap):
            piece = network(row[..., left * into : right * into if right < width else None])
            if result is None:
                result = piece.new_zeros(*piece.shape[:2], height * out_of, width * out_of)
            rows = _fade(piece.shape[2], above * out_of, below * out_of)[:, None].to(piece)
            columns = _fade(piece.shape[3], before * out_of, after * out_of).to(piece)
            result[:, :, top * out_of : bottom * out_of, left * out_of : right * out_of] += (
                piece * rows * columns
            )
            if top == 0:
                sums[1][left * out_of : right * out_of] += columns
        sums[0][top * out_of : bottom * out_of] += rows
    return result / sums[0] / sums[1]


# ------------------------------------------------------------------------------------------------------------ strips


def _strips(x: Tensor, pixels: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of strips of about so many pixels."""
    rows = max(1, pixels // x.shape[3])
    for start in range(0, x.shape[2], rows):
        yield start, min(start + rows, x.shape[2])


def _scale_and_shift(x: Tensor, norm: nn.GroupNorm, pixels: int) -> tuple[Tensor, Tensor]:
    """Group normalisation of the whole map as a factor and an addend a channel, (b, c, 1, 1) each."""
    b, c = x.shape[:2]
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # which Apple's GPUs lack
    total = x.new_zeros(2, b, norm.num_groups, dtype=exact)
    for start, end in _strips(x, pixels):
        groups = x[:, :, start:end].reshape(b, norm.num_groups, -1)
        variance, mean = torch.var_mean(groups.float(), dim=-1, correction=0)
        mean, count = mean.to(exact), groups.shape[-1]
        total[0] += mean * count
        total[1] += (variance.to(exact) + mean**2) * count
    mean, square = total / (x[0].numel() // norm.num_groups)
    deviation = (square - mean**2).clamp(min=0).add(norm.eps).sqrt()
    factor, shift = (
        (t.repeat_interleave(c // norm.num_groups, 1)) for t in (1 / deviation, -mean / deviation)
    )
    factor, shift = factor * norm.weight, shift * norm.weight + norm.bias
    return factor.to(x)[..., None, None], shift.to(x)[..., None, None]


def _normalised(x: Tensor, norm: nn.GroupNorm, pixels: int, swish: bool = True) -> Callable[[Tensor], Tensor]:
    """What turns rows of x into rows of swish(norm(x)), or of norm(x)."""
    factor, shift = _scale_and_shift(x, norm, pixels)

    def apply(rows: Tensor) -> Tensor:
        rows = torch.addcmul(shift, rows, factor)
        return F.silu(rows, inplace=True) if swish else rows

    return apply


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _convolve(
    x: Tensor,
    conv: nn.Conv2d,
    pixels: int,
    before: Callable[[Tensor], Tensor] = _as_they_are,
    onto: Tensor | None = None,
) -> Tensor:
    """A 3×3 or 1×1 convolution of stride 1 of `before(x)`, by strips.

    Args:
        x: (b, c, h, w).
        conv: the layer.
        pixels: of a strip.
        before: acts on rows, one by one.
        onto: (b, c', h, w), to which the result is added in place; x may not be it unless the kernel is 1×1.
    """
    halo = conv.padding[0] if isinstance(conv.padding, tuple) else 0
    out = x.new_zeros(len(x), conv.out_channels, *x.shape[2:]) if onto is None else onto
    for start, end in _strips(x, pixels):
        top, bottom = max(0, start - halo), min(x.shape[2], end + halo)
        rows = before(x[:, :, top:bottom])
        missing = (halo, halo, halo - (start - top), halo - (bottom - end))  # zeros beyond the picture
        out[:, :, start:end] += F.conv2d(F.pad(rows, missing), conv.weight, conv.bias)
    return out


def _resnet(block: ResnetBlock, x: Tensor, pixels: int) -> Tensor:
    """A residual block; x itself becomes the result where the widths agree."""
    h = _convolve(x, block.conv1, pixels, _normalised(x, block.norm1, pixels))
    if block.in_channels != block.out_channels:
        x = _convolve(x, block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut, pixels)
    return _convolve(h, block.conv2, pixels, _normalised(h, block.norm2, pixels), onto=x)


def _attend(block: nn.Module, x: Tensor) -> Tensor:
    """Attention over the whole map; PyTorch's kernels hold no matrix of scores."""
    return (
        x.add_(block.proj_out(block.attention(block.norm(x)))) if isinstance(block, AttnBlock) else block(x)
    )


def _upsample(layer: Upsample, x: Tensor, pixels: int) -> Tensor:
    out = x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for start, end in _strips(x, max(1, pixels // 4)):
        top, bottom = max(0, start - 1), min(x.shape[2], end + 1)
        rows = layer(
            x[:, :, top:bottom]
        )  # one row more than needed above and below: their outer halves are cut off
        out[:, :, 2 * start : 2 * end] = rows[:, :, 2 * (start - top) : 2 * (end - top)]
    return out


def _downsample(layer: Downsample, x: Tensor, pixels: int) -> Tensor:
    out = x.new_empty(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    for start, end in _strips(out, max(1, pixels // 4)):
        # the kernel reaches one row below; at the picture's end that is the layer's own zeros
        last = 2 * end + 1 if 2 * end < x.shape[2] else x.shape[2]
        out[:, :, start:end] = layer(x[:, :, 2 * start : last])[:, :, : end - start]
    return out


def _middle(mid: Any, h: Tensor, pixels: int) -> Tensor:
    return _resnet(mid.block_2, _attend(mid.attn_1, _resnet(mid.block_1, h, pixels)), pixels)


def _level(network: Any, stage: Any, h: Tensor, pixels: int) -> Tensor:
    for block, attend in network.steps(stage):
        h = _resnet(block, h, pixels)
        h = h if attend is None else _attend(attend, h)
    return h


def encode_by_strips(encoder: Encoder, x: Tensor, pixels: int) -> Tensor:
    """What `encoder(x)` is, holding two feature maps and strips of about `pixels` pixels."""
    h = _convolve(x, encoder.conv_in, pixels)
    for i, stage in enumerate(encoder.down):
        h = _level(encoder, stage, h, pixels)
        if i != encoder.num_resolutions - 1:
            h = _downsample(stage.downsample, h, pixels)  # type: ignore[arg-type]
    h = _middle(encoder.mid, h, pixels)
    return _convolve(h, encoder.conv_out, pixels, _normalised(h, encoder.norm_out, pixels))


def decode_by_strips(decoder: Decoder, z: Tensor, pixels: int) -> Tensor:
    """What `decoder(z)` is, holding two feature maps and strips of about `pixels` pixels."""
    decoder.last_z_shape = z.shape
    h = _middle(decoder.mid, _convolve(z, decoder.conv_in, pixels), pixels)
    for i in reversed(range(decoder.num_resolutions)):
        stage: Any = decoder.up[i]
        h = _level(decoder, stage, h, pixels)
        if i != 0:
            h = _upsample(stage.upsample, h, pixels)
    if decoder.give_pre_end:
        return h
    h = _convolve(h, decoder.conv_out, pixels, _normalised(h, decoder.norm_out, pixels))
    return torch.tanh(h) if decoder.tanh_out else h
