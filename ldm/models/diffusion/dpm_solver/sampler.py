"""Solvers of the probability-flow equation behind the samplers' common interface, and DPM-Solver++ among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver
from ldm.models.diffusion.dpm_solver.multistep import FEW_STEPS, SOLVER_TYPES, DPMRule, Multistep, Rule
from ldm.models.diffusion.dpm_solver.schedule import TO_DATA, TO_NOISE, NoiseScheduleVP, Point
from ldm.models.diffusion.sampler import LatentSampler
from ldm.models.diffusion.sampling_util import (
    FiniteWatch,
    draw,
    norm_thresholding,
    require_signal,
    sources,
    trailing_timesteps,
)
from ldm.modules.prompt_cache import prompt_cache

logger = logging.getLogger(__name__)

MODEL_TYPES = {"eps": "noise", "v": "v", "x0": "x_start"}
SPACINGS = {
    "uniform": "time_uniform",
    "quad": "time_quadratic",
    "logSNR": "logSNR",
    "trailing": "trailing",
} | {name: name for name in ("time_uniform", "time_quadratic")}
METHODS = ("multistep", "singlestep", "singlestep_fixed", "adaptive")


class SolverSampler(LatentSampler):
    """Base of the deterministic multistep solvers in continuous time; a solver defines its `rule`.

    The network is asked at times between the training steps where the spacing says so. `time_spacing` of `sample` is "uniform" in
    time, "quad" (in its root), "logSNR", or "trailing", which visits whole training steps beginning with the last one and ends
    with the estimate of x_0.

    Args:
        model, schedule, device: see `LatentSampler`.
        order: of the solver; fewer steps than that lower it.
        lower_order_final: let the order fall at the end.
    """

    max_order = 3
    always_lowers = False  # whether the order falls at the end of long runs too
    rule: Rule

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        order: int = 2,
        lower_order_final: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, schedule, device, **kwargs)
        if not 1 <= order <= self.max_order:
            raise ValueError(f"order={order}: {type(self).__name__} has orders 1 to {self.max_order}")
        self.order, self.lower_order_final = order, lower_order_final
        self._mask: Tensor | None = None

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the times and compute every step's weights.

        Args:
            ddim_num_steps: from 1 to the number of training steps.
            ddim_discretize: the spacing, see the class.
            ddim_eta: warned about if not 0: the solvers are deterministic.
            verbose: accepted, as published.

        Raises:
            ValueError: another number of steps, another spacing, or zero terminal SNR for a model that predicts ε.
        """
        if ddim_eta:
            logger.warning("%s is deterministic; eta=%s has no effect", type(self).__name__, ddim_eta)
        bar = self.model.alphas_cumprod.detach().float().cpu()
        require_signal(self.model.parameterization, float(bar[-1]))
        self.noise_schedule = NoiseScheduleVP("discrete", alphas_cumprod=bar)
        times = self._times(ddim_num_steps, ddim_discretize)
        self._points = self.noise_schedule.points(times)
        self.ddim_timesteps = np.maximum([p.t * len(bar) - 1 for p in self._points[-2::-1]], 0.0)

    def _times(self, n: int, spacing: str) -> Tensor:
        """The n + 1 times of the run, descending."""
        trailing = trailing_timesteps(
            n, self.ddpm_num_timesteps
        )  # refuses impossible n, whatever the spacing
        if spacing not in SPACINGS:
            raise ValueError(f"time_spacing={spacing!r} is unknown; choose one of {sorted(SPACINGS)}")
        if spacing == "trailing":
            visited = torch.from_numpy(trailing[::-1].copy())
            return torch.cat([visited + 1, torch.zeros(1)]).double() / self.ddpm_num_timesteps
        ns = self.noise_schedule
        return ns.time_steps(SPACINGS[spacing], ns.T, 1.0 / ns.total_N, n)

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self._mask = kwargs["mask"]
        self._begin()
        return super()._run(*args, **kwargs)

    def _begin(self) -> None:
        steps = len(self._points) - 1
        lower = self.lower_order_final and (self.always_lowers or steps < FEW_STEPS)
        self._multistep = Multistep(self.rule, self._points, min(self.order, steps), lower)

    def noised(self, x0: Tensor, t: Tensor, i: int, noise: Tensor) -> Tensor:
        """x_0 with the noise of the i-th time."""
        return self._points[i].alpha * x0 + self._points[i].sigma * noise

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One step of the rule."""
        prediction, pred_x0 = self._prediction(x, c, t, self._points[i], **options)
        return self._multistep.advance(x, prediction, self._mask), pred_x0

    def _prediction(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        point: Point,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        guidance_rescale: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        dynamic_threshold: float | None = None,
        quantize_denoised: bool = False,
        **of_noise: Any,
    ) -> tuple[Tensor, Tensor]:
        """What the rule works on, and the estimate of x_0; the options are those of `sample`."""
        kind, (_, alpha, sigma, _) = MODEL_TYPES[self.model.parameterization], point
        out = self.guided(x, t, c, unconditional_guidance_scale, unconditional_conditioning, guidance_rescale)
        if score_corrector is not None:
            out = self._modified(score_corrector, out, x, t, c, corrector_kwargs)
        out = out.to(x.dtype)
        pred_x0 = TO_DATA[kind](x, alpha, sigma, out)
        if dynamic_threshold is not None:
            pred_x0 = norm_thresholding(pred_x0, dynamic_threshold)
        if quantize_denoised:
            pred_x0, *_ = self.model.first_stage_model.quantize(pred_x0)
        if self.rule.predict_x0:
            return pred_x0, pred_x0
        changed = dynamic_threshold is not None or quantize_denoised
        return TO_NOISE["x_start" if changed else kind](x, alpha, sigma, pred_x0 if changed else out), pred_x0


class DPMSolverSampler(SolverSampler):
    """DPM-Solver++, by default multistep of order 2: about 20 steps give what DDIM needs 50 for.

    Args:
        model, schedule, device, order, lower_order_final: see `SolverSampler`.
        method: "multistep"; "singlestep" or "singlestep_fixed", which ask the network several times a step and the steps'
            number of times in all; "adaptive", which chooses its steps, whatever their number.
        predict_x0: False is DPM-Solver, which works on ε.
        solver_type: "dpm_solver", "taylor" or "exact", see `DPM_Solver.sample`.
        atol, rtol: tolerance of "adaptive".

    `sample` gives None in place of the intermediates, as published.

    Source: Lu et al. 2022b, algorithm 2; Lu et al. 2022a, algorithms 1 to 3.
    """

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        order: int = 2,
        lower_order_final: bool = True,
        method: str = "multistep",
        predict_x0: bool = True,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, schedule, device, order, lower_order_final, **kwargs)
        for name, value, known in (("method", method, METHODS), ("solver_type", solver_type, SOLVER_TYPES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {known}")
        if method == "adaptive" and order == 1:
            raise ValueError("order=1: the adaptive solver has orders 2 and 3")
        self.method, self.solver_type, self.atol, self.rtol = method, solver_type, atol, rtol
        self.rule: DPMRule = DPMRule(predict_x0, solver_type)

    def _times(self, n: int, spacing: str) -> Tensor:
        if self.method == "multistep":
            return super()._times(n, spacing)
        if spacing == "trailing":
            raise ValueError(f"time_spacing='trailing' has no times in between for method={self.method!r}")
        super()._times(n, spacing)  # refuses what it does not know
        self._skip_type, ns = SPACINGS[spacing], self.noise_schedule
        order, end = min(self.order, n), 1.0 / ns.total_N
        if self.method == "adaptive":
            return torch.tensor([ns.T, end])
        if self.method == "singlestep_fixed":
            self._orders = [order] * (n // order)
            return ns.time_steps(self._skip_type, ns.T, end, n // order)
        solver = DPM_Solver(lambda x, t: x, ns)
        outer, self._orders = solver.get_orders_and_timesteps_for_singlestep_solver(
            n, order, self._skip_type, ns.T, end, "cpu"
        )
        return outer

    def _begin(self) -> None:
        if self.method == "multistep":
            super()._begin()

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.method == "adaptive":
            return self._adaptive(*args, **kwargs), None
        return super()._run(*args, **kwargs)[0], None

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, i: int, timesteps: np.ndarray, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One step of any order, multistep or single."""
        if self.method == "multistep":
            return super().step(x, c, t, index, i, timesteps, **options)
        estimates: list[Tensor] = []
        solver = self._solver(c, options, estimates)
        s, end = (torch.tensor(p.t, dtype=torch.float64) for p in self._points[i : i + 2])
        r1, r2 = solver.inner_shares(self._skip_type, float(s), float(end), self._orders[i])
        x = solver.singlestep_dpm_solver_update(
            x, s, end, self._orders[i], solver_type=self.solver_type, r1=r1, r2=r2
        )
        return x, estimates[0]

    def _solver(self, c: Any, options: Mapping[str, Any], estimates: list[Tensor]) -> DPM_Solver:
        """The solver over this model; every estimate of x_0 is noted."""

        def noise(x: Tensor, time: Tensor) -> Tensor:
            point = self.noise_schedule.points(time.reshape(-1)[:1])[0]
            t = torch.full((len(x),), point.t * self.ddpm_num_timesteps - 1, device=x.device)
            prediction, pred_x0 = self._prediction(x, c, t, point, **options)
            estimates.append(pred_x0)
            return (x - point.alpha * prediction) / point.sigma if self.rule.predict_x0 else prediction

        return DPM_Solver(noise, self.noise_schedule, self.rule.predict_x0)

    @prompt_cache()
    def _adaptive(
        self,
        cond: Any,
        shape: Sequence[int],
        *,
        x_T: Tensor | None,
        callback: Callable[[int], Any] | None,
        img_callback: Callable[[Tensor, int], Any] | None,
        mask: Tensor | None,
        x0: Tensor | None,
        verbose: bool,
        generator: Any = None,
        timesteps: Any = None,
        log_every_t: int = 0,
        ucg_schedule: Any = None,
        **options: Any,
    ) -> Tensor:
        """As `LatentSampler._run`, for a number of steps that is not known before."""
        if ucg_schedule is not None:
            raise AssertionError("ucg_schedule needs a known number of steps; the adaptive solver has none")
        if mask is not None and x0 is None:
            raise AssertionError("a mask needs x0, the latents to keep")
        source = sources(generator, shape[0])
        x = draw(shape, self.device, source) if x_T is None else x_T.to(self.device)
        estimates: list[Tensor] = []
        solver, watch = self._solver(cond, options, estimates), FiniteWatch(None)
        bar = tqdm(desc="DPM-Solver, adaptive", disable=not verbose)

        def report() -> None:
            if callback:
                callback(int(bar.n) - 1)
            if img_callback:
                img_callback(estimates[0], int(bar.n) - 1)

        def on_step(x: Tensor, s: Tensor) -> Tensor:
            if estimates:
                watch.see(int(bar.n) - 1, x)
                report()
                estimates.clear()
            self._points = self.noise_schedule.points(s)
            bar.n += 1
            bar.refresh()
            return x if mask is None else self._blend(x, x0, mask, s, 0, source)

        ends = self._points[0].t, self._points[-1].t
        x = solver.dpm_solver_adaptive(
            x,
            max(self.order, 2),
            *ends,
            atol=self.atol,
            rtol=self.rtol,
            solver_type=self.solver_type,
            on_step=on_step,
        )
        watch.see(int(bar.n) - 1, x)
        watch.close()
        report()
        bar.close()
        return x
