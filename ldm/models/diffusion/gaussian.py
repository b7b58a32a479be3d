"""Gaussian diffusion: the noise schedule and its algebra, and what a network may predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule

# -------------------------------------------------------------------------------------------------- what is predicted


class Parameterization(NamedTuple):
    """What the network predicts. Functions of (schedule, x_t, t, prediction) or (schedule, x_0, t, noise)."""

    target: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], Tensor]
    x_start: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], Tensor]
    # weights of the variational bound, of (β, posterior variance, α, ᾱ)
    bound_weights: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PARAMETERIZATIONS = {
    "eps": Parameterization(
        target=lambda s, x_start, t, noise: noise,
        x_start=lambda s, x_t, t, eps: s.predict_start_from_noise(x_t, t, eps),
        bound_weights=lambda beta, variance, alpha, alpha_bar: (
            beta**2 / (2 * variance * alpha * (1 - alpha_bar))
        ),
    ),
    "x0": Parameterization(
        target=lambda s, x_start, t, noise: x_start,
        x_start=lambda s, x_t, t, x_start: x_start,
        # "2 · 1 - ᾱ", not 2 · (1 - ᾱ): losses of published trainings depend on it
        bound_weights=lambda beta, variance, alpha, alpha_bar: 0.5 * alpha_bar.sqrt() / (2.0 * 1 - alpha_bar),
    ),
    "v": Parameterization(
        target=lambda s, x_start, t, noise: s.get_v(x_start, noise, t),
        x_start=lambda s, x_t, t, v: s.predict_start_from_z_and_v(x_t, t, v),
        bound_weights=lambda beta, variance, alpha, alpha_bar: torch.ones_like(beta),
    ),
}


class GaussianSchedule(nn.Module):
    """The forward process q and its posterior, as buffers under their published names; to be mixed into a module.

    Notation: α = 1 - β, ᾱ_t the product of α up to t; x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.

    Source: Ho et al. 2020, equations 2 to 7; v from Salimans & Ho 2022, appendix D.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor
    parameterization: str
    v_posterior: float

    def register_schedule(
        self,
        given_betas: np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute all buffers, in float64, and store them in float32.

        Args:
            given_betas: β_t; replaces everything else.
            beta_schedule, timesteps, linear_start, linear_end, cosine_s: see `make_beta_schedule`.
        """
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.num_timesteps = len(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        alphas = 1.0 - betas
        bar = np.cumprod(alphas)
        before = np.append(1.0, bar[:-1])
        variance = (1 - self.v_posterior) * betas * (1.0 - before) / (1.0 - bar) + self.v_posterior * betas
        buffers = {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": np.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
            "log_one_minus_alphas_cumprod": np.log(1.0 - bar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1),
            "posterior_variance": variance,
            # clipped because the variance is 0 at the beginning of the chain
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - bar),
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / (1.0 - bar),
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        row = PARAMETERIZATIONS[self.parameterization]
        weights = row.bound_weights(
            self.betas,
            self.posterior_variance,
            torch.tensor(alphas, dtype=torch.float32),
            self.alphas_cumprod,
        )
        if len(weights) > 1:
            weights[0] = weights[1]  # the first is infinite for eps
        self.register_buffer("lvlb_weights", weights, persistent=False)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of q(x_t | x_0), its variance and log-variance (b, 1, …)."""
        shape = x_start.shape
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, shape) * x_start
        return (
            mean,
            extract_into_tensor(1.0 - self.alphas_cumprod, t, shape),
            extract_into_tensor(self.log_one_minus_alphas_cumprod, t, shape),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0) at steps t (b,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)
        return (
            scale * x_start
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of q(x_{t-1} | x_t, x_0), its variance and clipped log-variance (b, 1, …)."""
        shape = x_t.shape
        mean = extract_into_tensor(self.posterior_mean_coef1, t, shape) * x_start
        mean = mean + extract_into_tensor(self.posterior_mean_coef2, t, shape) * x_t
        return (
            mean,
            extract_into_tensor(self.posterior_variance, t, shape),
            extract_into_tensor(self.posterior_log_variance_clipped, t, shape),
        )

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and ε."""
        scale = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape)
        return scale * x_t - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = √ᾱ x_t - √(1 - ᾱ) v."""
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape)
        return scale * x_t - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """ε = √ᾱ v + √(1 - ᾱ) x_t."""
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape)
        return scale * v + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * x_t

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = √ᾱ ε - √(1 - ᾱ) x_0."""
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x.shape)
        return scale * noise - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.shape) * x
