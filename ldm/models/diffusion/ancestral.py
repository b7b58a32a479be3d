"""Ancestral sampling of latent models: one draw from p(x_{t-1} | x_t, c) after the other (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.pixel import DDPM
from ldm.modules.prompt_cache import prompt_cache


def trim(cond: Any, n: int) -> Any:
    """The first n samples of a condition: a tensor, texts, a list of tensors, or a dict of any of these."""
    if isinstance(cond, Mapping):
        return {k: trim(v, n) for k, v in cond.items()}
    if isinstance(cond, list) and cond and isinstance(cond[0], Tensor):
        return [c[:n] for c in cond]
    return cond[:n]


class AncestralSampling(DDPM):
    """The sampling half of `LatentDiffusion`: it needs `apply_model`, and a first stage for quantised estimates."""

    first_stage_model: Any
    shorten_cond_schedule: bool

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, return_ids: bool = False) -> Any:
        """The network's prediction under a condition."""
        raise NotImplementedError

    def _noise_condition(self, c: Tensor, t: Tensor) -> Tensor:
        """The condition, noised as far as its shortened schedule says for steps t."""
        raise NotImplementedError

    def p_mean_variance(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """Mean of p(x_{t-1} | x_t, c), its variance and log-variance (b, 1, …), and on request the estimate of x_0 (or logits)."""
        out = self.apply_model(x, t, c, return_ids=return_codebook_ids)
        out, logits = out if return_codebook_ids else (out, None)
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise AssertionError(
                    "score correctors work on noise predictions (parameterization='eps') only"
                )
            out = score_corrector.modify_score(self, out, x, t, c, **(corrector_kwargs or {}))
        x_recon = self.predict_start(x, t, out)
        if clip_denoised:
            x_recon = x_recon.clamp(-1.0, 1.0)
        if quantize_denoised:
            x_recon, _, _ = self.first_stage_model.quantize(x_recon)
        mean, variance, log_variance = self.q_posterior(x_recon, x, t)
        if return_codebook_ids:
            return mean, variance, log_variance, logits
        return (mean, variance, log_variance, x_recon) if return_x0 else (mean, variance, log_variance)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """One step back, and on request the estimate of x_0."""
        if return_codebook_ids:
            raise DeprecationWarning("sampling does not return codebook indices any more")
        mean, _, log_variance, x_start = self.p_mean_variance(
            x, c, t, clip_denoised, quantize_denoised=quantize_denoised, return_x0=True, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )  # fmt: skip
        out = mean + self._step_noise(x, t, log_variance, repeat_noise, temperature, noise_dropout)
        return (out, x_start) if return_x0 else out

    def _walk(
        self,
        img: Tensor,
        cond: Any,
        steps: range,
        verbose: bool,
        desc: str,
        mask: Tensor | None,
        x0: Tensor | None,
        **options: Any,
    ) -> Any:
        """Steps back one after the other; yields (step, image, estimate of x_0)."""
        if mask is not None and (x0 is None or x0.shape[2:] != mask.shape[2:]):
            raise AssertionError("a mask needs x0, of its own height and width")
        kept: Any = x0
        temperature = options.pop("temperature", 1.0)
        for i in tqdm(reversed(steps), desc=desc, total=len(steps), disable=not verbose):
            t = torch.full((len(img),), i, device=img.device, dtype=torch.long)
            if self.shorten_cond_schedule:
                cond = self._noise_condition(cond, t)
            heat = temperature if isinstance(temperature, int | float) else temperature[i]
            img, x_start = self.p_sample(
                img, cond, t, clip_denoised=self.clip_denoised, return_x0=True, temperature=heat, **options
            )
            if mask is not None:
                img = self.q_sample(kept, t) * mask + (1.0 - mask) * img
            yield i, img, x_start

    @torch.no_grad()
    @prompt_cache()
    def progressive_denoising(
        self,
        cond: Any,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], Any] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Ancestral sampling that keeps the estimates of x_0.

        Args:
            cond: the condition.
            shape: of the latents, without the batch axis if `batch_size` is given.
            verbose: show progress.
            callback: called with the step t.
            quantize_denoised: quantise each estimate of x_0.
            img_callback: called with latents and t.
            mask: (b, 1, h, w), 1 where `x0` is to be kept.
            x0: latents for the mask.
            temperature: of the noise; a number, or a list indexed by t.
            noise_dropout: share of the noise to drop.
            score_corrector, corrector_kwargs: see `p_mean_variance`.
            batch_size: see `shape`; the condition is cut to it.
            x_T: latents to start from.
            start_T: begin at this step.
            log_every_t: steps between kept estimates; the model's if None.

        Returns:
            Latents, and the kept estimates.
        """
        log_every_t = log_every_t or self.log_every_t
        if batch_size is not None:
            shape = [batch_size, *shape]
            cond = trim(cond, batch_size) if cond is not None else None
        img = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        total = self.num_timesteps if start_T is None else min(self.num_timesteps, start_T)
        kept = []
        walk = self._walk(
            img, cond, range(total), verbose, "Progressive Generation", mask, x0, quantize_denoised=quantize_denoised,
            temperature=temperature, noise_dropout=noise_dropout, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs,
        )  # fmt: skip
        for i, x, x_start in walk:
            img = x
            if i % log_every_t == 0 or i == total - 1:
                kept.append(x_start)
            if callback:
                callback(i)
            if img_callback:
                img_callback(img, i)
        return img, kept

    @torch.no_grad()
    @prompt_cache()
    def p_sample_loop(
        self,
        cond: Any,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], Any] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Ancestral sampling; `timesteps` takes the last so many steps of the full schedule. See `progressive_denoising`."""
        log_every_t = log_every_t or self.log_every_t
        img = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        total = self.num_timesteps if timesteps is None else timesteps
        total = total if start_T is None else min(total, start_T)
        kept = [img]
        for i, x, _ in self._walk(
            img, cond, range(total), verbose, "Sampling t", mask, x0, quantize_denoised=quantize_denoised
        ):
            img = x
            if i % log_every_t == 0 or i == total - 1:
                kept.append(img)
            if callback:
                callback(i)
            if img_callback:
                img_callback(img, i)
        return (img, kept) if return_intermediates else img

    @torch.no_grad()
    def sample(
        self,
        cond: Any,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **ignored: Any,
    ) -> Any:
        """Latents (batch_size, channels, image_size, image_size) by ancestral sampling; see `p_sample_loop`."""
        shape = (batch_size, self.channels, self.image_size, self.image_size) if shape is None else shape
        cond = trim(cond, batch_size) if cond is not None else None
        return self.p_sample_loop(
            cond, shape, return_intermediates=return_intermediates, x_T=x_T, verbose=verbose, timesteps=timesteps,
            quantize_denoised=quantize_denoised, mask=mask, x0=x0,
        )  # fmt: skip
