"""Scaling arrays as OpenCV and MATLAB do, the two whose artefacts the published super-resolution models were trained on."""

from __future__ import annotations

import math

import numpy as np

from taming.data.images import resize_pixels

MODES = ("nearest", "bilinear", "bicubic", "area", "lanczos")


def resize(pixels: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Scale an array (h, w) or (h, w, c) as OpenCV does: nothing is smoothed when it shrinks, except with "area".

    Whole numbers are rounded and clipped to their type's range.

    Args:
        pixels: the picture.
        height: of the result.
        width: of the result.
        mode: one of `MODES`; "area" means the mean of the covered pixels, and "bilinear" where a side grows.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}")
    if mode == "area" and (height > pixels.shape[0] or width > pixels.shape[1]):
        mode = "bilinear"
    if mode not in MATRICES:
        return resize_pixels(pixels, height, width, mode)
    matrix = MATRICES[mode]
    scaled = separable(pixels, matrix(pixels.shape[0], height), matrix(pixels.shape[1], width))
    if np.issubdtype(pixels.dtype, np.integer):
        limits = np.iinfo(pixels.dtype)
        scaled = scaled.round().clip(limits.min, limits.max)
    return scaled.astype(pixels.dtype, copy=False)


def matlab_bicubic(pixels: np.ndarray, scale: float, antialiasing: bool = True) -> np.ndarray:
    """MATLAB's `imresize`: Keys' cubic (a = -1/2), widened when shrinking if `antialiasing`, borders mirrored.

    Args:
        pixels: (h, w) or (h, w, c), floating point.
        scale: > 0; each side becomes ceil(side · scale).
        antialiasing: smooth when shrinking.

    Source: Keys 1981, equation 15.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    rows, columns = (_cubic(n, math.ceil(n * scale), scale, antialiasing) for n in pixels.shape[:2])
    return separable(pixels, rows, columns).astype(pixels.dtype, copy=False)


def separable(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Apply a matrix to the rows and one to the columns of (h, w) or (h, w, c), in float64."""
    return np.einsum("yh,xw,hw...->yx...", rows, columns, pixels.astype(np.float64), optimize=True)


def _weights(positions: np.ndarray, taps: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """A matrix (out, n) with `values` (out, taps), normalised, at the columns `taps`, which are within 0 … n - 1."""
    matrix = np.zeros((len(positions), n))
    values = values / values.sum(1, keepdims=True)
    np.add.at(matrix, (np.arange(len(positions))[:, None], taps), values)
    return matrix


def _lanczos(n: int, size: int) -> np.ndarray:
    """The windowed sinc of eight taps (a = 4), border pixels repeated."""
    positions = (np.arange(size) + 0.5) * (n / size) - 0.5
    taps = np.floor(positions)[:, None].astype(int) + np.arange(-3, 5)
    distance = positions[:, None] - taps
    return _weights(positions, taps.clip(0, n - 1), np.sinc(distance) * np.sinc(distance / 4), n)


def _area(n: int, size: int) -> np.ndarray:
    """The share of each old pixel in each new, larger one; PIL's box takes old pixels whole or not at all."""
    edges = np.arange(size + 1) * (n / size)
    pixels = np.arange(n)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * (size / n)


MATRICES = {"lanczos": _lanczos, "area": _area}


def _cubic(n: int, size: int, scale: float, antialiasing: bool) -> np.ndarray:
    stretch = min(scale, 1.0) if antialiasing else 1.0
    positions = (np.arange(size) + 0.5) / scale - 0.5
    reach = math.ceil(2 / stretch) + 1
    taps = np.floor(positions)[:, None].astype(int) + np.arange(-reach, reach + 1)
    x = np.abs(positions[:, None] - taps) * stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    values = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    mirrored = taps % (2 * n)  # … 1 0 | 0 1 … n-1 | n-1 n-2 …
    return _weights(positions, np.where(mirrored < n, mirrored, 2 * n - 1 - mirrored), values, n)
