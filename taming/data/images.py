"""Picture primitives that the data sets share: opening, cropping and turning into numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
INTERPOLATIONS = {
    name: getattr(Image.Resampling, name.upper())
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
HUES = {"red": 0, "orange": 28, "yellow": 48, "green": 120, "blue": 210, "purple": 275, "pink": 330}


class BrokenImageError(OSError):
    """A file that should be an image and cannot be read as one; `path` is that file."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class ImageSizeError(ValueError):
    """A picture too small to cut from, or of another size than the map that belongs to it."""


@contextlib.contextmanager
def _decoding(source: str | os.PathLike[str] | BinaryIO, kind: str = "an image") -> Iterator[None]:
    """Name the file in whatever a decoder raises: they raise a dozen different things for damaged files."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        size = ""
        if isinstance(source, str | os.PathLike):
            size = f" ({Path(source).stat().st_size:,} bytes)"
        raise BrokenImageError(f"{source}{size} cannot be read as {kind}: {error}", str(source)) from error


def open_rgb(
    source: str | os.PathLike[str] | BinaryIO, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Read a picture of any mode as RGB, upright, with transparent parts over a background colour.

    Raises:
        FileNotFoundError: no such file.
        BrokenImageError: truncated, empty or no image; the message names the file.
    """
    with _decoding(source), Image.open(source) as opened:
        opened.load()
        return as_rgb(opened, background)


def as_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture of any mode as RGB, upright, with transparent parts over a background colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 or 32 bits of grey: PIL's own conversion would clip them instead of scaling
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey * min(1.0, 255 / max(grey.max(), 1.0))).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def open_stored(path: str | os.PathLike[str], mode: str) -> np.ndarray:
    """The numbers of a picture file as they are stored, for maps of labels ("L") or of depth ("RGBA").

    Raises:
        FileNotFoundError: no such file.
        BrokenImageError: truncated, empty or no image.
        ValueError: it is of another mode.
    """
    with _decoding(path), Image.open(path) as opened:
        found, pixels = opened.mode, np.array(opened)
    if found != mode:
        raise ValueError(
            f"{path} is of mode {found}; it must be a PNG of mode {mode}, numbers instead of colours"
        )
    return pixels


def open_array(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture saved by numpy as (1, 3, h, w) or (3, h, w) uint8 → (h, w, 3).

    Raises:
        FileNotFoundError: no such file.
        BrokenImageError: truncated, or of another shape or type.
    """
    with _decoding(path, "an array (1, 3, h, w) of uint8"):
        pixels = np.load(path)
        if pixels.shape[:-2] not in ((1, 3), (3,)) or pixels.dtype != np.uint8:
            raise ValueError(f"it holds {pixels.shape} of {pixels.dtype}")
        return pixels.reshape(pixels.shape[-3:]).transpose(1, 2, 0)


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


MATRICES = 16  # are kept of a kind, each 1 MB for 500 → 256 pixels: a data set's pictures have few sizes


def _pick_nearest(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * pixels.shape[0] // height
    columns = np.arange(width) * pixels.shape[1] // width
    return pixels[rows[:, None], columns]


def _interpolate(pixels: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    kind = np.float64 if pixels.dtype == np.float64 else np.float32
    planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).astype(kind)).permute(2, 0, 1)
    scaled = F.interpolate(planes[None], (height, width), mode=mode, align_corners=False)[0]
    return scaled.permute(1, 2, 0).numpy().reshape(height, width, *pixels.shape[2:])


def separable(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Apply a matrix to the rows and one to the columns of (h, w) or (h, w, c), in float64."""
    return np.einsum("yh,xw,hw...->yx...", rows, columns, pixels.astype(np.float64), optimize=True)


def tap_matrix(taps: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """A matrix (out, n) with `values` (out, taps), normalised, at the columns `taps`, which are within 0 … n - 1."""
    matrix = np.zeros((len(taps), n))
    values = values / values.sum(1, keepdims=True)
    np.add.at(matrix, (np.arange(len(taps))[:, None], taps), values)
    return matrix


@lru_cache(MATRICES)
def _lanczos_matrix(n: int, size: int) -> np.ndarray:
    """The windowed sinc of eight taps (a = 4), border pixels repeated."""
    positions = (np.arange(size) + 0.5) * (n / size) - 0.5
    taps = np.floor(positions)[:, None].astype(int) + np.arange(-3, 5)
    distance = positions[:, None] - taps
    return tap_matrix(taps.clip(0, n - 1), np.sinc(distance) * np.sinc(distance / 4), n)


@lru_cache(MATRICES)
def _area_matrix(n: int, size: int) -> np.ndarray:
    """The share of each old pixel in each new, larger one; PIL's box takes old pixels whole or not at all."""
    edges = np.arange(size + 1) * (n / size)
    pixels = np.arange(n)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * (size / n)


def _lanczos(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return separable(
        pixels, _lanczos_matrix(pixels.shape[0], height), _lanczos_matrix(pixels.shape[1], width)
    )


def _area(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if height > pixels.shape[0] or width > pixels.shape[1]:
        return _interpolate(pixels, height, width, "bilinear")
    return separable(pixels, _area_matrix(pixels.shape[0], height), _area_matrix(pixels.shape[1], width))


# of arrays, OpenCV's: nothing is smoothed when a picture shrinks, except with "area" (the mean of the covered pixels, and
# "bilinear" where a side grows); a = -0.75 in the cubic
RESAMPLERS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "nearest": _pick_nearest,
    "bilinear": partial(_interpolate, mode="bilinear"),
    "bicubic": partial(_interpolate, mode="bicubic"),
    "area": _area,
    "lanczos": _lanczos,
}


def resize_pixels(pixels: np.ndarray, height: int, width: int, interpolation: str = "bilinear") -> np.ndarray:
    """Scale an array (h, w) or (h, w, c) of any type as the published data sets did.

    Computed in floating point; whole numbers are rounded and clipped to their type's range.

    Raises:
        ValueError: an unknown `interpolation`.
    """
    if interpolation not in RESAMPLERS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {sorted(RESAMPLERS)}")
    if pixels.shape[:2] == (height, width):
        return pixels
    scaled = RESAMPLERS[interpolation](pixels, height, width)
    if np.issubdtype(pixels.dtype, np.integer):
        limits = np.iinfo(pixels.dtype)
        scaled = scaled.round().clip(limits.min, limits.max)
    return scaled.astype(pixels.dtype, copy=False)


def imscale(
    x: np.ndarray, factor: int | None, keepshapes: bool = False, keepmode: str = "bicubic"
) -> np.ndarray:
    """A picture (h, w, 3) in [-1, 1] shrunk by a factor (bicubic, smoothed), and back to its size if `keepshapes`.

    Args:
        x: the picture; returned itself if `factor` is None or 1.
        factor: sides are divided by it and rounded down.
        keepshapes: enlarge again.
        keepmode: interpolation of the enlarging, such as nearest, bilinear, bicubic.

    Raises:
        ValueError: an unknown mode, or nothing is left of the picture.
    """
    if factor is None or factor == 1:
        return x
    if keepmode not in INTERPOLATIONS:
        raise ValueError(f"keepmode={keepmode!r} is unknown; choose one of {sorted(INTERPOLATIONS)}")
    height, width = x.shape[:2]
    small = (width // factor, height // factor)
    if min(small) < 1:
        raise ValueError(
            f"a picture of {width} x {height} pixels shrunk by {factor} has none left; use a smaller factor"
        )
    picture = Image.fromarray(((x + 1.0) * 127.5).clip(0, 255).astype(np.uint8))
    picture = picture.resize(small, Image.Resampling.BICUBIC)
    if keepshapes:
        picture = picture.resize((width, height), INTERPOLATIONS[keepmode])
    return to_float(picture)


class Preprocessor:
    """Scale, cut and mirror a picture and the maps that belong to it, all alike.

    `preprocessor(image=…, depth=…)` takes arrays (h, w) or (h, w, c) of any type and returns a dict of the same
    names. A first, positional argument names the file for the errors. Random numbers come from torch's generator,
    which loaders seed per worker.

    Args:
        size: scale the shorter side to this, the longer one in proportion (rounded half to even); None or <= 0: not.
        crop_size: then cut a square of this side; None or <= 0: not.
        random_crop: cut anywhere instead of from the middle.
        random_flip: mirror every second picture.
        interpolation: a key of `RESAMPLERS` by name of the input; "bilinear" for those not named.

    Raises:
        ValueError: the crop is larger than what is left after scaling, or an unknown interpolation.
        ImageSizeError: (when called) a picture smaller than the crop, or inputs of different sizes.
    """

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        interpolation: Mapping[str, str] | None = None,
    ) -> None:
        self.size = size if size is not None and size > 0 else None
        self.crop_size = crop_size if crop_size is not None and crop_size > 0 else None
        self.random_crop, self.random_flip = random_crop, random_flip
        self.interpolation = dict(interpolation or {})
        if self.size and self.crop_size and self.crop_size > self.size:
            raise ValueError(
                f"crop_size={crop_size} is larger than size={size}, to which the shorter side is scaled; "
                "make size at least as large"
            )
        if unknown := set(self.interpolation.values()) - set(RESAMPLERS):
            raise ValueError(
                f"interpolation={unknown.pop()!r} is unknown; choose one of {sorted(RESAMPLERS)}"
            )

    def __call__(self, source: str = "picture", /, **pictures: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs, scaled, cut and mirrored alike; `source` names their file in errors."""
        sizes = {name: picture.shape[:2] for name, picture in pictures.items()}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name} is {w} x {h}" for name, (h, w) in sizes.items())
            raise ImageSizeError(f"{source}: {shown}; they must be of one size")
        height, width = next(iter(sizes.values()))
        if self.size:
            scale = self.size / min(height, width)
            height, width = round(height * scale), round(width * scale)
            pictures = {
                name: resize_pixels(picture, height, width, self.interpolation.get(name, "bilinear"))
                for name, picture in pictures.items()
            }
        if self.crop_size:
            top, left = self._corner(height, width, source)
            window = np.s_[top : top + self.crop_size, left : left + self.crop_size]
            pictures = {name: picture[window] for name, picture in pictures.items()}
        if self.random_flip and float(torch.rand(())) < 0.5:
            pictures = {name: picture[:, ::-1] for name, picture in pictures.items()}
        return {name: np.ascontiguousarray(picture) for name, picture in pictures.items()}

    def _corner(self, height: int, width: int, source: str) -> tuple[int, int]:
        room = (height - self.crop_size, width - self.crop_size)  # type: ignore[operator]
        if min(room) < 0:
            raise ImageSizeError(
                f"{source} is {width} x {height} pixels, smaller than the crop of {self.crop_size}; "
                "leave it out, or name a size to scale pictures to first"
            )
        top, left = ((int(torch.randint(n + 1, ())) if self.random_crop else n // 2) for n in room)
        return top, left


def to_float(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """8-bit pixels (h, w, c) → float32 in [-1, 1]."""
    return (np.asarray(pixels, dtype=np.float32) / 127.5) - 1.0


def rgba_to_depth(x: np.ndarray) -> np.ndarray:
    """Depth (h, w) float32 from a picture (h, w, 4) uint8 whose pixels are the numbers' four bytes."""
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 4:
        raise ValueError(f"depth is stored as (h, w, 4) of uint8; got {x.shape} of {x.dtype}")
    return np.ascontiguousarray(x).view(np.float32)[..., 0]


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
