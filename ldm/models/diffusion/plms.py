"""PLMS: pseudo linear multistep sampling (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import LatentSampler
from ldm.models.diffusion.sampling_util import norm_thresholding

# Adams-Bashforth: weights of the present and the earlier predictions, newest first
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(LatentSampler):
    """Sampling with the history of predictions; see `LatentSampler` for the arguments of `sample`.

    The first step asks the network twice (a pseudo improved Euler step), every later one once.

    Source: Liu et al. 2022, equations 9 and 12.
    """

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """As in the base class.

        Raises:
            ValueError: an eta other than 0.
        """
        if ddim_eta != 0:
            raise ValueError("ddim_eta must be 0 for PLMS: it is deterministic")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self._history: list[Tensor] = []
        return super()._run(*args, **kwargs)

    def plms_sampling(
        self, cond: Any, shape: Sequence[int], x_T: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample on a schedule made before; the options are those of `sample`."""
        defaults = {
            "callback": None,
            "img_callback": None,
            "mask": None,
            "x0": None,
            "log_every_t": 100,
            "ucg_schedule": None,
            "verbose": True,
        }
        timesteps = options.pop("timesteps", None)
        steps = self.ddim_timesteps if timesteps is None else timesteps
        return self._run(cond, shape, x_T=x_T, timesteps=steps, **(defaults | options))

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One update by `p_sample_plms`, with up to three earlier predictions."""
        t_next = torch.full_like(t, int(timesteps[max(index - 1, 0)]))
        x_prev, pred_x0, eps = self.p_sample_plms(
            x, c, t, index=index, old_eps=self._history, t_next=t_next, **options
        )
        self._history = [*self._history[-2:], eps]
        return x_prev, pred_x0

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
        generator: Any = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            x: latents at time t.
            c: the condition.
            t: (b,), what the network is told.
            index: of that time among the visited steps.
            old_eps: earlier predictions, newest last; none at the first step.
            t_next: time of the step before, for the first step.
            dynamic_threshold: bound for the root mean square of the estimate of x_0.

        The other arguments are those of `sample`.

        Returns:
            Latents at the step before, the estimate of x_0, and this step's prediction of ε.
        """

        def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.predict(
                x, t, c, unconditional_guidance_scale, unconditional_conditioning, score_corrector, corrector_kwargs, guidance_rescale
            )  # fmt: skip

        def move(eps: Tensor, pred_x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if dynamic_threshold is not None:
                if pred_x0 is None:
                    pred_x0 = (x - sqrt_one_minus_a * eps) / a**0.5
                pred_x0 = norm_thresholding(pred_x0, dynamic_threshold)
            return self.transfer(
                x, eps, index, pred_x0=pred_x0, use_original_steps=use_original_steps, quantize_denoised=quantize_denoised,
                temperature=temperature, noise_dropout=noise_dropout, repeat_noise=repeat_noise, generator=generator,
            )  # fmt: skip

        a, _, _, sqrt_one_minus_a = self._at(index, use_original_steps)
        eps, start = predict(x, t)
        if (
            a == 0
        ):  # zero terminal SNR: x is all noise, ε is known and only the model's own x_0 says where to go
            return (*move(eps, start), eps)
        if old_eps:
            history = [eps, *reversed(list(old_eps)[-3:])]
            slope = ADAMS_BASHFORTH[len(history)][0] * eps
            for weight, earlier in zip(ADAMS_BASHFORTH[len(history)][1:], history[1:], strict=True):
                slope = slope.add(earlier, alpha=weight)
        else:
            ahead, _ = move(eps)
            slope = (eps + predict(ahead, t if t_next is None else t_next)[0]) / 2
        x_prev, pred_x0 = move(slope)
        return x_prev, pred_x0, eps
