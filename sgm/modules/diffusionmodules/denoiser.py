"""A network as a denoiser: from x = x_0 + σ ε to the estimate of x_0, for any noise level or for those of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sgm.modules.diffusionmodules.denoiser_scaling import DenoiserScaling
from sgm.util import append_dims, instantiate_from_config


class Denoiser(nn.Module):
    """Scales a network's input and output by the noise level.

    Args:
        scaling_config: of the `DenoiserScaling`.
        weighting_config: accepted, as older configurations have it; the loss has its own weighting.

    Source: Karras et al. 2022, equation 7.
    """

    def __init__(self, scaling_config: Any, weighting_config: Any = None) -> None:
        super().__init__()
        self.scaling: DenoiserScaling = instantiate_from_config(scaling_config)

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The noise levels that the network stands for, given those asked for."""
        return sigma

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """What the network is told, given the scaling's noise label."""
        return c_noise

    def forward(
        self,
        network: Callable[..., Tensor],
        input: Tensor,
        sigma: Tensor,
        cond: Any,
        **additional_model_inputs: Any,
    ) -> Tensor:
        """The estimate of x_0.

        Args:
            network: called with the scaled input, noise labels (b,), the condition and the additional inputs.
            input: x, (b, ...).
            sigma: noise levels (b,); the scaling is computed in their precision, the network in the input's.
            cond: the condition.
            additional_model_inputs: handed on to the network.
        """
        sigma = self.possibly_quantize_sigma(sigma)
        c_skip, c_out, c_in, c_noise = self.scaling(append_dims(sigma, input.ndim))
        label = self.possibly_quantize_c_noise(c_noise.reshape(sigma.shape))
        scaled = (input * c_in).to(input.dtype)
        return network(scaled, label, cond, **additional_model_inputs) * c_out + input * c_skip


class TableDenoiser(Denoiser):
    """A denoiser whose network knows only the noise levels of a table; others are rounded to the nearest.

    Args:
        scaling_config: of the `DenoiserScaling`.
        sigmas: the table (n,), usually ascending; kept as a buffer that checkpoints hold.
        quantize_c_noise: tell the network the number of the level instead of the scaling's noise label.
    """

    sigmas: Tensor

    def __init__(self, scaling_config: Any, sigmas: Tensor, quantize_c_noise: bool = True) -> None:
        super().__init__(scaling_config)
        self.register_buffer("sigmas", sigmas)
        self.quantize_c_noise = quantize_c_noise

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """Numbers of the nearest levels, of σ's shape."""
        distance = (sigma.reshape(1, -1) - self.sigmas[:, None]).abs()
        return distance.argmin(dim=0).reshape(sigma.shape)

    def idx_to_sigma(self, idx: Any) -> Tensor:
        """Levels with these numbers."""
        return self.sigmas[idx]

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest levels of the table."""
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """The number of the level nearest to the label.

        The label is taken for a noise level even where the scaling makes something else of it: published trainings depend on it.
        """
        return self.sigma_to_idx(c_noise) if self.quantize_c_noise else c_noise


class DiscreteDenoiser(TableDenoiser):
    """A denoiser over the levels of a discretization, as Stable Diffusion's steps.

    Args:
        scaling_config: of the `DenoiserScaling`.
        num_idx: number of levels.
        discretization_config: of the `Discretization`.
        do_append_zero, flip: see `Discretization`; published models count from the lowest level.
        quantize_c_noise: see `TableDenoiser`.
        weighting_config: accepted, see `Denoiser`.
    """

    def __init__(
        self,
        scaling_config: Any,
        num_idx: int,
        discretization_config: Any,
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
        weighting_config: Any = None,
    ) -> None:
        discretization = instantiate_from_config(discretization_config)
        sigmas = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)
        super().__init__(scaling_config, sigmas, quantize_c_noise)
        self.num_idx = num_idx
