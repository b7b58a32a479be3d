"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (2022b), single-step, multistep and adaptive, of orders 1 to 3.

The formulas are those of `multistep.py`, where m is the prediction and D₁, D₂ its derivatives over the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.dpm_solver.multistep import (
    FEW_STEPS,
    SOLVER_TYPES,
    DPMRule,
    Multistep,
    multistep_weights,
    phi_functions,
    second_order_weight,
)
from ldm.models.diffusion.dpm_solver.schedule import NoiseScheduleVP, interpolate_fn, model_wrapper
from ldm.models.diffusion.sampling_util import append_dims as expand_dims
from ldm.modules.prompt_cache import prompt_cache

__all__ = ["DPM_Solver", "NoiseScheduleVP", "expand_dims", "interpolate_fn", "model_wrapper"]

THRESHOLD_QUANTILE = 0.995  # Saharia et al. 2022 (Imagen), section 2.3


def axes_like(v: Tensor, x: Tensor) -> Tensor:
    """A number of each sample, with axes to multiply x; one without axes is for all, and may stay on the CPU."""
    return v if v.ndim == 0 else expand_dims(v, x.ndim)


class DPM_Solver:
    """Solver of the probability-flow equation.

    Args:
        model_fn: (x, continuous time) → ε, see `model_wrapper`.
        noise_schedule: of the model.
        predict_x0: work on estimates of x_0 (DPM-Solver++) instead of ε.
        thresholding: clip those estimates to a quantile of their own size and rescale them.
        max_val: lower bound of that quantile.
    """

    def __init__(
        self,
        model_fn: Callable[[Tensor, Tensor], Tensor],
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ) -> None:
        self.model = model_fn
        self.noise_schedule = noise_schedule
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.max_val = max_val
        self._k = -1.0 if predict_x0 else 1.0

    # ---------------------------------------------------------------------------------- predictions

    def noise_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """ε at times (1,) or (b,)."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 at times (1,) or (b,), thresholded if so configured."""
        noise = self.noise_prediction_fn(x, t)
        alpha, sigma = (
            axes_like(f(t), x) for f in (self.noise_schedule.marginal_alpha, self.noise_schedule.marginal_std)
        )
        x0 = (x - sigma * noise) / alpha
        if self.thresholding:
            bound = torch.quantile(x0.abs().flatten(1), THRESHOLD_QUANTILE, dim=1).clamp(min=self.max_val)
            bound = expand_dims(bound, x0.ndim)
            x0 = x0.clamp(-bound, bound) / bound
        return x0

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """What the solver works on: x_0 or ε."""
        return self.data_prediction_fn(x, t) if self.predict_x0 else self.noise_prediction_fn(x, t)

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """The last step from time s to 0: the estimate of x_0."""
        return self.data_prediction_fn(x, s)

    # ---------------------------------------------------------------------------------------- times

    def get_time_steps(self, skip_type: str, t_T: Any, t_0: Any, N: int, device: Any) -> Tensor:
        """N + 1 times from t_T down to t_0, see `NoiseScheduleVP.time_steps`."""
        return self.noise_schedule.time_steps(skip_type, float(t_T), float(t_0), N, device)

    def get_orders_and_timesteps_for_singlestep_solver(
        self, steps: int, order: int, skip_type: str, t_T: Any, t_0: Any, device: Any
    ) -> tuple[Tensor, list[int]]:
        """Orders of single steps that use up exactly `steps` network calls, and the times between them."""
        full, rest = divmod(steps, order)
        if order == 3 and rest == 0:
            orders = [3] * (full - 1) + [2, 1]  # the last steps are of low order: they are the least smooth
        elif order in (1, 2, 3):
            orders = [order] * full + ([rest] if rest else [])
        else:
            raise ValueError(f"order={order} must be 1, 2 or 3")
        if skip_type == "logSNR":
            return self.get_time_steps(skip_type, t_T, t_0, len(orders), device), orders
        ends = torch.cumsum(torch.tensor([0, *orders]), dim=0).to(device)
        return self.get_time_steps(skip_type, t_T, t_0, steps, device)[ends], orders

    # -------------------------------------------------------------------------------------- algebra

    def _between(self, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """base · x, c_t and h of the step from time s to t (see the module's docstring)."""
        ns = self.noise_schedule
        if self.predict_x0:
            ratio, c = ns.marginal_std(t) / ns.marginal_std(s), ns.marginal_alpha(t)
        else:
            ratio, c = (
                torch.exp(ns.marginal_log_mean_coeff(t) - ns.marginal_log_mean_coeff(s)),
                ns.marginal_std(t),
            )
        h = ns.marginal_lambda(t) - ns.marginal_lambda(s)
        return axes_like(ratio, x) * x, axes_like(c, x), axes_like(h, x)

    def _phi(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return phi_functions(h, self._k)

    # ------------------------------------------------------------------------------ single-step updates

    def dpm_solver_first_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
    ) -> Any:
        """Order 1 (DDIM) from time s to t; the prediction at s is made if not given, and returned on request."""
        model_s = self.model_fn(x, s) if model_s is None else model_s
        base, c, h = self._between(x, s, t)
        x_t = base - c * self._phi(h)[0] * model_s
        return (x_t, {"model_s": model_s}) if return_intermediate else x_t

    def _inner(self, x: Tensor, s: Tensor, t: Tensor, r: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The time a share r of the step's λ away from s, and `_between` up to it."""
        ns = self.noise_schedule
        lambda_s, lambda_t = ns.marginal_lambda(s), ns.marginal_lambda(t)
        time = ns.inverse_lambda(lambda_s + r * (lambda_t - lambda_s))
        return (time, *self._between(x, s, time))

    def singlestep_dpm_solver_second_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: Any = 0.5,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Order 2 from time s to t, over one time in between."""
        r1 = 0.5 if r1 is None else r1
        model_s = self.model_fn(x, s) if model_s is None else model_s
        s1, base_1, c_1, h_1 = self._inner(x, s, t, r1)
        model_s1 = self.model_fn(base_1 - c_1 * self._phi(h_1)[0] * model_s, s1)
        base, c, h = self._between(x, s, t)
        phi = self._phi(h)
        slope = second_order_weight(phi, self._k, solver_type)
        x_t = base - c * (phi[0] * model_s + slope * (model_s1 - model_s) / r1)
        return (x_t, {"model_s": model_s, "model_s1": model_s1}) if return_intermediate else x_t

    def singlestep_dpm_solver_third_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: Any = 1 / 3,
        r2: Any = 2 / 3,
        model_s: Tensor | None = None,
        model_s1: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Order 3 from time s to t, over two times in between."""
        r1, r2 = 1 / 3 if r1 is None else r1, 2 / 3 if r2 is None else r2
        if solver_type not in SOLVER_TYPES:
            raise ValueError(f"solver_type={solver_type!r} is unknown; choose one of {SOLVER_TYPES}")
        model_s = self.model_fn(x, s) if model_s is None else model_s
        if model_s1 is None:
            s1, base_1, c_1, h_1 = self._inner(x, s, t, r1)
            model_s1 = self.model_fn(base_1 - c_1 * self._phi(h_1)[0] * model_s, s1)
        s2, base_2, c_2, h_2 = self._inner(x, s, t, r2)
        phi_12, phi_22, _ = self._phi(h_2)
        model_s2 = self.model_fn(
            base_2 - c_2 * (phi_12 * model_s + self._k * (r2 / r1) * phi_22 * (model_s1 - model_s)), s2
        )
        base, c, h = self._between(x, s, t)
        phi_1, phi_2, phi_3 = self._phi(h)
        d_1, d_2 = (model_s1 - model_s) / r1, (model_s2 - model_s) / r2
        if solver_type == "dpm_solver":
            higher = self._k * phi_2 * d_2
        else:
            slope, bend = (r2 * d_1 - r1 * d_2) / (r2 - r1), 2.0 * (d_2 - d_1) / (r2 - r1)
            higher = self._k * phi_2 * slope + phi_3 * bend
        x_t = base - c * (phi_1 * model_s + higher)
        return (
            (x_t, {"model_s": model_s, "model_s1": model_s1, "model_s2": model_s2})
            if return_intermediate
            else x_t
        )

    def singlestep_dpm_solver_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        order: int,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
        r1: Any = None,
        r2: Any = None,
    ) -> Any:
        """One single step of order 1, 2 or 3."""
        if order == 1:
            return self.dpm_solver_first_update(x, s, t, return_intermediate=return_intermediate)
        if order == 2:
            return self.singlestep_dpm_solver_second_update(
                x, s, t, r1, return_intermediate=return_intermediate, solver_type=solver_type
            )
        if order == 3:
            return self.singlestep_dpm_solver_third_update(
                x, s, t, r1, r2, return_intermediate=return_intermediate, solver_type=solver_type
            )
        raise ValueError(f"order={order} must be 1, 2 or 3")

    # -------------------------------------------------------------------------------- multistep updates

    def multistep_dpm_solver_update(
        self, x: Tensor, model_prev_list: Sequence[Tensor], t_prev_list: Sequence[Tensor], t: Tensor, order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:  # fmt: skip
        """One step of order 1, 2 or 3 to time t, from the last predictions and their times, newest last."""
        lambdas = [self.noise_schedule.marginal_lambda(s) for s in (*t_prev_list[-order:], t)]
        base, c, h = self._between(x, t_prev_list[-1], t)
        gaps = [axes_like(b - a, x) / h for a, b in zip(lambdas[-3::-1], lambdas[-2:0:-1], strict=True)]
        weights = multistep_weights(h, gaps, self._k, solver_type)
        newest_first = list(model_prev_list)[: -order - 1 : -1]
        return base - c * torch.stack([w * m for w, m in zip(weights, newest_first, strict=True)]).sum(dim=0)

    def multistep_dpm_solver_second_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Order 2 to time t, from the last two predictions."""
        return self.multistep_dpm_solver_update(x, model_prev_list, t_prev_list, t, 2, solver_type)

    def multistep_dpm_solver_third_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Order 3 to time t, from the last three predictions."""
        return self.multistep_dpm_solver_update(x, model_prev_list, t_prev_list, t, 3, solver_type)

    # ------------------------------------------------------------------------------------------ loops

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        order: int,
        t_T: float,
        t_0: float,
        h_init: float = 0.05,
        atol: float = 0.0078,
        rtol: float = 0.05,
        theta: float = 0.9,
        t_err: float = 1e-5,
        solver_type: str = "dpm_solver",
        on_step: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Steps as long as two orders agree.

        Args:
            x: at time t_T.
            order: 2 (judged by order 1) or 3 (by 2).
            t_T, t_0: ends.
            h_init: first step in λ.
            atol, rtol: tolerance, absolute and relative.
            theta: safety factor of the next step.
            t_err: distance from t_0 at which to stop.
            solver_type: see `sample`.
            on_step: called with the latents and the time (1,) before each step that is not a repetition; gives the latents to go
                on with.

        Source: Lu et al. 2022a, algorithm 3 in appendix C.
        """
        if order not in (2, 3):
            raise ValueError(f"order={order}: the adaptive solver has orders 2 and 3")
        ns = self.noise_schedule
        s, end = (torch.full((1,), float(t), device=x.device, dtype=x.dtype) for t in (t_T, t_0))
        lambda_s, lambda_0 = ns.marginal_lambda(s), ns.marginal_lambda(end)
        h = torch.full_like(lambda_s, h_init)
        x = x_prev = x if on_step is None else on_step(x, s)
        while float((s - end).abs()) > t_err:
            t = ns.inverse_lambda(lambda_s + h)
            if order == 2:
                lower, known = self.dpm_solver_first_update(x, s, t, return_intermediate=True)
                higher = self.singlestep_dpm_solver_second_update(x, s, t, solver_type=solver_type, **known)
            else:
                lower, known = self.singlestep_dpm_solver_second_update(
                    x, s, t, r1=1 / 3, return_intermediate=True, solver_type=solver_type
                )
                higher = self.singlestep_dpm_solver_third_update(x, s, t, solver_type=solver_type, **known)
            tolerance = torch.clamp(rtol * torch.maximum(lower.abs(), x_prev.abs()), min=atol)
            error = ((higher - lower) / tolerance).flatten(1).pow(2).mean(dim=1).sqrt().max()
            if error <= 1.0:
                x, x_prev, s = higher, lower, t
                lambda_s = ns.marginal_lambda(s)
                if on_step is not None and float((s - end).abs()) > t_err:
                    x = on_step(x, s)
            h = torch.minimum(theta * h * error.float().pow(-1.0 / order), lambda_0 - lambda_s)
        return x

    def _multistep(
        self, x: Tensor, timesteps: Tensor, order: int, lower_order_final: bool, solver_type: str
    ) -> Tensor:
        steps = len(timesteps) - 1
        if steps < order:
            raise ValueError(f"{steps} steps are too few for a multistep solver of order {order}")
        rule = DPMRule(self.predict_x0, solver_type)
        run = Multistep(
            rule, self.noise_schedule.points(timesteps), order, lower_order_final and steps < FEW_STEPS
        )
        for t in timesteps[:-1]:
            x = run.advance(x, self.model_fn(x, t.expand(len(x))))
        return x

    def _singlestep(
        self, x: Tensor, outer: Tensor, orders: Sequence[int], skip_type: str, solver_type: str
    ) -> Tensor:
        for i, order in enumerate(orders):
            r1, r2 = self.inner_shares(skip_type, float(outer[i]), float(outer[i + 1]), order)
            s, t = outer[i].expand(len(x)), outer[i + 1].expand(len(x))
            x = self.singlestep_dpm_solver_update(x, s, t, order, solver_type=solver_type, r1=r1, r2=r2)
        return x

    def inner_shares(
        self, skip_type: str, s: float, t: float, order: int
    ) -> tuple[float | None, float | None]:
        """Where a single step from time s to t asks the network in between, as shares of the step's λ; None where it does not."""
        times = self.noise_schedule.time_steps(skip_type, s, t, order)
        lambdas = [p.lamb for p in self.noise_schedule.points(times)]
        shares = [(lamb - lambdas[0]) / (lambdas[-1] - lambdas[0]) for lamb in lambdas[1:-1]]
        return (*shares, None, None)[:2]  # type: ignore[return-value]

    @torch.no_grad()
    @prompt_cache()
    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> Tensor:
        """Solve from t_start to t_end.

        Args:
            x: at time t_start, pure noise.
            steps: network calls (one more with `denoise_to_zero`); ignored by "adaptive".
            t_start, t_end: T and 1/N if None.
            order: 1, 2 or 3.
            skip_type: spacing of the times, see `get_time_steps`.
            method: "singlestep", "multistep", "singlestep_fixed" (steps // order single steps) or "adaptive".
            lower_order_final: lower the order of the last multistep steps when there are fewer than 15.
            denoise_to_zero: end with the estimate of x_0.
            solver_type: "dpm_solver" or "taylor", two ways of writing the term of second order, or "exact", with which the
                multistep solver of order 3 really has that order (the published ones have 2).
            atol, rtol: tolerance of "adaptive".

        Raises:
            ValueError: unknown method, spacing, order or solver type, or too few steps for the order.
        """
        t_0 = 1.0 / self.noise_schedule.total_N if t_end is None else t_end
        t_T = self.noise_schedule.T if t_start is None else t_start
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol=atol, rtol=rtol, solver_type=solver_type)
        elif method == "multistep":
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)
            x = self._multistep(x, times, order, lower_order_final, solver_type)
        elif method == "singlestep":
            outer, orders = self.get_orders_and_timesteps_for_singlestep_solver(
                steps, order, skip_type, t_T, t_0, x.device
            )
            x = self._singlestep(x, outer, orders, skip_type, solver_type)
        elif method == "singlestep_fixed":
            outer = self.get_time_steps(skip_type, t_T, t_0, steps // order, x.device)
            x = self._singlestep(x, outer, [order] * (steps // order), skip_type, solver_type)
        else:
            raise ValueError(
                f"method={method!r} is unknown; choose singlestep, multistep, singlestep_fixed or adaptive"
            )
        if denoise_to_zero:
            x = self.denoise_to_zero_fn(x, torch.full((len(x),), t_0, device=x.device))
        return x
