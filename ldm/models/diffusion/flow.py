"""Sampling a rectified flow: Euler's method along nearly straight lines (Liu et al. 2022; Esser et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import LatentSampler


class FlowSampler(LatentSampler):
    """Euler's method for `parameterization: flow`; see `LatentSampler` for the arguments of `sample`.

    The step is x_0 and ε, estimated and mixed anew: x_s = (1 - σ) x_0 + σ ε. It is Euler's for a flow, and for the other
    parameterisations it would be DDIM's.
    """

    samples_flows = True

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Visit exactly `ddim_num_steps` steps, evenly, from pure noise on.

        Raises:
            ValueError: more steps than the flow has, or an eta: the way is deterministic.
        """
        total = self.ddpm_num_timesteps
        if not 1 <= ddim_num_steps <= total:
            raise ValueError(f"{ddim_num_steps} sampling steps asked for; choose from 1 to {total}")
        if ddim_eta != 0:
            raise ValueError(f"eta={ddim_eta}: a flow is sampled without noise; leave eta at 0")
        ends = np.round(np.linspace(0, total, ddim_num_steps + 1)).astype(int)
        self.ddim_timesteps = ends[1:] - 1

    def step(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        i: int,
        timesteps: np.ndarray,
        *,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        guidance_rescale: float = 0.0,
        quantize_denoised: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """One update: x at `index` → x at the step before (after the last one, the image), and the estimate of x_0."""
        out = self.guided(x, t, c, unconditional_guidance_scale, unconditional_conditioning, guidance_rescale)
        start, noise = self.model.predict_start(x, t, out), self.model.predict_noise(x, t, out)
        if quantize_denoised:
            start, *_ = self.model.first_stage_model.quantize(start)
        before = int(timesteps[index - 1]) if index else -1
        signal, spread = self.model.signal_and_noise(torch.full_like(t, before), x.ndim)
        return signal * start + spread * noise, start
