"""DDIM: few-step, optionally deterministic sampling, and its inversion (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.sampler import LatentSampler
from ldm.models.diffusion.sampling_util import FiniteWatch, Noise, draw, sources
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.prompt_cache import prompt_cache


class DDIMSampler(LatentSampler):
    """Denoising diffusion implicit sampling; see `LatentSampler` for the arguments of `sample`.

    ```python
    sampler = DDIMSampler(model)
    samples, _ = sampler.sample(50, 4, (4, 64, 64), conditioning=c, unconditional_guidance_scale=7.5, unconditional_conditioning=uc)
    ```

    Source: Song et al. 2021, equation 12.
    """

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        timesteps: Any = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        generator: Noise = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample on a schedule made before.

        Args:
            shape: (b, c, h, w).
            ddim_use_original_steps: visit every training step.
            timesteps: only the first so many of the visited steps (one fewer than asked for, as published), or an array of steps.

        The other arguments are those of `sample`.
        """
        if timesteps is None:
            timesteps = np.arange(self.ddpm_num_timesteps) if ddim_use_original_steps else self.ddim_timesteps
        elif isinstance(timesteps, int) and ddim_use_original_steps:
            timesteps = np.arange(timesteps)
        elif isinstance(timesteps, int):
            n = self.ddim_timesteps.shape[0]
            timesteps = self.ddim_timesteps[: int(min(timesteps / n, 1) * n) - 1]
        return self._run(
            cond, shape, x_T=x_T, timesteps=timesteps, callback=callback, img_callback=img_callback, mask=mask, x0=x0,
            log_every_t=log_every_t, ucg_schedule=ucg_schedule, verbose=True, generator=generator,
            use_original_steps=ddim_use_original_steps, quantize_denoised=quantize_denoised, temperature=temperature,
            noise_dropout=noise_dropout, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold, guidance_rescale=guidance_rescale,
        )  # fmt: skip

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One update by `p_sample_ddim`."""
        return self.p_sample_ddim(x, c, t, index=index, **options)

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: float | None = None,
        generator: Any = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """One step of equation 12.

        Args:
            x: latents at time t.
            c: the condition.
            t: (b,), what the network is told.
            index: of that time among the visited steps.

        The other arguments are those of `sample`.

        Returns:
            Latents at the step before, and the estimate of x_0.

        Raises:
            NotImplementedError: `dynamic_threshold` is given.
        """
        if dynamic_threshold is not None:
            raise NotImplementedError("DDIM has no dynamic thresholding")
        eps, pred_x0 = self.predict(
            x, t, c, unconditional_guidance_scale, unconditional_conditioning, score_corrector, corrector_kwargs, guidance_rescale
        )  # fmt: skip
        return self.transfer(
            x, eps, index, pred_x0=pred_x0, use_original_steps=use_original_steps, quantize_denoised=quantize_denoised,
            temperature=temperature, noise_dropout=noise_dropout, repeat_noise=repeat_noise, generator=generator,
        )  # fmt: skip

    # ------------------------------------------------------------------------------ image to image

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
        generator: Noise = None,
    ) -> Tensor:
        """Noise latents up to steps t (b,), counted among the visited ones (or all, with `use_original_steps`).

        Args:
            x0: latents (b, c, h, w).
            t: steps; beyond the last is the last.
            use_original_steps: count all training steps.
            noise: drawn if None.
            generator: its source, see `sample`.
        """
        if use_original_steps:
            scale, spread = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        else:
            scale = torch.as_tensor(self.ddim_alphas, device=x0.device).sqrt().float()
            spread = torch.as_tensor(self.ddim_sqrt_one_minus_alphas, device=x0.device).float()
        t = t.clamp(max=len(scale) - 1)  # full strength: the last step of the table is as far as it goes
        noise = draw(x0.shape, x0.device, sources(generator, len(x0))) if noise is None else noise
        return extract_into_tensor(scale, t, x0.shape) * x0 + extract_into_tensor(spread, t, x0.shape) * noise

    @torch.no_grad()
    @prompt_cache()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        generator: Noise = None,
        verbose: bool = True,
        guidance_rescale: float = 0.0,
    ) -> Tensor:
        """Denoise latents over the first `t_start` visited steps, backwards; the other arguments are those of `sample`."""
        timesteps = (np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps)[
            :t_start
        ]
        x, source, watch = x_latent, sources(generator, len(x_latent)), FiniteWatch(len(timesteps))
        for i, index, t in self.walk(timesteps, len(x), verbose, desc="Decoding image"):
            x, _ = self.p_sample_ddim(
                x, cond, t, index=index, use_original_steps=use_original_steps, generator=source,
                unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=unconditional_conditioning,
                guidance_rescale=guidance_rescale,
            )  # fmt: skip
            watch.see(i, x)
            if callback:
                callback(i)
        watch.close()
        return x

    @torch.no_grad()
    @prompt_cache()
    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        verbose: bool = True,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Invert the deterministic sampler: from latents to the noise that gives them.

        Networks that predict ε are told the number of the step instead of its time, as published; those that predict v,
        which the original could not invert, are told the time.

        Args:
            x0: latents.
            c: the condition.
            t_enc: number of steps.
            use_original_steps: count all training steps instead of the visited ones.
            return_intermediates: keep about so many latents on the way.
            unconditional_guidance_scale, unconditional_conditioning, guidance_rescale: see `sample`.
            callback: called with the number of the step.
            verbose: show progress.

        Returns:
            The noise, and `x_encoded`, `intermediate_steps` and perhaps `intermediates`.

        Raises:
            AssertionError: more steps than there are.

        Source: Song et al. 2021, section 4.3.
        """
        total = self.ddpm_num_timesteps if use_original_steps else self.ddim_timesteps.shape[0]
        if t_enc > total:
            raise AssertionError(f"t_enc={t_enc} steps of inversion, but the schedule has {total}")
        x, kept, steps, watch = x0, [], [], FiniteWatch(t_enc)
        for i in tqdm(range(t_enc), desc="Encoding Image", disable=not verbose):
            time = (
                i if use_original_steps or self.model.parameterization != "v" else int(self.ddim_timesteps[i])
            )
            t = torch.full((len(x0),), time, device=x0.device, dtype=torch.long)
            eps, _ = self.predict(
                x,
                t,
                c,
                unconditional_guidance_scale,
                unconditional_conditioning,
                guidance_rescale=guidance_rescale,
            )
            a, a_prev, _, spread = self._at(i, use_original_steps)
            signal = (a / a_prev) ** 0.5
            x = signal * x + (spread - signal * (1 - a_prev) ** 0.5) * eps
            watch.see(i, x)
            every = return_intermediates and t_enc // return_intermediates
            if every and ((i % every == 0 and i < t_enc - 1) or i >= t_enc - 2):
                kept.append(x)
                steps.append(i)
            if callback:
                callback(i)
        watch.close()
        out: dict[str, Any] = {"x_encoded": x, "intermediate_steps": steps}
        if return_intermediates:
            out["intermediates"] = kept
        return x, out
