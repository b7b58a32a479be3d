"""Image to image with tokens: keep an image's first codes, draw the others anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taming.models.sliding_window import sample_windows


@torch.no_grad()
def redraw(
    vqgan: Any,
    image: Tensor,
    condition: Any = None,
    strength: float = 0.8,
    transformer: Any = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    sample: bool = True,
    **options: Any,
) -> Tensor:
    """Re-draw the last `strength` share of an image's codes given the others, and decode.

    Codes are counted in the order in which the transformer reads them: row by row, so that the image's lower part
    changes, or that of its permuter. An image whose codes do not fit the transformer's block is drawn by a sliding window.

    Args:
        vqgan: the VQModel whose codes the transformer was trained on.
        image: (b, c, h, w) in [-1, 1].
        condition: as `Net2NetTransformer.generate` takes it: one for all images, or one for each.
        strength: share of the codes to draw, in [0, 1]; 0 gives the plain reconstruction.
        transformer: a Net2NetTransformer in eval mode.
        temperature, top_k, sample: see `taming.modules.transformer.sampling.Draw`.
        options: `top_p`, `guidance`, `generator`, `progress`, `compiled` of `Net2NetTransformer.sample`.

    Returns:
        Images (b, c, h, w).

    Raises:
        ValueError: strength outside [0, 1], no transformer, one for another codebook, or a shape that does not fit.
    """
    _check(vqgan, image, strength, transformer)
    quant, _, (_, _, indices) = vqgan.encode(image)
    batch, _, height, width = quant.shape
    permuter = transformer.permuter
    codes = permuter(indices.reshape(batch, -1))
    steps = round(strength * codes.shape[1])
    kept = codes.shape[1] - steps
    if steps:
        cond = transformer.condition_tokens(condition)
        if len(cond) not in (1, batch):
            raise ValueError(f"{batch} images came with {len(cond)} conditions: give one, or one for each")
        cond = cond.expand(batch, -1)
        options |= {"temperature": temperature, "top_k": top_k, "sample": sample}
        if cond.shape[1] + codes.shape[1] - 1 <= transformer.transformer.block_size:
            codes = transformer.sample(codes[:, :kept], cond, steps, **options)
        else:
            size = (batch, height, width)
            anew = (torch.arange(height * width) >= kept).reshape(height, width)
            cond = cond.reshape(size) if cond.shape == codes.shape else cond
            options.pop("compiled", None)  # windows restart too often for a compiled step to pay
            codes = sample_windows(transformer, codes.reshape(size), cond, mask=anew, **options).flatten(1)
    return vqgan.decode_code(permuter(codes, reverse=True).reshape(batch, height, width))


def _check(vqgan: Any, image: Tensor, strength: float, transformer: Any) -> None:
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength={strength} must lie between 0 (nothing is drawn) and 1 (everything)")
    if image.ndim != 4:
        raise ValueError(f"images must be (b, c, h, w) in [-1, 1], not {tuple(image.shape)}")
    if transformer is None:
        raise ValueError("re-drawing needs transformer=…, a Net2NetTransformer trained on this model's codes")
    theirs, ours = getattr(transformer.first_stage_model, "n_embed", None), getattr(vqgan, "n_embed", None)
    if theirs != ours:
        raise ValueError(
            f"the transformer was made for a codebook of {theirs} codes, this model has {ours}: they do not belong together"
        )
