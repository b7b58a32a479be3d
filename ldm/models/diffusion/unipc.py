"""UniPC: a multistep predictor, and a corrector that uses the same network call again (Zhao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.models.diffusion.dpm_solver.multistep import Step, step_of
from ldm.models.diffusion.dpm_solver.sampler import SolverSampler
from ldm.models.diffusion.dpm_solver.schedule import Point

# B(h), a function of z = h for noise prediction and z = -h for data prediction
B_FUNCTIONS = {"bh1": lambda z: z, "bh2": math.expm1}


class UniPCRule:
    """UniP-p and UniC-p: the prediction p and the correction of the same step, of orders p and p + 1.

    Args:
        variant: "bh1" or "bh2"; it matters where a single difference is weighted, and the paper prefers the second for guidance.
        predict_x0: work on estimates of x_0 instead of ε.

    Raises:
        ValueError: unknown variant.

    Source: Zhao et al. 2023, section 3 (UniC, UniP) and its appendix for data prediction.
    """

    def __init__(self, variant: str = "bh2", predict_x0: bool = True) -> None:
        if variant not in B_FUNCTIONS:
            raise ValueError(f"variant={variant!r} is unknown; choose one of {sorted(B_FUNCTIONS)}")
        self.variant, self.predict_x0 = variant, predict_x0

    def predictor(self, points: Sequence[Point]) -> Step:
        """The step, from the predictions at its start and before."""
        h = points[0].lamb - points[1].lamb
        earlier = self._weights(h, [(p.lamb - points[1].lamb) / h for p in points[2:]])
        return step_of(points, [self._at_start(h, earlier), *earlier], self.predict_x0)

    def corrector(self, points: Sequence[Point]) -> Step:
        """The step, from the predictions at its end, its start and before."""
        h = points[0].lamb - points[1].lamb
        end, *earlier = self._weights(h, [1.0, *((p.lamb - points[1].lamb) / h for p in points[2:])])
        return step_of(points, [end, self._at_start(h, [end, *earlier]), *earlier], self.predict_x0)

    def _at_start(self, h: float, others: Sequence[float]) -> float:
        return math.expm1(-h if self.predict_x0 else h) - sum(others)

    def _weights(self, h: float, ratios: Sequence[float]) -> list[float]:
        """B a_m / r_m for the differences between the predictions r_m · h away and the one at the step's start."""
        n, z = len(ratios), -h if self.predict_x0 else h
        b = B_FUNCTIONS[self.variant](z)
        if n < 2:
            return [0.5 * b / r for r in ratios]  # 1/2 has the order wanted, whatever B is
        wanted, phi = [], math.expm1(z) / z
        for m in range(1, n + 1):
            phi = (phi - 1 / math.factorial(m)) / z
            wanted.append(math.factorial(m) * z * phi)
        powers = np.vander(ratios, n, increasing=True).T
        return (np.linalg.solve(powers, wanted) / ratios).tolist()


class UniPCSampler(SolverSampler):
    """UniPC in 5 to 20 steps, each with one network call; see `LatentSampler` for the arguments of `sample`.

    ```python
    samples, _ = UniPCSampler(model).sample(10, 4, (4, 64, 64), conditioning=c, unconditional_guidance_scale=7.5, unconditional_conditioning=uc)
    ```

    Args:
        model, schedule, device, lower_order_final: see `SolverSampler`.
        order: 1 to 3; the paper takes 3 without guidance and 2 with it.
        variant, predict_x0: see `UniPCRule`.

    Source: Zhao et al. 2023, algorithms 1 and 2.
    """

    always_lowers = True

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        order: int = 2,
        lower_order_final: bool = True,
        variant: str = "bh2",
        predict_x0: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, schedule, device, order, lower_order_final, **kwargs)
        self.rule = UniPCRule(variant, predict_x0)
