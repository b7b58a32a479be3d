"""The forward process of diffusion, as buffers under their published names: what every noising module shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import extract_into_tensor


class ForwardProcess(nn.Module):
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε, to be mixed into a module.

    Notation: α = 1 - β, ᾱ_t the product of α up to t.

    Source: Ho et al. 2020, equation 4.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    num_timesteps: int

    def register_betas(self, betas: np.ndarray) -> None:
        """Store what follows from β_t (T,): computed in float64, kept in float32. A last ᾱ of 0 gives infinite reciprocals."""
        self.num_timesteps = len(betas)
        bar = np.cumprod(1.0 - betas)
        with np.errstate(divide="ignore"):
            buffers = {
                "betas": betas,
                "alphas_cumprod": bar,
                "alphas_cumprod_prev": np.append(1.0, bar[:-1]),
                "sqrt_alphas_cumprod": np.sqrt(bar),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
                "log_one_minus_alphas_cumprod": np.log(1.0 - bar),
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1),
            }
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def signal_and_noise(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """What x_0 and ε are multiplied by at times t (b,), each (b, 1, …) with `ndim` axes."""
        shape = (1,) * ndim
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, shape),
            extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, shape),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0) at times t (b,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal, spread = self.signal_and_noise(t, x_start.ndim)
        return signal * x_start + spread * noise


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """β_t whose last step leaves nothing of the image: √ᾱ is shifted to end at 0 and scaled to begin where it began.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1.0 - bar / np.append(1.0, bar[:-1])


def rectified_flow_betas(timesteps: int) -> np.ndarray:
    """β_t of the variance-preserving process that has, at each step, the signal-to-noise ratio of a rectified flow.

    Step t of the flow mixes (1 - τ) x_0 + τ ε with τ = (t + 1) / T; hence ᾱ = (1 - τ)² / ((1 - τ)² + τ²).
    """
    tau = np.arange(1, timesteps + 1, dtype=np.float64) / timesteps
    bar = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
    return 1.0 - bar / np.append(1.0, bar[:-1])
