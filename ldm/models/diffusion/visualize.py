"""Rows and grids of pictures that the diffusion models log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torchvision.utils import make_grid


def rows(images: Sequence[Tensor]) -> Tensor:
    """Batches in the order of time → one grid (c, H, W) with a row for each image of the batch."""
    stacked = torch.stack(list(images))
    return make_grid(rearrange(stacked, "n b c h w -> (b n) c h w"), nrow=len(stacked))


def diffusion_row(model: Any, start: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward process on a few images: a grid with a row for each, from clean to noise.

    Args:
        model: a model with `q_sample`, `num_timesteps` and `log_every_t`.
        start: images or latents.
        decode: turns (noisy) latents into images.
    """
    steps = []
    for t in range(model.num_timesteps):
        if t % model.log_every_t == 0 or t == model.num_timesteps - 1:
            at = torch.full((len(start),), t, device=start.device, dtype=torch.long)
            steps.append(decode(model.q_sample(x_start=start, t=at, noise=torch.randn_like(start))))
    return rows(steps)


def select(log: dict[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    """Only the entries asked for; everything if none of them exists."""
    if keys and (found := [k for k in keys if k in log]):
        return {k: log[k] for k in found}
    return log


def centre_mask(batch: int, size: Sequence[int], like: Tensor) -> Tensor:
    """(batch, 1, h, w): zero in the middle quarter of the image, one around it."""
    height, width = size
    mask = torch.ones(batch, 1, height, width, device=like.device)
    mask[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0.0
    return mask


class LatentPictures:
    """Draws what a latent model makes of one batch's conditions.

    Args:
        model: a `LatentDiffusion`.
        cond: encoded conditions of n samples.
        n: samples.
        ddim_steps, eta: of DDIM; None samples ancestrally.
        averaged: use the averaged weights.
    """

    def __init__(
        self, model: Any, cond: Any, n: int, ddim_steps: int | None, eta: float, averaged: bool
    ) -> None:
        self.model, self.cond, self.n = model, cond, n
        self.options: dict[str, Any] = {"ddim": ddim_steps is not None, "ddim_steps": ddim_steps, "eta": eta}
        self.averaged = averaged

    def _weights(self, purpose: str) -> AbstractContextManager[None]:
        return self.model.ema_scope(purpose) if self.averaged else nullcontext()

    def _sample(self, purpose: str, **options: Any) -> tuple[Tensor, Any]:
        """Decoded samples, and the sampler's intermediates."""
        with self._weights(purpose):
            latents, kept = self.model.sample_log(self.cond, self.n, **self.options, **options)
        return self.model.decode_first_stage(latents), kept

    def samples(self, denoise_row: bool, quantized: bool) -> dict[str, Tensor]:
        """`samples`, and on request the way to them and those with quantised estimates."""
        images, kept = self._sample("Sampling")
        log = {"samples": images}
        if denoise_row:
            steps = kept["x_inter"] if isinstance(kept, Mapping) else kept
            log["denoise_row"] = rows([self.model.decode_first_stage(s) for s in steps])
        if quantized:
            name = "quantize_x0" if self.options["ddim"] else "quantize_denoised"
            log["samples_x0_quantized"] = self._sample("Plotting Quantized Denoised", **{name: True})[0]
        return log

    def guided(self, scale: float, uncond: Any) -> dict[str, Tensor]:
        """`samples_cfg_scale_…`, with classifier-free guidance."""
        images, _ = self._sample(
            "Sampling with classifier-free guidance", unconditional_guidance_scale=scale, unconditional_conditioning=uncond
        )  # fmt: skip
        return {f"samples_cfg_scale_{scale:.2f}": images}

    def inpainted(self, z: Tensor) -> dict[str, Tensor]:
        """Latents z with their middle, and with all but their middle, drawn anew; and the mask of the former."""
        mask = centre_mask(self.n, z.shape[2:], z)
        inside, _ = self._sample("Plotting Inpaint", x0=z, mask=mask)
        outside, _ = self._sample("Plotting Outpaint", x0=z, mask=1.0 - mask)
        return {"samples_inpainting": inside, "mask": mask, "samples_outpainting": outside}

    def progressive(self) -> dict[str, Tensor]:
        """The estimates of x_0 over ancestral sampling."""
        model = self.model
        with self._weights("Plotting Progressives"):
            shape = (model.channels, model.image_size, model.image_size)
            _, kept = model.progressive_denoising(self.cond, shape=shape, batch_size=self.n, verbose=False)
        return {"progressive_row": rows([model.decode_first_stage(s) for s in kept])}
