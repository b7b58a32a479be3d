"""What the samplers over a discrete schedule share: buffers, guidance, masks, progress, intermediates.

A sampler is this base and an update rule (`step`): see `ddim.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.modules.diffusionmodules.util import make_ddim_sampling_parameters, make_ddim_timesteps, noise_like

logger = logging.getLogger(__name__)

MODEL_BUFFERS = ("betas", "alphas_cumprod", "alphas_cumprod_prev")


def concatenate(uncond: Any, cond: Any) -> Any:
    """Two conditions of the same structure as one batch, the unconditional half first.

    Raises:
        ValueError: one is a dict and the other is not, their entries differ, or tensors of different lengths.
    """
    if isinstance(cond, Mapping):
        if not isinstance(uncond, Mapping) or set(uncond) != set(cond):
            theirs = sorted(uncond) if isinstance(uncond, Mapping) else type(uncond).__name__
            raise ValueError(
                f"the condition has the entries {sorted(cond)}, the unconditional one {theirs}; guidance needs the same in both"
            )
        return {k: concatenate(uncond[k], v) for k, v in cond.items()}
    if isinstance(cond, list):
        return [concatenate(u, c) for u, c in zip(uncond, cond, strict=True)]
    if cond is None:
        return None
    if uncond.shape[1:] != cond.shape[1:]:
        raise ValueError(
            f"condition {tuple(cond.shape)} and unconditional condition {tuple(uncond.shape)} cannot share a batch"
        )
    return torch.cat([uncond, cond])


def batch_of(cond: Any) -> int | None:
    """The batch size of a condition, if it has one."""
    while isinstance(cond, Mapping | list) and len(cond):
        cond = next(iter(cond.values())) if isinstance(cond, Mapping) else cond[0]
    return len(cond) if isinstance(cond, Tensor) else None


class LatentSampler:
    """Base of the samplers that walk down a model's discrete schedule.

    Args:
        model: a model with the buffers of `GaussianSchedule`, `apply_model` and `num_timesteps`.
        schedule: accepted, as published.
        device: where to compute; the model's own if None.
    """

    ddim_timesteps: np.ndarray
    ddim_sigmas: Any
    ddim_alphas: Any
    ddim_alphas_prev: Any
    ddim_sqrt_one_minus_alphas: Any
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    ddim_sigmas_for_original_num_steps: Tensor

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self.device = torch.device(device) if device is not None else model.betas.device

    def register_buffer(self, name: str, attr: Any) -> None:
        """Keep a value as an attribute, tensors on the sampler's device."""
        setattr(self, name, attr.to(self.device) if isinstance(attr, Tensor) else attr)

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the steps to visit and compute what the update rules need at them.

        Args:
            ddim_num_steps: from 1 to the number of training steps; "uniform" may visit a few more.
            ddim_discretize: "uniform" or "quad".
            ddim_eta: 0 for deterministic sampling, 1 for the noise of DDPM.
            verbose: accepted, as published.
        """
        total = self.ddpm_num_timesteps
        steps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, total, verbose=False)
        # shifted by one, the last step may lie one beyond the schedule
        self.ddim_timesteps = np.minimum(steps, total - 1)
        bar = self.model.alphas_cumprod.detach().cpu().float()
        for name in MODEL_BUFFERS:
            self.register_buffer(name, getattr(self.model, name).detach().clone().float())
        derived = {
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1.0 - bar).log(),
            "sqrt_recip_alphas_cumprod": (1.0 / bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1.0 / bar - 1).sqrt(),
        }
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(
            bar, self.ddim_timesteps, ddim_eta, verbose=False
        )
        derived |= {
            "ddim_sigmas": sigmas,
            "ddim_alphas": alphas,
            "ddim_alphas_prev": alphas_prev,
            "ddim_sqrt_one_minus_alphas": np.sqrt(1.0 - alphas),
        }
        before = self.alphas_cumprod_prev.cpu()
        derived["ddim_sigmas_for_original_num_steps"] = (
            ddim_eta * ((1 - before) / (1 - bar) * (1 - bar / before)).sqrt()
        )
        for name, value in derived.items():
            self.register_buffer(name, value)

    # ----------------------------------------------------------------------------------- prediction

    def guided(self, x: Tensor, t: Tensor, c: Any, scale: float, uncond: Any) -> Tensor:
        """The model's prediction, with classifier-free guidance if there is something to guide away from.

        Both predictions come from one batch, the unconditional half first: ê = e_u + s (e_c - e_u).

        Source: Ho & Salimans 2022, equation 6.
        """
        if uncond is None or scale == 1.0:
            return self.model.apply_model(x, t, c)
        e_uncond, e_cond = self.model.apply_model(
            torch.cat([x, x]), torch.cat([t, t]), concatenate(uncond, c)
        ).chunk(2)
        return e_uncond + scale * (e_cond - e_uncond)

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        c: Any,
        scale: float,
        uncond: Any,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction, as it is and as ε. (Models that predict x_0 are taken for ε models, as published.)"""
        out = self.guided(x, t, c, scale, uncond)
        eps = self.model.predict_eps_from_z_and_v(x, t, out) if self.model.parameterization == "v" else out
        if score_corrector is not None:
            if self.model.parameterization != "eps":
                raise AssertionError(
                    "score correctors work on noise predictions (parameterization='eps') only"
                )
            eps = score_corrector.modify_score(self.model, eps, x, t, c, **(corrector_kwargs or {}))
        return out, eps

    def transfer(
        self,
        x: Tensor,
        eps: Tensor,
        index: int,
        pred_x0: Tensor | None = None,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        repeat_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From a visited step to the one before it, along a given ε.

        Args:
            x: latents at the step.
            eps: the noise they are taken to hold.
            index: of the step among the visited ones, or among all with `use_original_steps`.
            pred_x0: the estimate of x_0 where it is known better than from ε.

        Returns:
            Latents at the step before, and the estimate of x_0.

        Source: Song et al. 2021 (DDIM), equation 12.
        """
        a, a_prev, sigma, sqrt_one_minus_a = self._at(index, x, use_original_steps)
        if pred_x0 is None:
            pred_x0 = (x - sqrt_one_minus_a * eps) / a.sqrt()
        if quantize_denoised:
            pred_x0, *_ = self.model.first_stage_model.quantize(pred_x0)
        direction = (1.0 - a_prev - sigma**2).sqrt() * eps
        # the noise is drawn even where σ = 0: the random stream is part of "same seed, same image"
        noise = sigma * noise_like(x.shape, x.device, repeat_noise, generator) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        return a_prev.sqrt() * pred_x0 + direction + noise, pred_x0

    def _at(self, index: int, x: Tensor, original: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ᾱ, ᾱ of the step before, σ and √(1 - ᾱ), ready to multiply x."""
        if original:
            tables: tuple[Any, ...] = (
                self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas_for_original_num_steps, self.sqrt_one_minus_alphas_cumprod,
            )  # fmt: skip
        else:
            tables = (
                self.ddim_alphas,
                self.ddim_alphas_prev,
                self.ddim_sigmas,
                self.ddim_sqrt_one_minus_alphas,
            )
        shape = (x.shape[0], *((1,) * (x.ndim - 1)))
        a, a_prev, sigma, sqrt_one_minus_a = (
            torch.full(shape, float(v[index]), device=x.device) for v in tables
        )
        return a, a_prev, sigma, sqrt_one_minus_a

    # ----------------------------------------------------------------------------------------- loop

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw latents.

        Args:
            S: number of steps.
            batch_size: samples.
            shape: of one latent, (c, h, w).
            conditioning: a tensor, list or dict, as `apply_model` takes it.
            callback: called with the number of the step, from 0.
            normals_sequence: accepted, as published.
            img_callback: called with the estimate of x_0 and the number of the step.
            quantize_x0: quantise each estimate of x_0 with the first stage.
            eta: 0 for deterministic sampling, 1 for the noise of DDPM.
            mask: (b, 1, h, w), 1 where `x0` is to be kept.
            x0: latents for the mask.
            temperature: of the noise.
            noise_dropout: share of the noise to drop.
            score_corrector, corrector_kwargs: changes the prediction, see `predict`.
            verbose: show progress.
            x_T: latents to start from.
            log_every_t: steps between kept intermediates.
            unconditional_guidance_scale, unconditional_conditioning: see `guided`.
            dynamic_threshold: bound for estimates of x_0, where the sampler has one.
            ucg_schedule: a guidance scale for each step, in sampling order.
            generator: source of all noise; torch's global one if None.

        Returns:
            Latents (batch_size, c, h, w), and `x_inter` and `pred_x0`: lists of intermediates that begin with x_T.
        """
        found = batch_of(conditioning)
        if found is not None and found != batch_size:
            logger.warning("%d conditionings for batch_size=%d", found, batch_size)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        return self._run(
            conditioning, (batch_size, *shape), x_T=x_T, timesteps=self.ddim_timesteps, callback=callback, img_callback=img_callback,
            mask=mask, x0=x0, log_every_t=log_every_t, ucg_schedule=ucg_schedule, verbose=verbose, generator=generator,
            quantize_denoised=quantize_x0, temperature=temperature, noise_dropout=noise_dropout, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs, unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning, dynamic_threshold=dynamic_threshold,
        )  # fmt: skip

    def _run(
        self,
        cond: Any,
        shape: Sequence[int],
        *,
        x_T: Tensor | None,
        timesteps: np.ndarray,
        callback: Callable[[int], Any] | None,
        img_callback: Callable[[Tensor, int], Any] | None,
        mask: Tensor | None,
        x0: Tensor | None,
        log_every_t: int,
        ucg_schedule: Sequence[float] | None,
        verbose: bool,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Walk down `timesteps`, ascending as given, one update after the other."""
        img = noise_like(shape, self.device, generator=generator) if x_T is None else x_T.to(self.device)
        kept: dict[str, list[Tensor]] = {"x_inter": [img], "pred_x0": [img]}
        total = len(timesteps)
        if ucg_schedule is not None and len(ucg_schedule) != total:
            raise AssertionError(f"ucg_schedule has {len(ucg_schedule)} scales for {total} steps")
        if mask is not None and x0 is None:
            raise AssertionError("a mask needs x0, the latents to keep")
        known: Any = x0
        for i, index, t in self.walk(timesteps, shape[0], verbose):
            if mask is not None:
                noise = noise_like(known.shape, known.device, generator=generator)
                noised = self.model.q_sample(known, t, noise=noise)
                img = noised * mask + (1.0 - mask) * img
            if ucg_schedule is not None:
                options["unconditional_guidance_scale"] = ucg_schedule[i]
            img, pred_x0 = self.step(img, cond, t, index, i, timesteps, generator=generator, **options)
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == total - 1:
                kept["x_inter"].append(img)
                kept["pred_x0"].append(pred_x0)
        return img, kept

    def walk(
        self, timesteps: Any, batch_size: int, verbose: bool = True, desc: str | None = None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Number of the step, its index from the end, and its time (b,), with a progress bar."""
        total = len(timesteps)
        bar = tqdm(
            range(total),
            desc=desc or type(self).__name__.replace("Sampler", " Sampler"),
            total=total,
            disable=not verbose,
        )
        for i in bar:
            index = total - 1 - i
            yield (
                i,
                index,
                torch.full((batch_size,), int(timesteps[index]), device=self.device, dtype=torch.long),
            )

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One update: x at `index` → x at the step before, and the estimate of x_0."""
        raise NotImplementedError
