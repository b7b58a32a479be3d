"""DPT, the dense prediction transformer, and its depth network."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.midas.midas.base_model import BaseModel
from ldm.modules.midas.midas.blocks import Interpolate, make_scratch
from ldm.modules.midas.midas.vit import ViTBackbone


class DPT(BaseModel):
    """A vision transformer with a convolutional decoder and a head for the task.

    Args:
        head: features (b, features, h / 2, w / 2) → the prediction.
        features: width of the decoder.
        backbone: a key of `ldm.modules.midas.midas.vit.BACKBONES`.
        readout: what becomes of the class token: "ignore", "add" or "project".
        channels_last: compute with channels as the fastest axis.
        use_bn: normalise in the decoder.

    Source: Ranftl et al. 2021, "Vision Transformers for Dense Prediction", section 3.
    """

    def __init__(
        self,
        head: nn.Module,
        features: int = 256,
        backbone: str = "vitb_rn50_384",
        readout: str = "project",
        channels_last: bool = False,
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.pretrained = ViTBackbone(backbone, readout)
        self.scratch: Any = make_scratch(self.pretrained.spec.widths, features, use_bn)
        self.scratch.output_conv = head

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w), sides multiples of 32 → what the head makes of it."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        maps = self.pretrained(x)
        path = None
        for level in (4, 3, 2, 1):
            features = getattr(self.scratch, f"layer{level}_rn")(maps[level - 1])
            fuse = getattr(self.scratch, f"refinenet{level}")
            path = fuse(features) if path is None else fuse(path, features)
        return self.scratch.output_conv(path)


class DPTDepthModel(DPT):
    """Inverse depth, up to an unknown scale and shift: large is near.

    Args:
        path: file of weights; None leaves them random.
        non_negative: cut the output at zero.
        features: width of the decoder.
        **kwargs: of `DPT`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        non_negative: bool = True,
        features: int = 256,
        **kwargs: Any,
    ) -> None:
        head = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            Interpolate(2, "bilinear", align_corners=True),
            nn.Conv2d(features // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU() if non_negative else nn.Identity(),
        )
        super().__init__(head, features, **kwargs)
        if path is not None:
            self.load(path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w), sides multiples of 32 → (b, h, w)."""
        return super().forward(x).squeeze(dim=1)
