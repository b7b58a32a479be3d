"""Training objectives that a configuration may switch on: how times and noise are drawn, and how steps are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.gaussian import PARAMETERIZATIONS, RECTIFIED_FLOW, GaussianSchedule
from taming.util import nearest

TIMES = ("uniform", "logit-normal")


@dataclass(frozen=True)
class Objective:
    """What deviates from Ho et al. 2020 in training; by default nothing does.

    Args:
        min_snr_gamma: weight the error of x_0 by min(SNR, γ) instead of the parameterisation's own weight (Hang et al. 2023,
            section 3.4; 5 there).
        offset_noise: add so much noise that is the same for all pixels of a channel, so that a picture's mean brightness is
            learned, too (Guttenberg 2023, "Diffusion with offset noise"; 0.1 there).
        input_perturbation: in training, disturb x_t by so much more noise that the network is not to predict (Ning et al. 2023,
            algorithm 1; 0.1 there).
        times: "uniform", over the steps, or "logit-normal", over the fractions between (rectified flow only); None takes what
            is usual for the parameterisation.
        logit_mean, logit_std: of the latter (Esser et al. 2024, equation 19; 0 and 1 there).

    Raises:
        ValueError: a value that makes no sense, or logit-normal times without `parameterization: flow`.
    """

    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    times: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.times not in (None, *TIMES):
            raise ValueError(f"objective.times={self.times!r} is unknown; choose one of {list(TIMES)}")
        lower = {"offset_noise": self.offset_noise, "input_perturbation": self.input_perturbation}
        for name, value in lower.items():
            if value < 0:
                raise ValueError(f"objective.{name}={value} must not be negative; 0 switches it off")
        for name in ("min_snr_gamma", "logit_std"):
            given = getattr(self, name)
            if given is not None and given <= 0:
                raise ValueError(f"objective.{name}={given} must be positive")

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, parameterization: str) -> Objective:
        """The objective that a configuration's `objective:` asks for.

        Raises:
            ValueError: unknown switches, or one that the parameterisation cannot have.
        """
        known = [f.name for f in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ValueError(f"objective.{name} is unknown. {nearest(str(name), known)}")
        made = cls(**dict(options or {}))
        if made.times == "logit-normal" and PARAMETERIZATIONS[parameterization].path is not RECTIFIED_FLOW:
            raise ValueError(
                f"objective.times='logit-normal' needs parameterization 'flow', not {parameterization!r}: "
                "the other schedules have whole steps only"
            )
        return made

    def draw_times(self, schedule: GaussianSchedule, n: int, device: Any) -> Tensor:
        """Times (n,) to train at: whole steps, or for logit-normal times fractions from -1 to T - 1."""
        steps = schedule.num_timesteps
        is_flow = schedule.row.path is RECTIFIED_FLOW
        if self.times == "uniform" or not is_flow:
            return torch.randint(0, steps, (n,), device=device).long()
        logits = self.logit_mean + self.logit_std * torch.randn(n, device=device)
        return steps * logits.sigmoid() - 1

    def draw_noise(self, x: Tensor) -> Tensor:
        """The ε of a training batch (b, c, …)."""
        noise = torch.randn_like(x)
        if self.offset_noise:
            shape = (*x.shape[:2], *((1,) * (x.ndim - 2)))
            noise = noise + self.offset_noise * torch.randn(shape, device=x.device, dtype=x.dtype)
        return noise

    def disturb(self, noise: Tensor) -> Tensor:
        """The noise that x_t is made with, where the network is to predict `noise`."""
        if not self.input_perturbation:
            return noise
        return noise + self.input_perturbation * torch.randn_like(noise)

    def weigh(self, loss: Tensor, schedule: GaussianSchedule, t: Tensor) -> Tensor:
        """Losses (b,) at times t (b,), weighted.

        With the error of x_0 being the prediction's error times the parameterisation's `gain`, the weight is
        min(SNR, γ) · gain: min(SNR, γ) / SNR for ε, min(SNR, γ) for x_0, min(SNR, γ) / (SNR + 1) for v.
        """
        if self.min_snr_gamma is None:
            return loss
        snr = schedule.snr(t)
        return snr.clamp(max=self.min_snr_gamma) * schedule.row.gain(snr) * loss
