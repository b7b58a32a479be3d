"""Picture primitives that the data sets share: opening, cropping and turning into numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
INTERPOLATIONS = {
    name: getattr(Image.Resampling, name.upper())
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
HUES = {"red": 0, "orange": 28, "yellow": 48, "green": 120, "blue": 210, "purple": 275, "pink": 330}


class BrokenImageError(OSError):
    """A file that should be an image and cannot be read as one."""


def open_rgb(
    source: str | os.PathLike[str] | BinaryIO, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Read a picture of any mode as RGB, upright, with transparent parts over a background colour.

    Raises:
        FileNotFoundError: no such file.
        BrokenImageError: truncated, empty or no image; the message names the file.
    """
    try:
        with Image.open(source) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # 16 or 32 bits of grey: PIL's own conversion would clip them instead of scaling
                grey = np.asarray(image).astype(np.float64)
                image = Image.fromarray((grey * min(1.0, 255 / max(grey.max(), 1.0))).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, (*background, 255))
                image = Image.alpha_composite(canvas, image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL's decoders raise a dozen different things for damaged files
        size = ""
        if isinstance(source, str | os.PathLike):
            size = f" ({Path(source).stat().st_size:,} bytes)"
        raise BrokenImageError(f"{source}{size} cannot be read as an image: {error}") from error


def resize_and_crop(
    image: Image.Image, size: int, interpolation: str = "lanczos", random_crop: bool = False
) -> Image.Image:
    """Scale the shorter side to `size` (up or down, anti-aliased), then cut a square from the middle or at random.

    Random places come from torch's generator, which loaders seed per worker.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation={interpolation!r} is unknown; choose one of {sorted(INTERPOLATIONS)}"
        )
    width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    if target != image.size:
        image = image.resize(target, INTERPOLATIONS[interpolation])
    room = (image.width - size, image.height - size)
    left, top = (int(torch.randint(n + 1, ())) for n in room) if random_crop else (n // 2 for n in room)
    return image.crop((left, top, left + size, top + size))


def to_float(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """8-bit pixels (h, w, c) → float32 in [-1, 1]."""
    return (np.asarray(pixels, dtype=np.float32) / 127.5) - 1.0


def recolour(pixels: np.ndarray, colour: str) -> np.ndarray | None:
    """Turn all hues so that the prevailing one becomes `colour` (a key of `HUES`); greys and lightness stay.

    Args:
        pixels: 8-bit RGB (h, w, 3).

    Returns:
        Pixels of the same shape, or None where less than a tenth of the picture has a hue.
    """
    hsv = np.array(Image.fromarray(pixels).convert("HSV")).astype(int)
    hue, saturation, value = (hsv[..., i] for i in range(3))
    weight = np.where((saturation > 80) & (value > 60), saturation, 0)
    if (weight > 0).mean() < 0.1:
        return None
    # hues are angles, so their mean is that of points on the circle; a byte is the whole turn
    prevailing = np.angle((weight * np.exp(2j * np.pi * hue / 256)).sum()) / (2 * np.pi)
    hsv[..., 0] = (hue + round((HUES[colour] / 360 - prevailing) * 256)) % 256
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))
