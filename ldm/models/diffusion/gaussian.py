"""Gaussian diffusion: the paths from image to noise and their algebra, and what a network may predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.forward_process import (
    ForwardProcess,
    rectified_flow_betas,
    zero_terminal_snr,
)
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule

# ------------------------------------------------------------------------------------- from the image to the noise


class Path(NamedTuple):
    """How x_t is made of x_0 and ε. Functions of (schedule, t, number of axes), `posterior` of (schedule, x_0, x_t, t)."""

    # factors of x_0 and of ε
    coefficients: Callable[[GaussianSchedule, Tensor, int], tuple[Tensor, Tensor]]
    # variance of q(x_t | x_0), and its logarithm
    variance: Callable[[GaussianSchedule, Tensor, int], tuple[Tensor, Tensor]]
    # mean of q(x_{t-1} | x_t, x_0), its variance and log-variance
    posterior: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _extract(t: Tensor, ndim: int, *tables: Tensor) -> tuple[Any, ...]:
    return tuple(extract_into_tensor(table, t, (1,) * ndim) for table in tables)


def _preserving_posterior(
    s: GaussianSchedule, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_start, of_noisy, variance, log_variance = _extract(
        t, x_t.ndim, s.posterior_mean_coef1, s.posterior_mean_coef2, s.posterior_variance, s.posterior_log_variance_clipped
    )  # fmt: skip
    return of_start * x_start + of_noisy * x_t, variance, log_variance


def flow_time(s: GaussianSchedule, t: Tensor, ndim: int) -> Tensor:
    """τ in (0, 1] of steps t (b,), whole or fractional, as (b, 1, …): step T - 1 is pure noise."""
    return ((t + 1).to(s.alphas_cumprod.dtype) / s.num_timesteps).reshape(-1, *((1,) * (ndim - 1)))


def _flow_coefficients(s: GaussianSchedule, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    tau = flow_time(s, t, ndim)
    return 1 - tau, tau


def _flow_variance(s: GaussianSchedule, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    tau = flow_time(s, t, ndim)
    return tau**2, 2 * tau.log()


def _flow_posterior(
    s: GaussianSchedule, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A step along the straight line, without noise."""
    tau = flow_time(s, t, x_t.ndim)
    kept = (tau - 1 / s.num_timesteps).clamp(min=0) / tau
    none = torch.zeros_like(tau)
    return kept * x_t + (1 - kept) * x_start, none, none.clamp(min=1e-20).log()


VARIANCE_PRESERVING = Path(
    coefficients=lambda s, t, ndim: ForwardProcess.signal_and_noise(s, t, ndim),
    variance=lambda s, t, ndim: _extract(t, ndim, 1.0 - s.alphas_cumprod, s.log_one_minus_alphas_cumprod),
    posterior=_preserving_posterior,
)
# x_t = (1 - τ) x_0 + τ ε (Liu et al. 2022; Esser et al. 2024, equation 13)
RECTIFIED_FLOW = Path(_flow_coefficients, _flow_variance, _flow_posterior)

# -------------------------------------------------------------------------------------------------- what is predicted


class Parameterization(NamedTuple):
    """What the network predicts. Functions of (schedule, x_t, t, prediction) or (schedule, x_0, t, noise)."""

    target: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], Tensor]
    x_start: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], Tensor]
    noise: Callable[[GaussianSchedule, Tensor, Tensor, Tensor], Tensor]
    # weights of the variational bound, of (β, posterior variance, α, ᾱ)
    bound_weights: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    # |∂x_0 / ∂prediction|² as a function of the signal-to-noise ratio: turns a weight of x_0's error into one of the prediction's
    gain: Callable[[Tensor], Tensor]
    path: Path = VARIANCE_PRESERVING


PARAMETERIZATIONS = {
    "eps": Parameterization(
        target=lambda s, x_start, t, noise: noise,
        x_start=lambda s, x_t, t, eps: s.predict_start_from_noise(x_t, t, eps),
        noise=lambda s, x_t, t, eps: eps,
        bound_weights=lambda beta, variance, alpha, alpha_bar: (
            beta**2 / (2 * variance * alpha * (1 - alpha_bar))
        ),
        gain=lambda snr: 1 / snr,
    ),
    "x0": Parameterization(
        target=lambda s, x_start, t, noise: x_start,
        x_start=lambda s, x_t, t, x_start: x_start,
        noise=lambda s, x_t, t, x_start: s.noise_from_start(x_t, t, x_start),
        # "2 · 1 - ᾱ", not 2 · (1 - ᾱ): losses of published trainings depend on it
        bound_weights=lambda beta, variance, alpha, alpha_bar: 0.5 * alpha_bar.sqrt() / (2.0 * 1 - alpha_bar),
        gain=torch.ones_like,
    ),
    "v": Parameterization(
        target=lambda s, x_start, t, noise: s.get_v(x_start, noise, t),
        x_start=lambda s, x_t, t, v: s.predict_start_from_z_and_v(x_t, t, v),
        noise=lambda s, x_t, t, v: s.predict_eps_from_z_and_v(x_t, t, v),
        bound_weights=lambda beta, variance, alpha, alpha_bar: torch.ones_like(beta),
        gain=lambda snr: 1 / (snr + 1),
    ),
    # the velocity ε - x_0 of the straight line from x_0 to ε
    "flow": Parameterization(
        target=lambda s, x_start, t, noise: noise - x_start,
        x_start=lambda s, x_t, t, velocity: x_t - flow_time(s, t, x_t.ndim) * velocity,
        noise=lambda s, x_t, t, velocity: x_t + (1 - flow_time(s, t, x_t.ndim)) * velocity,
        bound_weights=lambda beta, variance, alpha, alpha_bar: torch.ones_like(beta),
        gain=lambda snr: 1 / (1 + snr.sqrt()) ** 2,
        path=RECTIFIED_FLOW,
    ),
}


class GaussianSchedule(ForwardProcess):
    """The forward process q and its posterior, as buffers under their published names; to be mixed into a module.

    A sampler needs no more of it than `signal_and_noise`, `predict_start` and `predict_noise`: these three hold for every
    parameterisation and both paths.

    Source: Ho et al. 2020, equations 2 to 7; v from Salimans & Ho 2022, appendix D.
    """

    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor
    parameterization: str
    v_posterior: float
    zero_terminal_snr = False

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

        A rectified flow has one schedule of `timesteps` steps; the others are not its.

        Args:
            given_betas: β_t; replaces everything else.
            beta_schedule, timesteps, linear_start, linear_end, cosine_s: see `make_beta_schedule`.

        Raises:
            ValueError: zero terminal SNR, and a network that would have to see ε, or more than ε, in pure noise.
        """
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        elif self.row.path is RECTIFIED_FLOW:
            betas = rectified_flow_betas(timesteps)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if self.zero_terminal_snr:
            if self.parameterization not in ("v", "x0"):
                raise ValueError(
                    f"zero_terminal_snr needs parameterization 'v' or 'x0', not {self.parameterization!r}: "
                    "at its last step the noise says nothing of the image (and a flow ends in pure noise anyway)"
                )
            betas = zero_terminal_snr(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        self.register_betas(betas)
        self._register_posterior(betas)

    def _register_posterior(self, betas: np.ndarray) -> None:
        alphas = 1.0 - betas
        bar = np.cumprod(alphas)
        before = np.append(1.0, bar[:-1])
        variance = (1 - self.v_posterior) * betas * (1.0 - before) / (1.0 - bar) + self.v_posterior * betas
        buffers = {
            "posterior_variance": variance,
            # clipped because the variance is 0 at the beginning of the chain
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - bar),
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / (1.0 - bar),
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        weights = self.row.bound_weights(
            self.betas,
            self.posterior_variance,
            torch.tensor(alphas, dtype=torch.float32),
            self.alphas_cumprod,
        )
        if len(weights) > 1:
            weights[0] = weights[1]  # the first is infinite for eps
        self.register_buffer("lvlb_weights", weights, persistent=False)

    @property
    def row(self) -> Parameterization:
        """The functions of this parameterisation."""
        return PARAMETERIZATIONS[self.parameterization]

    # ------------------------------------------------------------------------------ what a sampler needs

    def signal_and_noise(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """What x_0 and ε are multiplied by at times t (b,), each (b, 1, …) with `ndim` axes.

        Times are steps 0 … T - 1; those of a flow may be fractions from -1 (the image) to T - 1 (the noise).
        """
        return self.row.path.coefficients(self, t, ndim)

    def predict_start(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x_0 from x_t and whatever the network predicts."""
        return self.row.x_start(self, x, t, prediction)

    def predict_noise(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """ε from x_t and whatever the network predicts."""
        return self.row.noise(self, x, t, prediction)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio at times t (b,): the squared ratio of the two factors."""
        signal, noise = self.signal_and_noise(t, 1)
        return (signal / noise) ** 2

    def table_index(self, t: Tensor) -> Tensor:
        """Entries of per-step tables for times t (b,): a fraction takes the step after it."""
        return t.ceil().long().clamp(0, self.num_timesteps - 1) if t.is_floating_point() else t

    # --------------------------------------------------------------------------------------- q and its posterior

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of q(x_t | x_0), its variance and log-variance (b, 1, …)."""
        signal, _ = self.signal_and_noise(t, x_start.ndim)
        return (signal * x_start, *self.row.path.variance(self, t, x_start.ndim))

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of q(x_{t-1} | x_t, x_0), its variance and clipped log-variance (b, 1, …)."""
        return self.row.path.posterior(self, x_start, x_t, t)

    # ------------------------------------------------------------------------------------------------- conversions

    def noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """ε from x_t and x_0."""
        signal, noise = self.signal_and_noise(t, x_t.ndim)
        return (x_t - signal * x_start) / noise

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
