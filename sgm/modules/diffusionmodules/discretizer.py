"""Which noise levels σ a sampler visits, and which ones a discrete model was trained with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_beta_schedule
from sgm.util import append_zero

# the ends of Stable Diffusion's training schedule, where σ = √((1 - ᾱ) / ᾱ)
SD_SIGMA_MIN, SD_SIGMA_MAX = 0.0292, 14.6146

# ten steps optimised for each model, and the level where sampling ends (Sabour et al. 2024, "Align your steps", quickstart guide)
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def generate_roughly_equally_spaced_steps(num_substeps: int, max_step: int) -> np.ndarray:
    """`num_substeps` of the steps 0 … max_step - 1, ascending and evenly spaced, the last one among them."""
    return np.linspace(max_step - 1, 0, num_substeps, endpoint=False).astype(int)[::-1]


class Discretization(ABC):
    """A choice of noise levels; a subclass defines `get_sigmas`."""

    def __call__(
        self, n: int, do_append_zero: bool = True, device: Any = "cpu", flip: bool = False
    ) -> Tensor:
        """n noise levels in float32.

        Args:
            n: how many, from 1.
            do_append_zero: put a 0 behind the lowest, where sampling ends.
            device: where they are wanted.
            flip: ascending instead of descending.

        Raises:
            ValueError: another n.
        """
        if n < 1:
            raise ValueError(f"{n} noise levels asked for; choose 1 or more")
        sigmas = self.get_sigmas(n, device=device)
        sigmas = append_zero(sigmas) if do_append_zero else sigmas
        return sigmas.flip(0) if flip else sigmas

    @abstractmethod
    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """n noise levels, descending, (n,)."""


class EDMDiscretization(Discretization):
    """Even steps in σ^(1/ρ), so that they shorten towards the image.

    Args:
        sigma_min, sigma_max: the lowest and the highest level.
        rho: ρ.

    Source: Karras et al. 2022, equation 5.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = _ordered(sigma_min, sigma_max, rho)

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """See `Discretization`; a single level is the highest."""
        low, high = (s ** (1 / self.rho) for s in (self.sigma_min, self.sigma_max))
        ramp = torch.linspace(
            0, 1, n, device="cpu"
        )  # real numbers also where a model is built on the meta device
        return ((high + ramp * (low - high)) ** self.rho).to(device)


class KarrasDiscretization(EDMDiscretization):
    """EDM's spacing over the noise levels of Stable Diffusion: "Karras sigmas" for models trained on discrete steps."""

    def __init__(
        self, sigma_min: float = SD_SIGMA_MIN, sigma_max: float = SD_SIGMA_MAX, rho: float = 7.0
    ) -> None:
        super().__init__(sigma_min, sigma_max, rho)


class ExponentialDiscretization(Discretization):
    """Even steps in ln σ, the limit of EDM's spacing for large ρ.

    Args:
        sigma_min, sigma_max: the lowest and the highest level.
    """

    def __init__(self, sigma_min: float = SD_SIGMA_MIN, sigma_max: float = SD_SIGMA_MAX) -> None:
        self.sigma_min, self.sigma_max, _ = _ordered(sigma_min, sigma_max, 1.0)

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """See `Discretization`; a single level is the highest."""
        levels = np.geomspace(self.sigma_max, self.sigma_min, n)
        return torch.tensor(levels, dtype=torch.float32, device=device)


class AlignYourStepsDiscretization(Discretization):
    """Levels optimised for one model at ten steps; for other numbers of steps interpolated in ln σ.

    Args:
        model: "sd15", "sdxl" or "svd".

    Raises:
        ValueError: another model.

    Source: Sabour et al. 2024, "Align your steps: optimizing sampling schedules in diffusion models".
    """

    def __init__(self, model: str = "sdxl") -> None:
        if model not in ALIGN_YOUR_STEPS:
            raise ValueError(
                f"model={model!r} has no aligned steps; choose one of {sorted(ALIGN_YOUR_STEPS)}"
            )
        self.model = model

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """See `Discretization`; n steps have n + 1 levels, the last of which the appended 0 replaces."""
        table = np.log(ALIGN_YOUR_STEPS[self.model])
        places = np.linspace(0, len(table) - 1, n + 1)[:-1]
        levels = np.exp(np.interp(places, np.arange(len(table)), table))
        return torch.tensor(levels, dtype=torch.float32, device=device)


class TableDiscretization(Discretization):
    """Levels from among those of a model's training steps.

    Args:
        sigmas: all of them, ascending, (N,).
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """See `Discretization`.

        Raises:
            ValueError: more levels than the table has.
        """
        total = len(self.sigmas)
        if n > total:
            raise ValueError(f"{n} sampling steps asked for; choose from 1 to {total}, the steps of training")
        steps = generate_roughly_equally_spaced_steps(n, total) if n < total else np.arange(total)
        return self.sigmas[torch.from_numpy(steps.copy())].flip(0).to(device)


class LegacyDDPMDiscretization(TableDiscretization):
    """The noise levels of Stable Diffusion's discrete training steps.

    Args:
        linear_start, linear_end: ends of the run of β, linear in √β.
        num_timesteps: number of training steps.
    """

    def __init__(
        self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: int = 1000
    ) -> None:
        self.num_timesteps = num_timesteps
        betas = make_beta_schedule("linear", num_timesteps, linear_start, linear_end)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        variances = (1 - self.alphas_cumprod) / self.alphas_cumprod
        super().__init__(torch.tensor(variances, dtype=torch.float32, device="cpu").sqrt())


def _ordered(sigma_min: float, sigma_max: float, rho: float) -> tuple[float, float, float]:
    if not (0 < sigma_min <= sigma_max and rho > 0):
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: 0 < sigma_min ≤ sigma_max and rho > 0 are needed"
        )
    return sigma_min, sigma_max, rho
