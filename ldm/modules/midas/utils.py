"""Files of depth maps, and pictures for depth networks without a transform."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.modules.image_degradation.resample import resize
from taming.data.images import open_rgb
from taming.util import atomic_path

CHANNELS = {b"PF": 3, b"Pf": 1}
SIDE, MULTIPLE = 384, 32


def read_pfm(path: str | Path) -> tuple[np.ndarray, float]:
    """A portable float map: (h, w) or (h, w, 3), top row first, and its scale.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such map, or a truncated one.
    """
    content = Path(path).read_bytes()
    header = re.match(rb"(P[Ff])\s+(\d+)\s+(\d+)\s+([-+\d.eE]+)\s", content)
    if header is None:
        raise ValueError(
            f"{path} is no portable float map: it must begin with PF or Pf, its size and its scale"
        )
    kind, width, height, scale = header[1], int(header[2]), int(header[3]), float(header[4])
    shape = (height, width, 3) if CHANNELS[kind] == 3 else (height, width)
    pixels = np.frombuffer(content[header.end() :], "<f4" if scale < 0 else ">f4")
    if pixels.size != math.prod(shape):
        raise ValueError(f"{path} holds {pixels.size} numbers instead of the {math.prod(shape)} of {shape}")
    return np.flipud(pixels.reshape(shape)).astype(np.float32), abs(scale)


def write_pfm(path: str | Path, image: np.ndarray, scale: float = 1) -> None:
    """Write (h, w), (h, w, 1) or (h, w, 3) float32 as a portable float map; the bottom row comes first in it.

    Raises:
        ValueError: another type or shape.
    """
    if image.dtype != np.float32:
        raise ValueError(f"a portable float map holds float32, not {image.dtype}")
    colour = image.ndim == 3 and image.shape[2] == 3
    if not colour and image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 1):
        raise ValueError(f"a portable float map is (h, w), (h, w, 1) or (h, w, 3), not {image.shape}")
    kind = "PF" if colour else "Pf"
    header = f"{kind}\n{image.shape[1]} {image.shape[0]}\n{-scale:f}\n"  # a negative scale: little endian
    with atomic_path(path) as temporary:
        temporary.write_bytes(header.encode() + np.flipud(image).astype("<f4").tobytes())


def read_image(path: str | Path) -> np.ndarray:
    """A picture as (h, w, 3) in [0, 1]."""
    return np.asarray(open_rgb(path)) / 255.0


def resize_image(img: np.ndarray) -> Tensor:
    """(h, w, 3) → (1, 3, h', w') float32: the longer side becomes 384, both are rounded up to multiples of 32."""
    scale = SIDE / max(img.shape[:2])
    height, width = (math.ceil(round(n * scale, 6) / MULTIPLE) * MULTIPLE for n in img.shape[:2])
    scaled = resize(img, height, width, "area")
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))[None].float()


def resize_depth(depth: Tensor, width: int, height: int) -> np.ndarray:
    """A depth map (1, 1, h, w) as an array (height, width), bicubic."""
    return resize(depth.detach().squeeze((0, 1)).cpu().float().numpy(), height, width, "bicubic")


def write_depth(path: str | Path, depth: np.ndarray, bits: int = 1) -> None:
    """Write `<path>.pfm` with the numbers, and `<path>.png` with a grey picture from the smallest to the largest.

    Args:
        path: without a suffix.
        depth: (h, w) float32.
        bits: bytes a pixel of the grey picture, 1 or 2.

    Raises:
        ValueError: another number of bytes, or numbers that are not finite.
    """
    if bits not in (1, 2):
        raise ValueError(f"bits={bits} must be 1 or 2 bytes a pixel")
    if not np.isfinite(depth).all():
        raise ValueError("the depth map holds numbers that are not finite")
    write_pfm(f"{path}.pfm", depth.astype(np.float32))
    low, high = float(depth.min()), float(depth.max())
    limit = 2 ** (8 * bits) - 1
    span = high - low if high - low > np.finfo(np.float32).eps else np.inf
    pixels = (limit * ((depth - low) / span)).astype(np.uint8 if bits == 1 else np.uint16)
    with atomic_path(f"{path}.png") as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
