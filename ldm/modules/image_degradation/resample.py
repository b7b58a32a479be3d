"""Scaling arrays as OpenCV and MATLAB do, the two whose artefacts the published super-resolution models were trained on."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from taming.data.images import MATRICES, RESAMPLERS, resize_pixels, separable, tap_matrix

MODES = tuple(RESAMPLERS)


def resize(pixels: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Scale an array (h, w) or (h, w, c) as OpenCV does, see `taming.data.images.resize_pixels`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}")
    return resize_pixels(pixels, height, width, mode)


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


@lru_cache(MATRICES)
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
    return tap_matrix(np.where(mirrored < n, mirrored, 2 * n - 1 - mirrored), values, n)
