"""Small layers and functions of the diffusion networks (they live in `ldm.modules.diffusionmodules.util`), and the blending of video."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import (
    CheckpointFunction,
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    extract_into_tensor,
    linear,
    make_beta_schedule,
    mean_flat,
    normalization,
    scale_module,
    timestep_embedding,
    zero_module,
)

__all__ = [
    "AlphaBlender", "CheckpointFunction", "GroupNorm32", "SiLU", "avg_pool_nd", "checkpoint", "conv_nd", "extract_into_tensor", "get_alpha",
    "linear", "make_beta_schedule", "mean_flat", "normalization", "scale_module", "timestep_embedding", "zero_module",
]  # fmt: skip


class AlphaBlender(nn.Module):
    """α · spatial + (1 - α) · temporal: how much of what a frame is made of looks at the other frames.

    Args:
        alpha: α itself ("fixed"), or its logit to begin with (the learned strategies).
        merge_strategy: "learned", "fixed", or "learned_with_images" (α = 1 for frames marked as single images).
        rearrange_pattern: from α per frame, "b t", to something that broadcasts over the features.

    Raises:
        ValueError: unknown strategy.

    Source: Blattmann et al. 2023 (Align your Latents), section 3.1.
    """

    strategies = ["learned", "fixed", "learned_with_images"]

    def __init__(
        self,
        alpha: float,
        merge_strategy: str = "learned_with_images",
        rearrange_pattern: str = "b t -> (b t) 1 1",
    ) -> None:
        super().__init__()
        if merge_strategy not in self.strategies:
            raise ValueError(f"merge_strategy={merge_strategy!r} is unknown; choose one of {self.strategies}")
        self.merge_strategy, self.rearrange_pattern = merge_strategy, rearrange_pattern
        factor = torch.tensor([alpha], dtype=torch.float32)
        if merge_strategy == "fixed":
            self.register_buffer("mix_factor", factor)
        else:
            self.mix_factor = nn.Parameter(factor)

    def get_alpha(self, image_only_indicator: Tensor | None = None) -> Tensor:
        """α, shape (1,) or, with learned_with_images, as `rearrange_pattern` has it.

        Args:
            image_only_indicator: (b, t), 1 for frames that are single images.
        """
        if self.merge_strategy == "fixed":
            return self.mix_factor
        alpha = self.mix_factor.sigmoid()
        if self.merge_strategy == "learned":
            return alpha
        if image_only_indicator is None:
            raise ValueError(
                "merge_strategy='learned_with_images' needs image_only_indicator (b, t): 1 for single images, 0 for frames of a clip"
            )
        alpha = torch.where(image_only_indicator.bool(), torch.ones_like(alpha), alpha)
        return rearrange(alpha, self.rearrange_pattern)

    def forward(
        self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Two tensors of one shape → their blend."""
        alpha = self.get_alpha(image_only_indicator).to(x_spatial.dtype)
        return alpha * x_spatial + (1 - alpha) * x_temporal


def get_alpha(
    merge_strategy: str,
    mix_factor: Tensor,
    image_only_indicator: Tensor,
    apply_sigmoid: bool = True,
    is_attn: bool = False,
) -> Tensor:
    """α of networks older than `AlphaBlender`, kept as published.

    Args:
        merge_strategy: "fixed", "learned", "learned_with_images" or "fixed_with_images" (only the marks count).
        mix_factor: (1,).
        image_only_indicator: (b, t), 1 for frames that are single images.
        apply_sigmoid: of everything, the ones of single images included (which so get σ(1) = 0.73).
        is_attn: shape the result for tokens, (b·t, 1, 1), instead of maps, (b, 1, t, 1, 1).

    Raises:
        NotImplementedError: unknown strategy.
    """
    shape = "b t -> (b t) 1 1" if is_attn else "b t -> b 1 t 1 1"
    if merge_strategy in ("fixed", "learned"):
        alpha = mix_factor
    elif merge_strategy == "learned_with_images":
        marked = torch.where(image_only_indicator.bool(), torch.ones_like(mix_factor), mix_factor)
        alpha = rearrange(marked, shape)
    elif merge_strategy == "fixed_with_images":
        alpha = rearrange(image_only_indicator, shape)
    else:
        raise NotImplementedError(
            f"merge_strategy={merge_strategy!r} is unknown; choose fixed, learned, learned_with_images or fixed_with_images"
        )
    return alpha.sigmoid() if apply_sigmoid else alpha
