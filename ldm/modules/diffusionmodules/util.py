"""Noise schedules, step choices, embeddings and small layers of the diffusion models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from ldm.util import mean_flat
from taming.util import instantiate_from_config

__all__ = [
    "CheckpointFunction", "GroupNorm32", "HybridConditioner", "SiLU", "avg_pool_nd", "betas_for_alpha_bar", "checkpoint", "conv_nd",
    "drop_rows", "extract_into_tensor", "linear", "make_beta_schedule", "make_ddim_sampling_parameters", "make_ddim_timesteps", "mean_flat",
    "noise_like", "normalization", "scale_module", "timestep_embedding", "zero_module",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- schedules


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Variances β_t of the forward process, (n_timestep,) in float64.

    Args:
        schedule: "linear" (the *roots* of β run linearly), "sqrt_linear" (β itself runs linearly: the published names
            are the reverse of what one expects), "sqrt" (the root of a linear run), "cosine" (Nichol & Dhariwal 2021,
            equation 17) or "squaredcos_cap_v2" (the same with fixed constants).
        n_timestep: number of steps.
        linear_start, linear_end: ends of the run.
        cosine_s: offset of the cosine.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        angles = (
            (np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s) / (1 + cosine_s) * np.pi / 2
        )
        alphas = np.cos(angles) ** 2
        alphas = alphas / alphas[0]
        return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)
    if schedule == "squaredcos_cap_v2":
        return betas_for_alpha_bar(n_timestep, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(
        f"beta_schedule={schedule!r} is unknown; choose linear, sqrt_linear, sqrt, cosine or squaredcos_cap_v2"
    )


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """β_t that give the cumulative product `alpha_bar(t)`, t in [0, 1], each at most `max_beta`."""
    grid = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in itertools.pairwise(grid)])


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Indices of the training steps that a sampler visits, ascending.

    Args:
        ddim_discr_method: "uniform" (every (T // n)-th step, which may give more than n) or "quad" (denser near 0).
        num_ddim_timesteps: n, from 1 to T.
        num_ddpm_timesteps: T.
        verbose: accepted, as published.

    All are shifted by one, as published, so the last may be T itself; samplers clamp it to T - 1.

    Raises:
        NotImplementedError: unknown method.
        ValueError: n outside 1 … T.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(
            f"{num_ddim_timesteps} sampling steps asked for; choose from 1 to {num_ddpm_timesteps}, the steps of training"
        )
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(int)
    else:
        raise NotImplementedError(
            f"ddim_discretize={ddim_discr_method!r} is unknown; choose 'uniform' or 'quad'"
        )
    return steps + 1


def make_ddim_sampling_parameters(
    alphacums: Any, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[Any, Any, np.ndarray]:
    """σ, ᾱ and the ᾱ of the step before, at each visited step.

    Args:
        alphacums: ᾱ of all training steps, a numpy array or a tensor on the CPU.
        ddim_timesteps: visited steps, ascending.
        eta: 0 for a deterministic sampler, 1 for the variance of DDPM.
        verbose: accepted, as published.

    Source: Song et al. 2021 (DDIM), equation 16.
    """
    alphas = alphacums[ddim_timesteps]
    previous = np.asarray([alphacums[0], *alphacums[ddim_timesteps[:-1]].tolist()])
    sigmas = eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
    return sigmas, alphas, previous


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Entries `a[t]`, shaped (b, 1, …, 1) to multiply something of shape `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))


def drop_rows(x: Tensor, rate: float) -> Tensor:
    """(b, …) with each of its b rows zero with probability `rate`, as guidance without a classifier trains (Ho & Salimans 2022)."""
    kept = torch.bernoulli(torch.full((len(x),), 1.0 - rate, device=x.device))
    return kept.view(-1, *[1] * (x.ndim - 1)) * x


def noise_like(
    shape: Sequence[int], device: Any, repeat: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal noise; with `repeat` one draw for the whole batch."""
    if repeat:
        one = torch.randn((1, *shape[1:]), device=device, generator=generator)
        return one.repeat(shape[0], *((1,) * (len(shape) - 1)))
    return torch.randn(tuple(shape), device=device, generator=generator)


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Sinusoidal code of time steps: all cosines, then all sines.

    Args:
        timesteps: (b,), fractions allowed.
        dim: width; an odd one ends in a column of zeros.
        max_period: controls the lowest frequency.
        repeat_only: repeat the bare number instead.

    Returns:
        (b, dim) in float32. (`taming`'s `get_timestep_embedding` has the sines first and another divisor.)
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


# ------------------------------------------------------------------------------------------------------------- layers


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """Call a function; with `flag`, forget its intermediate results and compute them again in the backward pass.

    Args:
        func: the function.
        inputs: its arguments.
        params: accepted, as published; PyTorch finds the parameters itself.
        flag: whether to save memory this way.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction:
    """The published spelling of checkpointing, kept callable: `CheckpointFunction.apply(func, n, *inputs, *params)`."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        """Run `run_function` on the first `length` arguments under `checkpoint`."""
        return checkpoint(run_function, args[:length], args[length:], True)


class SiLU(nn.SiLU):
    """x·σ(x)."""


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are computed in float32, whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)  # PyTorch's kernels accumulate half types in float32
        return super().forward(x.float()).type(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation with 32 groups and ε = 1e-5.

    Raises:
        ValueError: channels that do not divide by 32.
    """
    if channels % 32:
        raise ValueError(
            f"group normalisation wants a multiple of 32 channels, not {channels}; choose model_channels and channel_mult so that every width divides by 32"
        )
    return GroupNorm32(32, channels)


def _by_dimension(table: dict[int, Any], dims: int) -> Any:
    if dims not in table:
        raise ValueError(f"unsupported dimensions: {dims}; choose 1, 2 or 3")
    return table[dims]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    return _by_dimension({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional average pooling."""
    return _by_dimension({1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero; returns the module."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters; returns the module."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module


class HybridConditioner(nn.Module):
    """Two conditioners side by side, one for the channels and one for the cross-attention."""

    def __init__(self, c_concat_config: Any, c_crossattn_config: Any) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Any]]:
        """Each conditioner's result in a list of one, ready for `DiffusionWrapper`."""
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }
