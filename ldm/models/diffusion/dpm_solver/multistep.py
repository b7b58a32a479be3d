"""Multistep solvers of the probability-flow equation as tables of weights.

In λ = log(α/σ) the exact solution from time s to t is, with h = λ_t - λ_s and the prediction m as a function of λ,

    x_t = base · x_s - c (φ₁ m + k φ₂ D₁ + φ₃ D₂ + …),     φ₁ = e^{kh} - 1,  φ₂ = φ₁ / h - k,  φ₃ = φ₂ / h - 1/2

D₁, D₂ are h times the first and h² times the second derivative of m at s. For noise prediction k = 1, base = α_t / α_s and
c = σ_t; for data prediction k = -1, base = σ_t / σ_s and c = α_t. A rule approximates the derivatives by earlier predictions,
so each of its steps is a weighted sum whose weights are known before sampling begins.

Source: Lu et al. 2022a (DPM-Solver), proposition 3.1; Lu et al. 2022b (DPM-Solver++), proposition 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.dpm_solver.schedule import Point

# how much of D₂ / 2 the multistep method of order 3 takes; the published solvers take half of what the expansion says, so that
# their order 3 is a more exact order 2
BEND = {"dpm_solver": 1.0, "taylor": 1.0, "exact": 2.0}
SOLVER_TYPES = tuple(BEND)
FEW_STEPS = 15  # below this many, the last steps of DPM-Solver and DEIS are of low order


class Step(NamedTuple):
    """keep · x + Σ weights[j] · predictions[j], the newest prediction first."""

    keep: float
    weights: tuple[float, ...]

    def apply(self, x: Tensor, predictions: Sequence[Tensor]) -> Tensor:
        """The sum; predictions without a weight are left out."""
        out = self.keep * x
        for weight, prediction in zip(self.weights, predictions, strict=False):
            out.add_(prediction, alpha=weight)
        return out


class Rule(Protocol):
    """A multistep method. The points are the step's end, its start, and the starts of the steps before, as many as the order."""

    predict_x0: bool

    def predictor(self, points: Sequence[Point]) -> Step:
        """The step, with weights for the predictions at the start and before."""
        ...

    def corrector(self, points: Sequence[Point]) -> Step | None:
        """The same step taken again once the prediction at its end is known (the first weight), if the method does so."""
        ...


# ---------------------------------------------------------------------------------------------------------- weights


def phi_functions(h: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """φ₁, φ₂ and φ₃ of the module's docstring."""
    phi_1 = torch.expm1(k * h)
    phi_2 = phi_1 / h - k
    return phi_1, phi_2, phi_2 / h - 0.5


def second_order_weight(phi: tuple[Tensor, Tensor, Tensor], k: float, solver_type: str) -> Tensor:
    """What multiplies D₁ in a method of order 2: k φ₂ ("taylor", "exact"), or φ₁ / 2, which is as good ("dpm_solver").

    Raises:
        ValueError: unknown solver type.
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type={solver_type!r} is unknown; choose one of {SOLVER_TYPES}")
    return 0.5 * phi[0] if solver_type == "dpm_solver" else k * phi[1]


def multistep_weights(h: Tensor, gaps: Sequence[Tensor], k: float, solver_type: str) -> list[Tensor]:
    """Weights of the predictions, newest first, in x_t = base · x_s - c Σ w_j m_j, for DPM-Solver of order len(gaps) + 1.

    Args:
        h: length of the step in λ.
        gaps: distances between successive earlier times in λ as shares of h, newest first: none, one or two.
        k: 1 for noise prediction, -1 for data prediction.
        solver_type: see `second_order_weight` for order 2, `BEND` for order 3.

    Raises:
        ValueError: another order, or an unknown solver type.
    """
    phi = phi_functions(h, k)
    half = second_order_weight(phi, k, solver_type)
    if not gaps:
        return [phi[0]]
    if len(gaps) == 1:
        slope = half / gaps[0]
        return [phi[0] + slope, -slope]
    if len(gaps) > 2:
        raise ValueError(f"order={len(gaps) + 1} must be 1, 2 or 3")
    r0, r1 = gaps
    # differences (m₀ - m₁) / r₀ and (m₁ - m₂) / r₁, extrapolated to the step's start
    bend = (k * phi[1] * r0 + BEND[solver_type] * phi[2]) / (r0 + r1)
    near, far = (k * phi[1] + bend) / r0, -bend / r1
    return [phi[0] + near, far - near, -far]


def step_of(points: Sequence[Point], weights: Sequence[float], predict_x0: bool) -> Step:
    """x_t = base · x_s - c Σ w_j m_j as a `Step`."""
    end, start = points[:2]
    base, c = (end.sigma / start.sigma, end.alpha) if predict_x0 else (end.alpha / start.alpha, end.sigma)
    return Step(base, tuple(-c * w for w in weights))


class DPMRule:
    """DPM-Solver (noise prediction) or DPM-Solver++ (data prediction), multistep, of orders 1 to 3.

    Source: Lu et al. 2022b, algorithm 2 and appendix B.
    """

    def __init__(self, predict_x0: bool = True, solver_type: str = "dpm_solver") -> None:
        self.predict_x0, self.solver_type = predict_x0, solver_type

    def predictor(self, points: Sequence[Point]) -> Step:
        """See `Rule`."""
        lambdas = torch.tensor([p.lamb for p in points], dtype=torch.float64)
        h = lambdas[0] - lambdas[1]
        gaps = list((lambdas[1:-1] - lambdas[2:]) / h)
        weights = multistep_weights(h, gaps, -1.0 if self.predict_x0 else 1.0, self.solver_type)
        return step_of(points, [float(w) for w in weights], self.predict_x0)

    def corrector(self, points: Sequence[Point]) -> Step | None:
        """None: DPM-Solver takes each step once."""
        return None


# ------------------------------------------------------------------------------------------------------------- steps


def to_zero(point: Point, predict_x0: bool) -> Step:
    """The step from a point to t = 0, where x is the estimate of x_0."""
    return Step(0.0, (1.0,)) if predict_x0 else Step(1 / point.alpha, (-point.sigma / point.alpha,))


class Multistep:
    """A run of a rule: give it the latents and the prediction at each time, get the latents at the next.

    Args:
        rule: the method.
        points: the times, descending; at t = 0 the run ends with the estimate of x_0.
        order: of the method; the first steps, which have too little history, are of lower order.
        lower_order_final: let the order fall to 1 at the end, where the equation is least smooth.
    """

    def __init__(self, rule: Rule, points: Sequence[Point], order: int, lower_order_final: bool) -> None:
        steps = len(points) - 1
        self.order, self._i = order, 0
        self._predictors: list[Step] = []
        self._correctors: list[Step | None] = []
        for i in range(steps):
            n = min(order, i + 1, steps - i if lower_order_final else order)
            window = [points[j] for j in range(i + 1, i - n, -1)]
            ends = window[0].t <= 0
            self._predictors.append(to_zero(window[1], rule.predict_x0) if ends else rule.predictor(window))
            self._correctors.append(None if ends else rule.corrector(window))
        self._start: Tensor | None = None
        self._history: list[Tensor] = []

    def advance(self, x: Tensor, prediction: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents at the next time.

        Args:
            x: latents at the present time.
            prediction: made from them, of x_0 or ε as the rule wants it.
            mask: 1 where x is given from outside at each time. What was predicted from other noise says nothing there: that part is
                not corrected, and its steps are of order 1.
        """
        corrector = self._correctors[self._i - 1] if self._i else None
        if corrector is not None and self._start is not None:
            corrected = corrector.apply(self._start, [prediction, *self._history])
            x = corrected if mask is None else mask * x + (1.0 - mask) * corrected
        if mask is not None:
            self._history = [mask * prediction + (1.0 - mask) * m for m in self._history]
        self._history = [prediction, *self._history][: self.order]
        self._start = x
        self._i += 1
        return self._predictors[self._i - 1].apply(x, self._history)
