"""An invisible watermark: bits in a picture's chroma that survive mild compression, and what reads them again.

The way and the numbers are those of the package invisible-watermark ("dwtDct"), so either reads what the other wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SCALE = 36.0  # distance of the levels to which coefficients are rounded
BLOCK = 4  # coefficients along the side of a block that carries one bit: 8 pixels
LEAST_PIXELS = 256 * 256

# B, G, R ⇄ Y, U, V in the rounded numbers of the PAL system, as OpenCV has them; there and back is not quite the identity
LUMA = np.array([0.114, 0.587, 0.299], np.float32)
U_FROM_BLUE, V_FROM_RED, OFFSET = 0.492, 0.877, 0.5
BLUE_FROM_U, GREEN_FROM_U, GREEN_FROM_V, RED_FROM_V = 2.032, -0.395, -0.581, 1.140


def is_large_enough(height: int, width: int) -> bool:
    """Whether a picture has room for a watermark: 256² pixels."""
    return height * width >= LEAST_PIXELS


def embed(image: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """A picture with bits in it, block by block in turn.

    Args:
        image: (h, w, 3), blue first, from 0 to 255.
        bits: zeros and ones.

    Returns:
        The same in float32; it may go a little below 0 and above 255.

    Raises:
        ValueError: no room, or no bits.
    """
    _check(image, bits)
    image = image.astype(np.float32)
    height, width = (side // 4 * 4 for side in image.shape[:2])
    y = image @ LUMA
    u, v = U_FROM_BLUE * (image[..., 0] - y) + OFFSET, V_FROM_RED * (image[..., 2] - y)
    inner = u[:height, :width]
    blocks = _blocks(inner)
    change = _as_map(_rounded(blocks, bits) - blocks, inner.shape)
    # as published, the inverse transform gets two of its details exchanged, which exchanges two of every four pixels
    inner[::2, 1::2], inner[1::2, ::2] = inner[1::2, ::2].copy(), inner[::2, 1::2].copy()
    inner[: change.shape[0], : change.shape[1]] += change
    u -= OFFSET
    return np.stack(
        [y + BLUE_FROM_U * u, y + GREEN_FROM_U * u + GREEN_FROM_V * v, y + RED_FROM_V * v], axis=-1
    )


def extract(image: np.ndarray, length: int) -> list[int]:
    """The bits of a picture's watermark; of one that has none, bits that mean nothing.

    Args:
        image: (h, w, 3), blue first, from 0 to 255.
        length: how many bits were embedded.

    Raises:
        ValueError: a picture without room for them.
    """
    _check(image, range(length))
    image = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4].astype(np.float32)
    blocks = _blocks(U_FROM_BLUE * (image[..., 0] - image @ LUMA) + OFFSET)
    strongest = np.take_along_axis(blocks, _strongest(blocks), axis=1)[:, 0]
    found = np.abs(strongest) % SCALE > 0.5 * SCALE
    votes = [found[n::length].mean() for n in range(length)]
    return [int(vote * 255 > 127) for vote in votes]


def _check(image: np.ndarray, bits: Sequence[int]) -> None:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture (h, w, 3) is needed, not {image.shape}")
    height, width = image.shape[:2]
    if not is_large_enough(height, width):
        raise ValueError(
            f"a picture of {width}x{height} pixels has no room for a watermark; {LEAST_PIXELS} are needed (256x256)"
        )
    if not len(bits):
        raise ValueError("a watermark needs at least one bit")


def _blocks(u: np.ndarray) -> np.ndarray:
    """The coarse Haar coefficients of a map, in blocks (n, 16) row by row."""
    height, width = u.shape
    coarse = u.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3)) / 2
    rows, columns = (side // BLOCK for side in coarse.shape)
    coarse = coarse[: rows * BLOCK, : columns * BLOCK]
    return coarse.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK * BLOCK)


def _strongest(blocks: np.ndarray) -> np.ndarray:
    """The place of each block's strongest coefficient, its first one aside, (n, 1)."""
    return np.abs(blocks[:, 1:]).argmax(axis=1)[:, None] + 1


def _rounded(blocks: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """Blocks with their strongest coefficient at a quarter (0) or three quarters (1) of a step of the scale."""
    places = _strongest(blocks)
    values = np.take_along_axis(blocks, places, axis=1)
    offsets = 0.25 + 0.5 * np.resize(np.asarray(bits, np.float32), len(blocks))[:, None]
    levels = (np.abs(values) // SCALE + offsets) * SCALE
    out = blocks.copy()
    np.put_along_axis(out, places, np.where(values < 0, -levels, levels), axis=1)
    return out


def _as_map(blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What a change of the coefficients does to the map, as far as it has whole blocks."""
    rows, columns = (side // 2 // BLOCK for side in shape)
    coarse = blocks.reshape(rows, columns, BLOCK, BLOCK).swapaxes(1, 2).reshape(rows * BLOCK, columns * BLOCK)
    return coarse.repeat(2, axis=0).repeat(2, axis=1) / 2
