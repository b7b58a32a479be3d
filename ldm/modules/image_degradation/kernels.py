"""Blur kernels, and convolution with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------------- kernels


def gaussian_kernel(height: int, width: int, covariance: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """exp(-½ dᵀ Σ⁻¹ d) with d = (x, y) - centre, of sum one, (height, width)."""
    y, x = np.mgrid[:height, :width]
    distance = np.stack([x, y], -1) - centre
    exponent = np.einsum("hwi,ij,hwj->hw", distance, np.linalg.inv(covariance), distance)
    kernel = np.exp(-0.5 * exponent)
    return kernel / kernel.sum()


def rotated_covariance(theta: float, l1: float, l2: float) -> np.ndarray:
    """The covariance with eigenvalue l1 along the direction theta, and l2 across."""
    axes = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    return axes @ np.diag([l1, l2]) @ axes.T


def anisotropic_Gaussian(ksize: int = 15, theta: float = np.pi, l1: float = 6, l2: float = 6) -> np.ndarray:
    """A Gaussian kernel (ksize, ksize) of sum one, with variance l1 along the direction theta and l2 across."""
    return gaussian_kernel(ksize, ksize, rotated_covariance(theta, l1, l2), np.full(2, (ksize - 1) / 2))


def fspecial_gaussian(hsize: int, sigma: float) -> np.ndarray:
    """MATLAB's isotropic Gaussian kernel (hsize, hsize) of sum one; what is below ε of the peak becomes zero."""
    kernel = gaussian_kernel(hsize, hsize, np.eye(2) * sigma**2, np.full(2, (hsize - 1) / 2))
    kernel[kernel < np.finfo(float).eps * kernel.max()] = 0
    return kernel / kernel.sum()


def fspecial_laplacian(alpha: float) -> np.ndarray:
    """MATLAB's 3 × 3 Laplacian of shape `alpha`, clipped to [0, 1]."""
    alpha = float(np.clip(alpha, 0, 1))
    corner, edge = alpha / (alpha + 1), (1 - alpha) / (alpha + 1)
    return np.array([[corner, edge, corner], [edge, -4 / (alpha + 1), edge], [corner, edge, corner]])


SPECIAL: dict[str, Callable[..., np.ndarray]] = {
    "gaussian": fspecial_gaussian,
    "laplacian": fspecial_laplacian,
}


def fspecial(filter_type: str, *args: Any, **kwargs: Any) -> np.ndarray:
    """MATLAB's kernels by name: "gaussian" (hsize, sigma) or "laplacian" (alpha)."""
    if filter_type not in SPECIAL:
        raise ValueError(f"filter_type={filter_type!r} is unknown; choose one of {sorted(SPECIAL)}")
    return SPECIAL[filter_type](*args, **kwargs)


def gen_kernel(
    k_size: Sequence[int] = (15, 15),
    scale_factor: Sequence[int] = (4, 4),
    min_var: float = 0.6,
    max_var: float = 10.0,
    noise_level: float = 0,
) -> np.ndarray:
    """A random Gaussian kernel (k_size) of sum one; variances and direction come from numpy's generator.

    Args:
        k_size: height and width.
        scale_factor: the peak lies half of (factor - 1) pixels off the middle, so that taking every factor-th pixel
            afterwards does not shift the picture.
        min_var: smallest variance.
        max_var: largest variance.
        noise_level: weights are multiplied by numbers from 1 - level … 1 + level.

    Source: Bell-Kligler et al. 2019 (KernelGAN), section 4.
    """
    l1, l2 = np.random.uniform(min_var, max_var, 2)
    theta = np.random.uniform(0, np.pi)
    noise = np.random.uniform(-noise_level, noise_level, tuple(k_size))
    size, factor = np.array(k_size), np.array(scale_factor)
    centre = (size // 2 - 0.5 * (factor - 1))[::-1]
    kernel = gaussian_kernel(k_size[0], k_size[1], rotated_covariance(theta, l1, l2), centre) * (1 + noise)
    return kernel / kernel.sum()


def shift_pixel(x: np.ndarray, sf: int, upper_left: bool = True) -> np.ndarray:
    """Move (h, w) or (h, w, c) by (sf - 1) / 2 pixels (bilinear, borders repeated): taking every sf-th pixel moves it back.

    Args:
        x: the array.
        sf: the factor of the sampling.
        upper_left: pixel (i, j) becomes what was at (i + shift, j + shift); False: the other way.
    """
    shift = (sf - 1) * 0.5 * (1 if upper_left else -1)
    for axis in (0, 1):
        last = x.shape[axis] - 1
        position = np.clip(np.arange(last + 1) + shift, 0, last)
        low = np.floor(position).astype(int)
        share = (position - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, last), axis) * share
    return x


def analytic_kernel(k: np.ndarray) -> np.ndarray:
    """The kernel that blurs for a factor of 4, given the one (n, n) for a factor of 2, of sum one.

    Source: Bell-Kligler et al. 2019 (KernelGAN), section 3 of the supplement: k with holes, convolved with k.
    """
    n = len(k)
    whole = np.zeros((3 * n - 2, 3 * n - 2))
    for (row, column), weight in np.ndenumerate(k):
        whole[2 * row : 2 * row + n, 2 * column : 2 * column + n] += weight * k
    rim = n // 2
    inner = whole[rim : len(whole) - rim, rim : len(whole) - rim]
    return inner / inner.sum()


# ----------------------------------------------------------------------------------------------------- convolution


def convolve(img: np.ndarray, kernel: np.ndarray, border: Literal["reflect", "wrap"]) -> np.ndarray:
    """Convolution of (h, w, c) with one kernel for all channels, in the picture's type.

    Args:
        img: the picture, floating point.
        kernel: (m, n); its middle is at m // 2, n // 2.
        border: how numpy's `pad` continues the picture: "reflect" mirrors it, "wrap" repeats it.
    """
    (m, n) = kernel.shape
    around = ((m - 1 - m // 2, m // 2), (n - 1 - n // 2, n // 2), (0, 0))
    padded = torch.from_numpy(np.pad(img, around, mode=border)).permute(2, 0, 1)[:, None]
    flipped = torch.from_numpy(np.ascontiguousarray(kernel[::-1, ::-1])).to(padded)
    return F.conv2d(padded, flipped[None, None])[:, 0].permute(1, 2, 0).numpy()
