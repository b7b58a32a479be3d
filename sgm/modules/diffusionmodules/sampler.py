"""The loop of the samplers in the σ view: noise levels, guidance, sources of noise, precision, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.sampling_util import FiniteWatch, Noise, draw, sources
from ldm.modules.prompt_cache import prompt_cache
from sgm.modules.diffusionmodules.discretizer import Discretization
from sgm.modules.diffusionmodules.guiders import DenoiseFunction, Guider, IdentityGuider, guided
from sgm.util import object_from

logger = logging.getLogger(__name__)

NoiseFunction = Callable[[Tensor], Tensor]  # standard normal noise of a tensor's shape


@dataclass
class Run:
    """One run of a sampler: what stays the same at every step, and what a multistep method remembers."""

    denoiser: DenoiseFunction
    cond: Any
    uc: Any
    sigmas: Tensor  # (steps + 1,), descending
    s_in: Tensor  # ones (b,)
    noise: NoiseFunction | None = None  # None: the sampler's own
    history: list[Tensor] = field(default_factory=list)  # newest first

    def __post_init__(self) -> None:
        # read once: comparisons and weights then need no word from the device
        self.levels = self.sigmas.detach().cpu()

    def between(self, i: int) -> tuple[Tensor, Tensor]:
        """Noise levels before and after step i, each (b,)."""
        return self.s_in * self.sigmas[i], self.s_in * self.sigmas[i + 1]

    def remember(self, entry: Tensor, length: int) -> None:
        """Keep the newest `length` entries."""
        self.history = [entry, *self.history][:length]

    @property
    def noise_option(self) -> dict[str, Any]:
        """The run's noise as an argument of `sampler_step`, where it has any of its own."""
        return {} if self.noise is None else {"noise_sampler": self.noise}


class BaseDiffusionSampler:
    """The loop; a sampler defines `step`.

    Args:
        discretization_config: of the `Discretization`, or that itself.
        num_steps: default number of steps.
        guider_config: of the `Guider`, or that itself; no guidance if None.
        verbose: show progress.
        device: accepted, as published; noise levels are made where the latents are.
    """

    def __init__(
        self,
        discretization_config: Any,
        num_steps: int | None = None,
        guider_config: Any = None,
        verbose: bool = False,
        device: Any = "cuda",
    ) -> None:
        self.num_steps = num_steps
        self.discretization: Discretization = object_from(discretization_config)
        self.guider: Guider = IdentityGuider() if guider_config is None else object_from(guider_config)
        self.verbose, self.device = verbose, device
        self.noise_sampler: NoiseFunction = torch.randn_like

    @prompt_cache()
    def __call__(
        self,
        denoiser: DenoiseFunction,
        x: Tensor,
        cond: Any,
        uc: Any = None,
        num_steps: int | None = None,
        generator: Noise = None,
        callback: Callable[[int, Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Samples.

        Args:
            denoiser: called with latents (b, ...), noise levels (b,), a condition and `kwargs`.
            x: standard normal noise (b, ...); it is not changed. Latents of half precision are kept in float32 between the
                denoiser's calls.
            cond, uc: condition and unconditional condition; `uc` is `cond` if None.
            num_steps: instead of the sampler's own number.
            generator: source of the noise of stochastic samplers; torch's global one if None. A list of generators or seeds gives
                each sample its own noise, whatever else is in the batch.
            callback: called with the number of the step, from 0, and the latents after it.

        Raises:
            ValueError: no number of steps.
            FloatingPointError: the latents became infinite or undefined; names the step.
        """
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        denoiser = partial(denoiser, **kwargs) if kwargs else denoiser
        denoiser = denoiser if dtype == wide else _in_precision(denoiser, dtype)
        x, s_in, sigmas, num_sigmas, cond, uc = self.prepare_sampling_loop(
            x.to(wide, copy=True), cond, uc, num_steps
        )
        run = Run(denoiser, cond, uc, sigmas, s_in, _noise_from(generator, len(x)))
        watch = FiniteWatch(num_sigmas - 1)
        for i in self.get_sigma_gen(num_sigmas):
            x = self.step(run, i, x)
            watch.see(i, x)
            if callback is not None:
                callback(i, x)
        watch.close()
        return x.to(dtype)

    def prepare_sampling_loop(
        self, x: Tensor, cond: Any, uc: Any = None, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int, Any, Any]:
        """Noise levels, and x scaled in place to the first of them.

        Returns:
            x, ones (b,), the noise levels (n + 1,), their number, the condition, and the unconditional one (or the condition).

        Raises:
            ValueError: no number of steps.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if steps is None:
            raise ValueError(f"{type(self).__name__} has no num_steps; give them to it or to the call")
        sigmas = self.discretization(steps, device=x.device)
        x *= (1.0 + sigmas[0] ** 2.0).sqrt()
        return x, x.new_ones(len(x)), sigmas, len(sigmas), cond, cond if uc is None else uc

    def denoise(self, x: Tensor, denoiser: DenoiseFunction, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
        """The guided estimate of x_0 at noise levels (b,)."""
        return guided(self.guider, denoiser, x, sigma, cond, uc)

    def get_sigma_gen(self, num_sigmas: int) -> Iterable[int]:
        """Numbers of the steps, with a progress bar where wanted."""
        steps = range(num_sigmas - 1)
        if not self.verbose:
            return steps
        parts = (type(p).__name__ for p in (self, self.discretization, self.guider))
        logger.info("Sampler %s, discretization %s, guider %s", *parts)
        return tqdm(steps, desc=f"Sampling with {type(self).__name__} for {num_sigmas} steps")

    def step(self, run: Run, i: int, x: Tensor) -> Tensor:
        """Latents after step i."""
        raise NotImplementedError


def _in_precision(denoiser: DenoiseFunction, dtype: torch.dtype) -> DenoiseFunction:
    """A denoiser that is shown latents in its own precision, and whose estimates are kept in the sampler's."""

    def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return denoiser(x.to(dtype), sigma, cond).to(x.dtype)

    return denoise


def _noise_from(generator: Noise, batch_size: int) -> NoiseFunction | None:
    if generator is None:
        return None
    source = sources(generator, batch_size)
    return lambda x: draw(x.shape, x.device, source).to(x.dtype)


class SingleStepDiffusionSampler(BaseDiffusionSampler):
    """Base of the samplers that need nothing of the steps before; one defines `sampler_step`."""

    def sampler_step(
        self,
        sigma: Tensor,
        next_sigma: Tensor,
        denoiser: DenoiseFunction,
        x: Tensor,
        cond: Any,
        uc: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Latents at the next noise levels (b,)."""
        raise NotImplementedError

    def euler_step(self, x: Tensor, d: Tensor, dt: Tensor) -> Tensor:
        """x + dt d."""
        return x + dt * d
