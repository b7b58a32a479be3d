"""Samplers in the σ view: from noise of scale σ₀ down a list of noise levels, with any denoiser x, σ, condition → x_0.

Deterministic ones solve the probability-flow equation dx/dσ = (x - denoised(x, σ)) / σ; stochastic ones add noise on the way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.dpm_solver.multistep import SOLVER_TYPES, multistep_weights
from sgm.modules.diffusionmodules.guiders import DenoiseFunction
from sgm.modules.diffusionmodules.sampler import (
    BaseDiffusionSampler,
    NoiseFunction,
    Run,
    SingleStepDiffusionSampler,
)
from sgm.modules.diffusionmodules.sampling_utils import (
    get_ancestral_step,
    linear_multistep_coeff,
    to_d,
    to_neg_log_sigma,
    to_sigma,
)
from sgm.util import append_dims

__all__ = [
    "AncestralSampler", "BaseDiffusionSampler", "DPMPP2MSDESampler", "DPMPP2MSampler", "DPMPP2SAncestralSampler", "DPMPP3MSDESampler",
    "DPMPPSDESampler", "EDMSampler", "EulerAncestralSampler", "EulerEDMSampler", "HeunEDMSampler", "LinearMultistepSampler",
    "SingleStepDiffusionSampler",
]  # fmt: skip

NEARLY_ZERO = 1e-14


# ------------------------------------------------------------------------------------------------------- Euler and Heun


class EDMSampler(SingleStepDiffusionSampler):
    """Steps along the probability flow, each after raising the noise a little ("churn").

    Args:
        s_churn: how much noise in all; a step raises σ by the factor 1 + min(s_churn / steps, √2 - 1).
        s_tmin, s_tmax: noise levels where that is done, both included.
        s_noise: scale of the new noise.

    The other arguments are those of `BaseDiffusionSampler`.

    Source: Karras et al. 2022, algorithm 2.
    """

    def __init__(
        self,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = s_churn, s_tmin, s_tmax, s_noise

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """See `BaseDiffusionSampler`."""
        # compared as tensors, in float32: a bound that is one of the levels includes it
        is_churned = bool((run.levels[i] >= self.s_tmin) & (run.levels[i] <= self.s_tmax))
        gamma = min(self.s_churn / (len(run.levels) - 1), 2**0.5 - 1) if is_churned else 0.0
        return self.sampler_step(
            *run.between(i), run.denoiser, x, run.cond, run.uc, gamma, **run.noise_option
        )

    def sampler_step(
        self,
        sigma: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        x: Tensor,
        cond: Any,
        uc: Any = None,
        gamma: float = 0.0,
        noise_sampler: NoiseFunction | None = None,
    ) -> Tensor:
        """One step; `gamma` is by how much to raise the noise first, as a share of it."""
        sigma_hat = sigma * (gamma + 1.0)
        if gamma > 0:
            noise = (noise_sampler or self.noise_sampler)(x) * self.s_noise
            x = x + noise * append_dims(sigma_hat**2 - sigma**2, x.ndim).sqrt()
        d = to_d(x, sigma_hat, self.denoise(x, denoiser, sigma_hat, cond, uc))
        dt = append_dims(next_sigma - sigma_hat, x.ndim)
        euler = self.euler_step(x, d, dt)
        return self.possible_correction_step(euler, x, d, dt, next_sigma, denoiser, cond, uc)

    def possible_correction_step(
        self,
        euler_step: Tensor,
        x: Tensor,
        d: Tensor,
        dt: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        cond: Any,
        uc: Any,
    ) -> Tensor:
        """The step taken, given Euler's, which is taken as it is."""
        return euler_step


class EulerEDMSampler(EDMSampler):
    """Euler's method, order 1; without churn it is DDIM with η = 0."""


class HeunEDMSampler(EDMSampler):
    """Heun's method, order 2, with two calls of the denoiser a step (one where σ becomes 0)."""

    def possible_correction_step(
        self,
        euler_step: Tensor,
        x: Tensor,
        d: Tensor,
        dt: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        cond: Any,
        uc: Any,
    ) -> Tensor:
        """The step along the mean of the derivatives at both ends."""
        if next_sigma.sum() < NEARLY_ZERO:
            return euler_step
        d_new = to_d(euler_step, next_sigma, self.denoise(euler_step, denoiser, next_sigma, cond, uc))
        corrected = x + dt * (d + d_new) / 2.0
        return torch.where(append_dims(next_sigma, x.ndim) > 0.0, corrected, euler_step)


# ------------------------------------------------------------------------------------------------------------ ancestral


class AncestralSampler(SingleStepDiffusionSampler):
    """Steps that go below the next noise level and return to it with new noise.

    Noise is drawn at every step, the last one included, where it has no effect.

    Args:
        eta: 1 for the variance of the reverse chain, 0 for no noise (none is drawn then).
        s_noise: scale of the noise.

    The other arguments are those of `BaseDiffusionSampler`. `noise_sampler` may be replaced by any function of x.
    """

    def __init__(self, eta: float = 1.0, s_noise: float = 1.0, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eta, self.s_noise = eta, s_noise

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """See `BaseDiffusionSampler`."""
        return self.sampler_step(*run.between(i), run.denoiser, x, run.cond, run.uc, **run.noise_option)

    def sampler_step(
        self,
        sigma: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        x: Tensor,
        cond: Any,
        uc: Any,
        noise_sampler: NoiseFunction | None = None,
    ) -> Tensor:
        """One step: `descend` without noise, then the noise."""
        sigma_down, sigma_up = get_ancestral_step(sigma, next_sigma, eta=self.eta)
        x = self.descend(sigma, sigma_down, denoiser, x, cond, uc)
        return self.ancestral_step(x, sigma, next_sigma, sigma_up, noise_sampler)

    def descend(
        self, sigma: Tensor, sigma_down: Tensor, denoiser: DenoiseFunction, x: Tensor, cond: Any, uc: Any
    ) -> Tensor:
        """Latents at noise levels σ_down (b,)."""
        denoised = self.denoise(x, denoiser, sigma, cond, uc)
        return self.ancestral_euler_step(x, denoised, sigma, sigma_down)

    def ancestral_euler_step(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_down: Tensor) -> Tensor:
        """Euler's step from σ to σ_down."""
        return self.euler_step(x, to_d(x, sigma, denoised), append_dims(sigma_down - sigma, x.ndim))

    def ancestral_step(
        self,
        x: Tensor,
        sigma: Tensor,
        next_sigma: Tensor,
        sigma_up: Tensor | float,
        noise_sampler: NoiseFunction | None = None,
    ) -> Tensor:
        """x with noise of scale σ_up, except where σ has become 0."""
        if not isinstance(sigma_up, Tensor):
            return x
        noise = (noise_sampler or self.noise_sampler)(x) * self.s_noise
        noised = x + noise * append_dims(sigma_up, x.ndim)
        return torch.where(append_dims(next_sigma, x.ndim) > 0.0, noised, x)


class EulerAncestralSampler(AncestralSampler):
    """Euler's method with ancestral noise: DDPM's chain for eta=1."""


class DPMPP2SAncestralSampler(AncestralSampler):
    """DPM-Solver++(2S) with ancestral noise: order 2 between the noises, two calls of the denoiser a step.

    Source: Lu et al. 2022b, algorithm 1, with the intermediate point halfway in -ln σ.
    """

    def descend(
        self, sigma: Tensor, sigma_down: Tensor, denoiser: DenoiseFunction, x: Tensor, cond: Any, uc: Any
    ) -> Tensor:
        """See `AncestralSampler`."""
        denoised = self.denoise(x, denoiser, sigma, cond, uc)
        euler = self.ancestral_euler_step(x, denoised, sigma, sigma_down)
        if sigma_down.sum() < NEARLY_ZERO:
            return euler
        t, t_next = to_neg_log_sigma(sigma), to_neg_log_sigma(sigma_down)
        middle = to_sigma(t + 0.5 * (t_next - t))
        x_middle = _exponential_step(x, denoised, sigma, middle)
        denoised_middle = self.denoise(x_middle, denoiser, middle, cond, uc)
        second = _exponential_step(x, denoised_middle, sigma, sigma_down)
        return torch.where(append_dims(sigma_down, x.ndim) > 0.0, second, euler)


def _exponential_step(x: Tensor, denoised: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The exact solution from σ to the next while the estimate of x_0 stays the same."""
    share = append_dims(next_sigma / sigma, x.ndim)
    return share * x + (1 - share) * denoised


# ------------------------------------------------------------------------------------------------------------ multistep


class DPMPP2MSampler(BaseDiffusionSampler):
    """DPM-Solver++(2M): order 2 with one call of the denoiser a step; the first step and one to σ = 0 are of order 1.

    Source: Lu et al. 2022b, algorithm 2.
    """

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """See `BaseDiffusionSampler`."""
        old = run.history[0] if run.history else None
        previous = run.between(i - 1)[0] if i else None
        x, denoised = self.sampler_step(old, previous, *run.between(i), run.denoiser, x, run.cond, run.uc)
        run.remember(denoised, 1)
        return x

    def sampler_step(
        self,
        old_denoised: Tensor | None,
        previous_sigma: Tensor | None,
        sigma: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        x: Tensor,
        cond: Any,
        uc: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents at the next noise levels (b,), and the estimate of x_0 at the present ones.

        Args:
            old_denoised, previous_sigma: estimate and noise levels of the step before; None at the first.
        """
        denoised = self.denoise(x, denoiser, sigma, cond, uc)
        first = _exponential_step(x, denoised, sigma, next_sigma)
        if old_denoised is None or previous_sigma is None or next_sigma.sum() < NEARLY_ZERO:
            return first, denoised
        # half the step's length over that of the step before: where the estimate will be on average
        ahead = append_dims(0.5 * (sigma / next_sigma).log() / (previous_sigma / sigma).log(), x.ndim)
        extrapolated = denoised + ahead * (denoised - old_denoised)
        second = _exponential_step(x, extrapolated, sigma, next_sigma)
        return torch.where(append_dims(next_sigma, x.ndim) > 0.0, second, first), denoised


class LinearMultistepSampler(BaseDiffusionSampler):
    """The Adams-Bashforth method in σ, with one call of the denoiser a step.

    Args:
        order: at most how many derivatives are used.

    The other arguments are those of `BaseDiffusionSampler`.
    """

    def __init__(self, order: int = 4, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = order

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """See `BaseDiffusionSampler`."""
        sigma, _ = run.between(i)
        run.remember(to_d(x, sigma, self.denoise(x, run.denoiser, sigma, run.cond, run.uc)), self.order)
        levels, order = run.levels.tolist(), len(run.history)
        for j, d in enumerate(run.history):
            x = x + linear_multistep_coeff(order, levels, i, j) * d
        return x


class DPMPPSDESampler(BaseDiffusionSampler):
    """Base of SDE-DPM-Solver++: multistep in λ = -ln σ, with noise at every step but one to σ = 0.

    Args:
        eta: 1 for the reverse-time equation, 0 for the probability flow, in between for some of both.
        s_noise: scale of the noise.
        solver_type: "dpm_solver" (the midpoint variant of order 2), "taylor" (the Heun variant) or "exact" (for order 3, with the
            whole of its last term).

    The other arguments are those of `BaseDiffusionSampler`.

    With noise of strength η the estimate's part of the exact solution runs 1 + η times as fast, so that the weights are those of
    the deterministic solver for a step of (1 + η) h.

    Source: Lu et al. 2022b (SDE-DPM-Solver++); for other η than 0 and 1, Xue et al. 2023 (SA-Solver).
    """

    order: int
    default_type: str

    def __init__(
        self,
        eta: float = 1.0,
        s_noise: float = 1.0,
        solver_type: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eta, self.s_noise = eta, s_noise
        self.solver_type = self.default_type if solver_type is None else solver_type
        if self.solver_type not in SOLVER_TYPES:
            raise ValueError(f"solver_type={solver_type!r} is unknown; choose one of {SOLVER_TYPES}")
        if eta < 0:
            raise ValueError(f"eta={eta} must be 0 or more")

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """See `BaseDiffusionSampler`."""
        denoised = self.denoise(x, run.denoiser, run.between(i)[0], run.cond, run.uc)
        run.remember(denoised, self.order)
        if run.levels[i + 1] < NEARLY_ZERO:
            return denoised
        # all of the past steps that count, newest first, in double precision: the weights are small differences
        lambdas = -run.levels[i + 1 - len(run.history) : i + 2].double().log().flip(0)
        h = lambdas[0] - lambdas[1]
        gaps = list((lambdas[1:-1] - lambdas[2:]) / h)
        fast = (1.0 + self.eta) * h
        out = float((-fast).exp()) * x
        for weight, estimate in zip(
            multistep_weights(fast, gaps, -1.0, self.solver_type), run.history, strict=True
        ):
            out = out - float(weight) * estimate
        if not self.eta:
            return out
        spread = float(run.levels[i + 1]) * math.sqrt(-math.expm1(-2.0 * self.eta * float(h)))
        return out + (run.noise or self.noise_sampler)(x) * (self.s_noise * spread)


class DPMPP2MSDESampler(DPMPPSDESampler):
    """DPM++ 2M SDE; with eta=0 it is DPM-Solver++(2M)."""

    order, default_type = 2, "dpm_solver"


class DPMPP3MSDESampler(DPMPPSDESampler):
    """DPM++ 3M SDE."""

    order, default_type = 3, "taylor"
