"""Noise schedules in continuous time, and networks seen through them, for the DPM-Solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.diffusion.sampler import concatenate
from ldm.models.diffusion.sampling_util import append_dims

COSINE_S = 0.008
# ᾱ = 0 (zero terminal SNR) has no logarithm; this much signal is lost in float32's rounding
SMALLEST_ALPHA_BAR = 2.0**-24


class Point(NamedTuple):
    """A time and the process there: x_t = α x_0 + σ ε, λ = log(α / σ)."""

    t: float
    alpha: float
    sigma: float
    lamb: float


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Piecewise linear interpolation that goes on linearly beyond both ends; differentiable.

    Args:
        x: where, (n, c).
        xp: ascending knots, (c, k).
        yp: values at the knots, (c, k).

    Returns:
        (n, c)
    """
    x_rows, xp, yp = x.t().contiguous(), xp.expand(x.shape[1], -1).contiguous(), yp.expand(x.shape[1], -1)
    right = torch.searchsorted(xp, x_rows).clamp(1, xp.shape[1] - 1)
    x0, x1 = xp.gather(1, right - 1), xp.gather(1, right)
    y0, y1 = yp.gather(1, right - 1), yp.gather(1, right)
    return (y0 + (x_rows - x0) * (y1 - y0) / (x1 - x0)).t()


class NoiseScheduleVP:
    """A variance-preserving process x_t = α_t x_0 + σ_t ε in continuous time.

    Args:
        schedule: "discrete" (of a trained model), "linear" or "cosine".
        betas, alphas_cumprod: of a discrete schedule, either of them; step n lies at time n / N.
        continuous_beta_0, continuous_beta_1: ends of the linear schedule.

    Raises:
        ValueError: unknown schedule.

    Source: Lu et al. 2022 (DPM-Solver), appendix D.4.
    """

    def __init__(
        self,
        schedule: str = "discrete",
        betas: Tensor | None = None,
        alphas_cumprod: Tensor | None = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ) -> None:
        if schedule not in ("discrete", "linear", "cosine"):
            raise ValueError(f"schedule={schedule!r} is unknown; choose 'discrete', 'linear' or 'cosine'")
        self.schedule = schedule
        self.T = 0.9946 if schedule == "cosine" else 1.0  # the cosine's slope is unbounded at 1
        self.total_N = 1000
        self.beta_0, self.beta_1 = continuous_beta_0, continuous_beta_1
        self.cosine_log_alpha_0 = math.log(math.cos(COSINE_S / (1.0 + COSINE_S) * math.pi / 2.0))
        if schedule == "discrete":
            if betas is None and alphas_cumprod is None:
                raise ValueError("a discrete schedule needs betas or alphas_cumprod")
            bars: Any = alphas_cumprod
            log_bars = torch.log(1 - betas).cumsum(dim=0) if betas is not None else torch.log(bars)
            self.total_N = len(log_bars)
            self.t_array = torch.linspace(0.0, 1.0, self.total_N + 1)[1:].reshape(1, -1)
            self.log_alpha_array = 0.5 * log_bars.clamp(min=math.log(SMALLEST_ALPHA_BAR)).reshape(1, -1)

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """log α_t."""
        if self.schedule == "discrete":
            found = interpolate_fn(t.reshape(-1, 1), self.t_array.to(t), self.log_alpha_array.to(t))
            return found.reshape(t.shape if t.ndim == 0 else -1)
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return (
            torch.log(torch.cos((t + COSINE_S) / (1.0 + COSINE_S) * math.pi / 2.0)) - self.cosine_log_alpha_0
        )

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """α_t."""
        return torch.exp(self.marginal_log_mean_coeff(t))

    def marginal_std(self, t: Tensor) -> Tensor:
        """σ_t."""
        return torch.sqrt(1.0 - torch.exp(2.0 * self.marginal_log_mean_coeff(t)))

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """λ_t = log(α_t / σ_t), half the log signal-to-noise ratio."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * torch.log(1.0 - torch.exp(2.0 * log_alpha))

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """The time at which λ has a value."""
        log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(lamb), -2.0 * lamb)
        if self.schedule == "linear":
            slope = self.beta_1 - self.beta_0
            # the root of the quadratic log α(t), written so that nothing cancels
            constant = -4.0 * slope * log_alpha
            return constant / (torch.sqrt(self.beta_0**2 + constant) + self.beta_0) / slope
        if self.schedule == "discrete":
            tables = self.log_alpha_array.to(lamb).flip(1), self.t_array.to(lamb).flip(1)
            return interpolate_fn(log_alpha.reshape(-1, 1), *tables).reshape(
                lamb.shape if lamb.ndim == 0 else -1
            )
        angle = torch.arccos(torch.exp(log_alpha + self.cosine_log_alpha_0))
        return angle * 2.0 * (1.0 + COSINE_S) / math.pi - COSINE_S

    def time_steps(self, skip_type: str, t_T: float, t_0: float, N: int, device: Any = "cpu") -> Tensor:
        """N + 1 times from t_T down to t_0, evenly spaced in log SNR, in time, or in the root of time.

        Raises:
            ValueError: unknown spacing.
        """
        if skip_type == "logSNR":
            ends = [self.marginal_lambda(torch.full((1,), t, device=device)) for t in (t_T, t_0)]
            return self.inverse_lambda(torch.linspace(float(ends[0]), float(ends[1]), N + 1, device=device))
        if skip_type == "time_uniform":
            return torch.linspace(t_T, t_0, N + 1, device=device)
        if skip_type == "time_quadratic":
            return torch.linspace(t_T**0.5, t_0**0.5, N + 1, device=device) ** 2
        raise ValueError(
            f"skip_type={skip_type!r} is unknown; choose 'logSNR', 'time_uniform' or 'time_quadratic'"
        )

    def points(self, times: Tensor) -> list[Point]:
        """The process at times (n,), computed on the CPU in float64: steps made of these numbers cost a GPU no wait."""
        t = times.detach().cpu().double()
        columns = t, self.marginal_alpha(t), self.marginal_std(t), self.marginal_lambda(t)
        return [Point(*row) for row in torch.stack(columns, dim=1).tolist()]


# what networks predict, as ε: functions of (x, α, σ, output)
TO_NOISE: dict[str, Callable[[Tensor, Any, Any, Tensor], Tensor]] = {
    "noise": lambda x, alpha, sigma, out: out,
    "x_start": lambda x, alpha, sigma, out: (x - alpha * out) / sigma,
    "v": lambda x, alpha, sigma, out: alpha * out + sigma * x,
    "score": lambda x, alpha, sigma, out: -sigma * out,
}
# the same as x_0
TO_DATA: dict[str, Callable[[Tensor, Any, Any, Tensor], Tensor]] = {
    "noise": lambda x, alpha, sigma, out: (x - sigma * out) / alpha,
    "x_start": lambda x, alpha, sigma, out: out,
    "v": lambda x, alpha, sigma, out: alpha * x - sigma * out,
}
GUIDANCE_TYPES = ("uncond", "classifier", "classifier-free")


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_type: str = "uncond",
    condition: Any = None,
    unconditional_condition: Any = None,
    guidance_scale: float = 1.0,
    classifier_fn: Any = None,
    classifier_kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of any kind as a function (x, continuous time) → ε.

    Args:
        model: called with (x, time), or (x, time, condition) for a conditional one.
        noise_schedule: a discrete one gives the network (t - 1/N) · 1000 as the time, not rounded.
        model_type: what it predicts: "noise", "x_start", "v" or "score".
        model_kwargs: further arguments for it.
        guidance_type: "uncond", "classifier" or "classifier-free".
        condition, unconditional_condition: tensors, lists or dicts.
        guidance_scale: strength; classifier-free guidance asks the network once where it is 1.
        classifier_fn: called with (x, time, condition), gives log-probabilities.
        classifier_kwargs: further arguments for it.

    Raises:
        ValueError: unknown model or guidance type.
    """
    if model_type not in TO_NOISE:
        raise ValueError(f"model_type={model_type!r} is unknown; choose one of {sorted(TO_NOISE)}")
    if guidance_type not in GUIDANCE_TYPES:
        raise ValueError(f"guidance_type={guidance_type!r} is unknown; choose one of {GUIDANCE_TYPES}")
    extra = dict(model_kwargs or {})

    def network_time(t: Tensor) -> Tensor:
        return (t - 1.0 / noise_schedule.total_N) * 1000.0 if noise_schedule.schedule == "discrete" else t

    def noise(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        t = t.expand(len(x)) if len(t) == 1 else t
        out = model(x, network_time(t), **extra) if cond is None else model(x, network_time(t), cond, **extra)
        alpha, sigma = (
            append_dims(f(t), x.ndim) for f in (noise_schedule.marginal_alpha, noise_schedule.marginal_std)
        )
        return TO_NOISE[model_type](x, alpha, sigma, out)

    def classifier_gradient(x: Tensor, time: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_probability = classifier_fn(leaf, time, condition, **(classifier_kwargs or {}))
            return torch.autograd.grad(log_probability.sum(), leaf)[0]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x)) if len(t) == 1 else t
        if guidance_type == "uncond":
            return noise(x, t)
        if guidance_type == "classifier":
            sigma = append_dims(noise_schedule.marginal_std(t), x.ndim)
            return noise(x, t) - guidance_scale * sigma * classifier_gradient(x, network_time(t))
        if guidance_scale == 1.0 or unconditional_condition is None:
            return noise(x, t, cond=condition)
        both = noise(
            torch.cat([x, x]), torch.cat([t, t]), cond=concatenate(unconditional_condition, condition)
        )
        uncond, cond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return guided
