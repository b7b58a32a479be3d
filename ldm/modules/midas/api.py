"""Monocular depth for depth-to-image models: the published networks and their transforms.

Source: Ranftl et al. 2020, "Towards Robust Monocular Depth Estimation" (MiDaS); Ranftl et al. 2021 (DPT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Compose

from ldm.modules.midas.midas.dpt_depth import DPTDepthModel
from ldm.modules.midas.midas.transforms import NormalizeImage, PrepareForNet, Resize
from taming.util import disabled_train, download

__all__ = [
    "ISL_PATHS",
    "MODEL_TYPES_ISL",
    "MiDaSInference",
    "disabled_train",
    "load_midas_transform",
    "load_model",
]

# files below the working directory
ISL_PATHS = {
    "dpt_large": "midas_models/dpt_large-midas-2f21e586.pt",
    "dpt_hybrid": "midas_models/dpt_hybrid-midas-501f0c75.pt",
}
URLS = {name: f"https://github.com/isl-org/DPT/releases/download/1_0/{Path(path).name}" for name, path in ISL_PATHS.items()}  # fmt: skip
BACKBONES = {"dpt_large": "vitl16_384", "dpt_hybrid": "vitb_rn50_384"}
MODEL_TYPES_ISL = list(BACKBONES)

HALVES: tuple[list[float], list[float]] = ([0.5] * 3, [0.5] * 3)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# side of the network's pictures, how sides are chosen, mean and deviation of the colours
TRANSFORMS: dict[str, tuple[int, str, tuple[list[float], list[float]]]] = {
    "dpt_large": (384, "minimal", HALVES),
    "dpt_hybrid": (384, "minimal", HALVES),
    "midas_v21": (384, "upper_bound", IMAGENET),
    "midas_v21_small": (256, "upper_bound", IMAGENET),
}


def _check(model_type: str, known: Mapping[str, Any]) -> None:
    if model_type not in known:
        why = "has a transform here, but no network" if model_type in TRANSFORMS else "is unknown"
        raise AssertionError(f"model_type={model_type!r} {why}; choose one of {list(known)}")


def load_midas_transform(model_type: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns `{"image": (h, w, 3) in [0, 1]}` into `{"image": (3, h', w') float32}`, sides multiples of 32.

    Raises:
        AssertionError: an unknown type (the published error class).
    """
    _check(model_type, TRANSFORMS)
    side, method, (mean, std) = TRANSFORMS[model_type]
    scale = Resize(
        side,
        side,
        resize_target=False,
        keep_aspect_ratio=True,
        ensure_multiple_of=32,
        resize_method=method,
        image_interpolation_method="bicubic",
    )
    return Compose([scale, NormalizeImage(mean, std), PrepareForNet()])


def build(model_type: str) -> DPTDepthModel:
    """A depth network in eval mode, its weights random."""
    _check(model_type, BACKBONES)
    return DPTDepthModel(path=None, backbone=BACKBONES[model_type], non_negative=True).eval()


def weights_of(model_type: str) -> str:
    """Path of a network's published weights, fetched where they are absent.

    Raises:
        OSError: they cannot be fetched; the message says where to put them.
    """
    _check(model_type, BACKBONES)
    path = Path(ISL_PATHS[model_type])
    if not path.is_file():
        download(URLS[model_type], path)
    return str(path)


def load_model(model_type: str) -> tuple[DPTDepthModel, Callable[[dict[str, Any]], dict[str, Any]]]:
    """A depth network with its published weights, in eval mode, and its transform.

    Raises:
        AssertionError: an unknown type, or one of MiDaS 2.1's convolutional networks, which no published model uses.
        OSError: the weights are neither there nor can they be fetched.
    """
    model = build(model_type)
    model.load(weights_of(model_type))
    return model, load_midas_transform(model_type)


class MiDaSInference(nn.Module):
    """A frozen depth network inside another model; always in eval mode.

    Weights may come from the surrounding model's checkpoint. Where they did not, they are read from `ISL_PATHS`, and
    fetched if absent there, when the first depth is asked for.

    Args:
        model_type: a key of `ISL_PATHS`.

    Raises:
        AssertionError: an unknown type (the published error class).
    """

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.model_type = model_type
        self.model = build(model_type)
        self.model.train = disabled_train.__get__(self.model)  # type: ignore[method-assign]
        self.has_weights = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Notice that a checkpoint brought the weights."""
        self.has_weights |= all(prefix + name in state_dict for name in self.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) as `load_midas_transform` makes them → inverse depth (b, 1, h, w).

        Raises:
            OSError: the network has no weights, and they cannot be fetched.
        """
        if not self.has_weights:
            self.model.load(weights_of(self.model_type))
            self.has_weights = True
        depth = self.model(x)[:, None]
        if depth.shape[2:] != x.shape[2:]:
            depth = F.interpolate(depth, size=x.shape[2:], mode="bicubic", align_corners=False)
        return depth
