"""Small parts of the samplers: bounds for estimates, sources of noise, steps, and a watch for infinite latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import noise_like

# one source of noise for the batch, or one for each image; a number is the seed of one
Noise = torch.Generator | Sequence[torch.Generator | int] | None


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append axes of length 1 until there are `target_dims`.

    Raises:
        ValueError: there are more already.
    """
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"a tensor of {x.ndim} axes cannot be given {target_dims}")
    return x[(...,) + (None,) * missing]


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each sample down so that its root mean square is at most `value`."""
    rms = x0.pow(2).flatten(1).mean(dim=1).sqrt().clamp(min=value)
    return x0 * (value / append_dims(rms, x0.ndim))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each position down so that the root mean square of its channels is at most `value`."""
    rms = x0.pow(2).mean(dim=1, keepdim=True).sqrt().clamp(min=value)
    return x0 * (value / rms)


def rescale_guided(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """A guided prediction with its contrast partly set back to that of the conditional one.

    Args:
        guided: with classifier-free guidance, (b, ...).
        conditional: without it.
        share: 0 changes nothing, 1 takes over the conditional prediction's deviation for each sample.

    Source: Lin et al. 2023, equations 15 and 16.
    """
    deviations = (append_dims(p.flatten(1).std(dim=1), p.ndim) for p in (conditional, guided))
    wanted, found = deviations
    return guided * (share * wanted / found + (1.0 - share))


def sources(generator: Noise, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
    """Sources of noise, with seeds turned into generators on the CPU, which give the same numbers for every device.

    Raises:
        ValueError: not as many as images.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} seeds or generators for batch_size={batch_size}; give one for each image"
        )
    return [torch.Generator().manual_seed(g) if isinstance(g, int) else g for g in generator]


def draw(shape: Sequence[int], device: Any, generator: Any = None, repeat: bool = False) -> Tensor:
    """Standard normal noise; from a list of generators each image has its own, the same in every batch.

    Args:
        shape: (b, c, h, w).
        device: where it is wanted; it is drawn where the generator is.
        generator: see `sources`.
        repeat: one draw for the whole batch.
    """
    if isinstance(generator, list):
        drawn = [draw((1, *shape[1:]), device, g) for g in generator[: 1 if repeat else None]]
        return drawn[0].expand(*shape) if repeat else torch.cat(drawn)
    where = device if generator is None else generator.device
    return noise_like(shape, where, repeat, generator).to(device)


def trailing_timesteps(n: int, total: int) -> np.ndarray:
    """n steps, ascending and evenly spaced, that end with the last training step: what zero terminal SNR needs.

    Source: Lin et al. 2023, table 2.
    """
    if not 1 <= n <= total:
        raise ValueError(f"{n} sampling steps asked for; choose from 1 to {total}, the steps of training")
    return np.round(np.arange(n, 0, -1) * (total / n)).astype(int)[::-1] - 1


def require_signal(parameterization: str, lowest_alpha_bar: float) -> None:
    """Refuse a noise prediction where there is nothing but noise.

    Raises:
        ValueError: says what to do instead.
    """
    if parameterization == "eps" and lowest_alpha_bar <= 0:
        raise ValueError(
            "this schedule has zero terminal SNR, and at its first step ε says nothing about the image: such a model needs "
            "parameterization='v'"
        )


class FiniteWatch:
    """Raises where latents are infinite or undefined; looks one step late, so that a GPU need not wait for the answer."""

    def __init__(self, steps: int | None) -> None:
        self._of = "" if steps is None else f" of {steps}"
        self._seen: tuple[int, Tensor] | None = None

    def see(self, i: int, x: Tensor) -> None:
        """Note the latents after step i (from 0), and judge those of the step before.

        Raises:
            FloatingPointError: names the step.
        """
        self.close()
        self._seen = i, x.sum(dtype=torch.float32)  # the cheapest number that shows one bad value among all

    def close(self) -> None:
        """Judge the last latents noted."""
        if self._seen is not None and not math.isfinite(float(self._seen[1])):
            raise FloatingPointError(
                f"the latents became infinite or undefined at sampling step {self._seen[0] + 1}{self._of}; "
                "compute in float32 or bfloat16 instead of half precision, or with less guidance"
            )
        self._seen = None
