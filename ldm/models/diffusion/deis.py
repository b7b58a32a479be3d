"""DEIS: exponential integration with a polynomial through the earlier noise predictions (Zhang & Chen 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm.models.diffusion.dpm_solver.multistep import Step
from ldm.models.diffusion.dpm_solver.sampler import SolverSampler
from ldm.models.diffusion.dpm_solver.schedule import NoiseScheduleVP, Point

SPACES: dict[str, Callable[[Point], float]] = {
    "t": lambda p: p.t,
    "rho": lambda p: p.sigma / p.alpha,
    "lambda": lambda p: p.lamb,
}
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def _known(space: str) -> str:
    if space not in SPACES:
        raise ValueError(f"space={space!r} is unknown; choose one of {sorted(SPACES)}")
    return space


class DEISRule:
    """x_t / α_t = x_s / α_s + ∫ ε dρ over ρ = σ / α, with ε a polynomial through the last predictions.

    Args:
        noise_schedule: of the model.
        space: what it is a polynomial of: "t" (tAB), "rho" (ρAB), or "lambda", log ρ up to its sign.

    Raises:
        ValueError: unknown space.

    Source: Zhang & Chen 2023, equations 14 and 15.
    """

    predict_x0 = False

    def __init__(self, noise_schedule: NoiseScheduleVP, space: str = "t") -> None:
        self.noise_schedule, self.space = noise_schedule, _known(space)

    def predictor(self, points: Sequence[Point]) -> Step:
        """The step: integrals of the Lagrange polynomials of the times at its start and before."""
        end, start = points[:2]
        middle, half = (start.lamb + end.lamb) / 2, (end.lamb - start.lamb) / 2
        lambdas = middle + half * NODES
        # the integral is taken in λ, where ρ = e^{-λ} is smooth over steps of any length: dρ = -e^{-λ} dλ
        measure = -half * NODE_WEIGHTS * np.exp(-lambdas)
        at = self._variable(lambdas)
        knots = np.array([SPACES[self.space](p) for p in points[1:]])
        weights = []
        for j, knot in enumerate(knots):
            others = np.delete(knots, j)
            lagrange = np.prod((at[:, None] - others) / (knot - others), axis=1)
            weights.append(end.alpha * float(np.sum(measure * lagrange)))
        return Step(end.alpha / start.alpha, tuple(weights))

    def corrector(self, points: Sequence[Point]) -> None:
        """None: DEIS takes each step once."""

    def _variable(self, lambdas: np.ndarray) -> np.ndarray:
        if self.space == "t":
            return self.noise_schedule.inverse_lambda(torch.from_numpy(lambdas)).numpy()
        return np.exp(-lambdas) if self.space == "rho" else lambdas


class DEISSampler(SolverSampler):
    """DEIS in 10 to 20 steps, each with one network call; see `LatentSampler` for the arguments of `sample`.

    ```python
    samples, _ = DEISSampler(model).sample(15, 4, (4, 64, 64), conditioning=c, unconditional_guidance_scale=7.5, unconditional_conditioning=uc)
    ```

    Args:
        model, schedule, device, lower_order_final: see `SolverSampler`.
        order: 1 to 4 predictions; order p is tAB of degree p - 1.
        space: see `DEISRule`.

    Source: Zhang & Chen 2023, algorithm 1.
    """

    max_order = 4

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        order: int = 3,
        lower_order_final: bool = True,
        space: str = "t",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, schedule, device, order, lower_order_final, **kwargs)
        self.space = _known(space)

    def _begin(self) -> None:
        self.rule = DEISRule(self.noise_schedule, self.space)
        super()._begin()
