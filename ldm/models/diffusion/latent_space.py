"""The first stage's side of a latent model: images ⇄ latents of unit variance, whole or in patches."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ancestral import AncestralSampling
from ldm.models.diffusion.patches import Patchwise
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class LatentSpace(Patchwise, AncestralSampling):
    """What `LatentDiffusion` does with its first stage."""

    scale_factor: Any  # a number, or a buffer with scale_by_std

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Images (b, c, h, w) in [-1, 1] → what the first stage gives: a distribution or latents, unscaled."""
        settings = self.patch_settings
        if settings is None or not settings["patch_distributed_vq"]:
            return self.first_stage_model.encode(x)
        settings["original_image_size"] = tuple(x.shape[-2:])
        is_gaussian = False

        def encode(crop: Tensor, i: int) -> Tensor:
            nonlocal is_gaussian
            made = self.first_stage_model.encode(crop)
            is_gaussian = isinstance(made, DiagonalGaussianDistribution)
            return made.parameters if is_gaussian else made

        blended = self.blend(x, encode, df=settings["vqf"])
        return DiagonalGaussianDistribution(blended) if is_gaussian else blended

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Latents from the first stage's output: drawn if it is a distribution, and scaled.

        Raises:
            NotImplementedError: an output of another kind.
        """
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            z = encoder_posterior.sample()
        elif isinstance(encoder_posterior, Tensor):
            z = encoder_posterior
        else:
            raise NotImplementedError(
                f"the first stage gave a {type(encoder_posterior).__name__}; a distribution or a tensor is needed"
            )
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """Scaled latents (b, c, h', w') → images (b, 3, h, w).

        Args:
            z: latents; with `predict_cids` code indices (b, h', w') or logits over codes (b, n, h', w').
            predict_cids: see `z`.
            force_not_quantize: leave latents of a VQ model as they are.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` with gradients."""
        if predict_cids:
            indices = z.argmax(dim=1).long() if z.ndim == 4 else z
            z = self.first_stage_model.quantize.get_codebook_entry(indices, shape=None)
            z = rearrange(z, "b h w c -> b c h w").contiguous()
        z = 1.0 / self.scale_factor * z
        options: dict[str, bool] = {}
        if isinstance(self.first_stage_model, VQModelInterface):
            options["force_not_quantize"] = predict_cids or force_not_quantize
        settings = self.patch_settings
        if settings is not None and settings["patch_distributed_vq"]:
            return self.blend(
                z, lambda crop, i: self.first_stage_model.decode(crop, **options), uf=settings["vqf"]
            )
        return self.first_stage_model.decode(z, **options)

    @torch.no_grad()
    def measure_scale(self, x: Tensor) -> Any:
        """1 / the standard deviation of images' latents, the same on all processes.

        Raises:
            AssertionError: there is a scale already.
        """
        if self.scale_factor != 1.0:
            raise AssertionError("scale_by_std measures the scale itself: leave scale_factor at 1")
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        scale = 1.0 / z.flatten().std()
        if self._trainer is not None and self.trainer.world_size > 1:
            scale = self.trainer.strategy.broadcast(scale)
        return scale
