"""Arithmetic of the samplers in the σ view: derivatives, ancestral steps, multistep coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm.util import append_dims


class NoDynamicThresholding:
    """Plain classifier-free guidance, under the name by which older configurations ask for it."""

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Any) -> Tensor:
        """x_u + s (x_c - x_u)."""
        return uncond + scale * (cond - uncond)


def linear_multistep_coeff(
    order: int, t: Sequence[float] | np.ndarray, i: int, j: int, epsrel: float = 1e-4
) -> float:
    """∫ of a Lagrange basis polynomial from t_i to t_{i+1}: the weight of the derivative j steps ago.

    Args:
        order: number of derivatives.
        t: times.
        i: the present one.
        j: 0 for the present derivative, up to order - 1.
        epsrel: accepted, as published; the integral is exact.

    Raises:
        ValueError: fewer than `order` derivatives are known at time i.

    Source: the Adams-Bashforth methods for uneven steps, e.g. Hairer et al. 1993, section III.5.
    """
    if order - 1 > i:
        raise ValueError(f"order={order} needs {order} derivatives, but at step {i} there are {i + 1}")
    known = [float(t[i - k]) for k in range(order)]
    nodes, weights = np.polynomial.legendre.leggauss((order + 1) // 2)  # exact for degree order - 1
    half, middle = (float(t[i + 1]) - known[0]) / 2, (float(t[i + 1]) + known[0]) / 2
    basis = np.ones_like(nodes)
    for k in range(order):
        if k != j:
            basis *= (middle + half * nodes - known[k]) / (known[j] - known[k])
    return float(half * (weights @ basis))


def get_ancestral_step(
    sigma_from: Tensor, sigma_to: Tensor, eta: float = 1.0
) -> tuple[Tensor, Tensor | float]:
    """Where to step to, and how much noise to add there, to arrive at σ_to.

    Args:
        sigma_from, sigma_to: noise levels (b,).
        eta: 1 for the variance of the reverse chain, 0 for no noise.

    Returns:
        σ_down and σ_up, with σ_down² + σ_up² = σ_to²; σ_up is a plain 0.0 for eta=0.

    Source: Song et al. 2021 (DDIM), equation 16, in σ.
    """
    if not eta:
        return sigma_to, 0.0
    wanted = eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2).sqrt()
    up = torch.minimum(sigma_to, wanted)
    return (sigma_to**2 - up**2).sqrt(), up


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dσ = (x - denoised) / σ of the probability-flow equation (Karras et al. 2022, equation 3)."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def to_neg_log_sigma(sigma: Tensor) -> Tensor:
    """-ln σ, in which the exponential integrators step."""
    return sigma.log().neg()


def to_sigma(neg_log_sigma: Tensor) -> Tensor:
    """σ from -ln σ."""
    return neg_log_sigma.neg().exp()
