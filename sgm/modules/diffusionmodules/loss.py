"""The denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgm.util import append_dims, instantiate_from_config

# functions of (output, target), both (b, ...); the mean over all axes but the first is taken of them
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda output, target: (output - target) ** 2,
    "l1": lambda output, target: (output - target).abs(),
}


class StandardDiffusionLoss(nn.Module):
    """Weighted error of the estimate of x_0 at random noise levels, for each sample.

    Random numbers are drawn in this order: the conditioner's dropout, noise levels, noise, offset noise.

    Args:
        sigma_sampler_config: of what draws noise levels.
        loss_weighting_config: of the `DiffusionLossWeighting`.
        loss_type: "l2", "l1" or "lpips", which is not weighted.
        offset_noise_level: scale of additional noise that is the same over a whole channel.
        batch2model_keys: entries of the batch, one or a list, that the network gets where the batch has them.

    Source: Karras et al. 2022, equation 8; offset noise is Guttenberg's, 2023.
    """

    def __init__(
        self,
        sigma_sampler_config: Any,
        loss_weighting_config: Any,
        loss_type: str = "l2",
        offset_noise_level: float = 0.0,
        batch2model_keys: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        known = (*ERRORS, "lpips")
        if loss_type not in known:
            raise ValueError(f"loss_type={loss_type!r} is unknown; choose one of {known}")
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.loss_weighting = instantiate_from_config(loss_weighting_config)
        self.loss_type, self.offset_noise_level = loss_type, offset_noise_level
        keys = batch2model_keys or []
        self.batch2model_keys = {keys} if isinstance(keys, str) else set(keys)
        if loss_type == "lpips":
            from taming.modules.losses.lpips import LPIPS

            self.lpips = LPIPS()

    def forward(
        self,
        network: nn.Module,
        denoiser: Callable[..., Tensor],
        conditioner: Callable[[Mapping[str, Any]], Any],
        input: Tensor,
        batch: Mapping[str, Any],
    ) -> Tensor:
        """The loss of each sample, (b,).

        Args:
            network: handed to the denoiser.
            denoiser: a `Denoiser`.
            conditioner: makes the condition of the batch.
            input: x_0, (b, c, ...).
            batch: what the data set gave.
        """
        cond = conditioner(batch)
        additional = {key: batch[key] for key in self.batch2model_keys & set(batch)}
        sigmas = self.sigma_sampler(len(input)).to(input)
        noise = self.get_noise(input)
        noised = self.get_noised_input(append_dims(sigmas, input.ndim), noise, input)
        output = denoiser(network, noised, sigmas, cond, **additional)
        weight = append_dims(self.loss_weighting(sigmas), input.ndim)
        return self.get_loss(output, input, weight)

    def get_noise(self, input: Tensor) -> Tensor:
        """ε, with offset noise where wanted: the same over a channel of images, over a frame of videos (b, c, t, h, w)."""
        noise = torch.randn_like(input)
        if not self.offset_noise_level:
            return noise
        shape = (len(input), 1, input.shape[2]) if input.ndim == 5 else input.shape[:2]
        offset = torch.randn(shape, device=input.device, dtype=input.dtype)
        return noise + self.offset_noise_level * append_dims(offset, input.ndim)

    def get_noised_input(self, sigmas_bc: Tensor, noise: Tensor, input: Tensor) -> Tensor:
        """x_0 + σ ε."""
        return input + noise * sigmas_bc

    def get_loss(self, model_output: Tensor, target: Tensor, w: Tensor) -> Tensor:
        """The weighted error of each sample, (b,)."""
        if self.loss_type == "lpips":
            return self.lpips(model_output, target).reshape(-1)
        return (w * ERRORS[self.loss_type](model_output, target)).flatten(1).mean(dim=1)
