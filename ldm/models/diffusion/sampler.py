"""What the samplers share: steps, guidance, masks, noise of each image's own, callbacks, progress, intermediates.

A sampler is this base and an update rule (`step`): see `ddim.py`. A solver in continuous time is `SolverSampler` and a rule: see
`unipc.py`.
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

from ldm.models.diffusion.sampling_util import (
    FiniteWatch,
    Noise,
    draw,
    require_signal,
    rescale_guided,
    sources,
    trailing_timesteps,
)
from ldm.modules.diffusionmodules.util import (
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)
from ldm.modules.prompt_cache import once, prompt_cache

logger = logging.getLogger(__name__)

MODEL_BUFFERS = ("betas", "alphas_cumprod", "alphas_cumprod_prev")


def concatenate(uncond: Any, cond: Any) -> Any:
    """Two conditions of the same structure as one batch, the unconditional half first; the same tensors at every step of a run.

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
    return once(concatenate, lambda *halves: torch.cat(halves), uncond, cond)


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
        x0_as_eps: take a prediction of x_0 for one of ε, as published; False converts it.

    Raises:
        ValueError: a rectified flow and a sampler of the other models, or the other way round.
    """

    samples_flows = False  # whether the update rule is that of `parameterization: flow`, or of the others
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

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        x0_as_eps: bool = True,
        **kwargs: Any,
    ) -> None:
        kind = getattr(model, "parameterization", None)
        if self.samples_flows != (kind == "flow"):
            raise ValueError(
                f"{type(self).__name__} needs a model with parameterization 'flow', not {kind!r}; DDIMSampler samples it"
                if self.samples_flows
                else f"{type(self).__name__} does not sample rectified flows; use FlowSampler (ldm.models.diffusion.flow)"
            )
        self.model = model
        self.x0_as_eps = x0_as_eps
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
            ddim_discretize: "uniform", "quad", or "trailing" (see `trailing_timesteps`).
            ddim_eta: 0 for deterministic sampling, 1 for the noise of DDPM.
            verbose: accepted, as published.

        Raises:
            ValueError: another number of steps, or a schedule of zero terminal SNR for a model that predicts ε.
        """
        total = self.ddpm_num_timesteps
        if ddim_discretize == "trailing":
            steps = trailing_timesteps(ddim_num_steps, total)
        else:
            steps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, total, verbose=False)
        # shifted by one, the last step may lie one beyond the schedule
        self.ddim_timesteps = np.minimum(steps, total - 1)
        bar = self.model.alphas_cumprod.detach().cpu().float()
        as_eps = self.model.parameterization == "x0" and self.x0_as_eps
        require_signal(
            "eps" if as_eps else self.model.parameterization, float(bar[int(self.ddim_timesteps[-1])])
        )
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
        visited = (alphas, alphas_prev, sigmas, derived["ddim_sqrt_one_minus_alphas"])
        every = (
            bar,
            before,
            derived["ddim_sigmas_for_original_num_steps"],
            derived["sqrt_one_minus_alphas_cumprod"],
        )
        # numbers, not tensors, multiply the latents: reading one back from a GPU would wait for it
        self._visited, self._every = (
            [np.asarray(v, dtype=np.float64).tolist() for v in table] for table in (visited, every)
        )
        for name, value in derived.items():
            self.register_buffer(name, value)

    # ----------------------------------------------------------------------------------- prediction

    def guided(
        self, x: Tensor, t: Tensor, c: Any, scale: float, uncond: Any, guidance_rescale: float = 0.0
    ) -> Tensor:
        """The model's prediction, with classifier-free guidance if there is something to guide away from.

        Both predictions come from one batch, the unconditional half first: ê = e_u + s (e_c - e_u).

        Args:
            x: latents (b, c, h, w).
            t: times (b,).
            c: the condition.
            scale: s; 1 is no guidance.
            uncond: the condition to guide away from, of the same structure; None is no guidance.
            guidance_rescale: how much of the contrast that guidance adds to take away again, from 0 to 1.

        Source: Ho & Salimans 2022, equation 6; Lin et al. 2023, equations 15 and 16.
        """
        if uncond is None or scale == 1.0:
            return self.model.apply_model(x, t, c)
        both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), concatenate(uncond, c))
        e_uncond, e_cond = both.chunk(2)
        out = e_uncond + scale * (e_cond - e_uncond)
        return rescale_guided(out, e_cond, guidance_rescale) if guidance_rescale else out

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        c: Any,
        scale: float,
        uncond: Any,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction as ε, and the estimate of x_0 where the model gives it more exactly than ε does."""
        model = self.model
        out = self.guided(x, t, c, scale, uncond, guidance_rescale)
        if score_corrector is not None:
            return self._modified(score_corrector, out, x, t, c, corrector_kwargs), None
        if model.parameterization == "v" or (model.parameterization == "x0" and not self.x0_as_eps):
            return model.predict_noise(x, t, out), model.predict_start(x, t, out)
        return out, None

    def _modified(self, corrector: Any, eps: Tensor, x: Tensor, t: Tensor, c: Any, kwargs: Any) -> Tensor:
        if self.model.parameterization != "eps":
            raise AssertionError("score correctors work on noise predictions (parameterization='eps') only")
        return corrector.modify_score(self.model, eps, x, t, c, **(kwargs or {}))

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
        generator: Any = None,
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
        a, a_prev, sigma, sqrt_one_minus_a = self._at(index, use_original_steps)
        if pred_x0 is None:
            pred_x0 = (x - sqrt_one_minus_a * eps) / a**0.5
        if quantize_denoised:
            pred_x0, *_ = self.model.first_stage_model.quantize(pred_x0)
        x_prev = a_prev**0.5 * pred_x0 + max(1.0 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        # the noise is drawn even where σ = 0: the random stream is part of "same seed, same image"
        noise = draw(x.shape, x.device, generator, repeat_noise)
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        return x_prev + (sigma * temperature) * noise if sigma else x_prev, pred_x0

    def _at(self, index: int, original: bool) -> tuple[float, float, float, float]:
        """ᾱ, ᾱ of the step before, σ and √(1 - ᾱ)."""
        a, a_prev, sigma, sqrt_one_minus_a = (v[index] for v in (self._every if original else self._visited))
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
        generator: Noise = None,
        guidance_rescale: float = 0.0,
        time_spacing: str = "uniform",
        **ignored: Any,
    ) -> tuple[Tensor, Any]:
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
            noise_dropout: share of the noise to drop, chosen by torch's global generator.
            score_corrector, corrector_kwargs: changes the prediction, see `predict`.
            verbose: show progress.
            x_T: latents to start from.
            log_every_t: steps between kept intermediates.
            unconditional_guidance_scale, unconditional_conditioning: see `guided`.
            dynamic_threshold: bound for estimates of x_0, where the sampler has one.
            ucg_schedule: a guidance scale for each step, in sampling order.
            generator: source of all noise; torch's global one if None. A list of generators or seeds gives each image its own
                noise, whatever else is in the batch.
            guidance_rescale: see `guided`; Lin et al. 2023 use 0.7.
            time_spacing: which steps to visit, see `make_schedule`; "trailing" begins with the last training step.

        Returns:
            Latents (batch_size, c, h, w), and `x_inter` and `pred_x0`: lists of intermediates that begin with x_T.

        Raises:
            FloatingPointError: the latents became infinite or undefined; names the step.
        """
        found = batch_of(conditioning)
        if found is not None and found != batch_size:
            logger.warning("%d conditionings for batch_size=%d", found, batch_size)
        self.make_schedule(S, ddim_discretize=time_spacing, ddim_eta=eta, verbose=verbose)
        return self._run(
            conditioning, (batch_size, *shape), x_T=x_T, timesteps=self.ddim_timesteps, callback=callback, img_callback=img_callback,
            mask=mask, x0=x0, log_every_t=log_every_t, ucg_schedule=ucg_schedule, verbose=verbose, generator=generator,
            quantize_denoised=quantize_x0, temperature=temperature, noise_dropout=noise_dropout, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs, unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning, dynamic_threshold=dynamic_threshold,
            guidance_rescale=guidance_rescale,
        )  # fmt: skip

    @prompt_cache()
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
        generator: Noise = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """Walk down `timesteps`, ascending as given, one update after the other."""
        source = sources(generator, shape[0])
        img = draw(shape, self.device, source) if x_T is None else x_T.to(self.device)
        kept: dict[str, list[Tensor]] = {"x_inter": [img], "pred_x0": [img]}
        total = len(timesteps)
        if ucg_schedule is not None and len(ucg_schedule) != total:
            raise AssertionError(f"ucg_schedule has {len(ucg_schedule)} scales for {total} steps")
        if mask is not None and x0 is None:
            raise AssertionError("a mask needs x0, the latents to keep")
        watch = FiniteWatch(total)
        for i, index, t in self.walk(timesteps, shape[0], verbose):
            if mask is not None:
                img = self._blend(img, x0, mask, t, i, source)
            if ucg_schedule is not None:
                options["unconditional_guidance_scale"] = ucg_schedule[i]
            img, pred_x0 = self.step(img, cond, t, index, i, timesteps, generator=source, **options)
            watch.see(i, img)
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == total - 1:
                kept["x_inter"].append(img)
                kept["pred_x0"].append(pred_x0)
        watch.close()
        return img, kept

    def _blend(self, img: Tensor, known: Any, mask: Tensor, t: Tensor, i: int, source: Any) -> Tensor:
        """Latents whose masked part is the known one, noised to step i."""
        noise = draw(known.shape, known.device, source)
        return self.noised(known, t, i, noise) * mask + (1.0 - mask) * img

    def noised(self, x0: Tensor, t: Tensor, i: int, noise: Tensor) -> Tensor:
        """x_0 with the noise of time t (b,), the i-th visited one."""
        return self.model.q_sample(x0, t, noise=noise)

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
        dtype = (
            torch.float32 if isinstance(timesteps[0], float) else torch.long
        )  # solvers visit times between steps
        for i in bar:
            index = total - 1 - i
            time = timesteps[index] if dtype == torch.float32 else int(timesteps[index])
            yield i, index, torch.full((batch_size,), time, device=self.device, dtype=dtype)

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One update: x at `index` → x at the step before, and the estimate of x_0."""
        raise NotImplementedError
