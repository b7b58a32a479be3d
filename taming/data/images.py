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
