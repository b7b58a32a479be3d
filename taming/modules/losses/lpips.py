"""LPIPS, the learned perceptual distance between images (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taming.checkpoint import load_state_dict
from taming.util import CKPT_MAP, MD5_MAP, get_ckpt_path, md5_hash, nearest

logger = logging.getLogger(__name__)

# the published training code kept the heads here, relative to the working directory
HEADS_FOLDER = "taming/modules/autoencoder/lpips"
VGG_PATH_VARIABLE = "TAMING_VGG16"

VggOutputs = namedtuple("VggOutputs", ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"])


class LPIPS(nn.Module):
    """Distance between two images: weighted squared differences of unit-length VGG-16 features at five depths.

    The network is frozen and always in eval mode, so that the distance has no dropout noise even while the model
    around it trains. Gradients reach both images. Where the weights cannot be had (offline), the network can still
    be built and filled from a checkpoint that holds them, as published VQGANs do; using it empty is an error.

    Args:
        use_dropout: a dropout layer stands before each linear head; it only shows in the weights' names.

    Source: Zhang et al. 2018, equation 1; version 0.1 of the linear heads.
    """

    def __init__(self, use_dropout: bool = True) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.chns = [64, 128, 256, 512, 512]
        for i, width in enumerate(self.chns):
            setattr(self, f"lin{i}", NetLinLayer(width, use_dropout=use_dropout))
        self._unavailable: OSError | None = None
        on_meta = self.scaling_layer.shift.is_meta  # only names and shapes are wanted there
        try:
            self.net = vgg16(pretrained=not on_meta, requires_grad=False)
            if not on_meta:
                self.load_from_pretrained()
        except OSError as error:
            logger.warning("%s", error)
            self._unavailable = error
            self.net = vgg16(pretrained=False, requires_grad=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode: the distance is a yardstick, not a part that learns."""
        return super().train(False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}net.slice1.0.weight" in state_dict and any(
            k.startswith(f"{prefix}lin0.") for k in state_dict
        ):
            self._unavailable = None  # the checkpoint brought the weights along

    def load_from_pretrained(self, name: str = "vgg_lpips") -> None:
        """Load the linear heads: from the published folder if it is there, else from the `lpips` distribution, else by download."""
        weights = load_state_dict(_heads_path(name))
        self.load_state_dict(weights, strict=False)
        logger.info("loaded the linear heads of LPIPS")

    @classmethod
    def from_pretrained(cls, name: str = "vgg_lpips") -> LPIPS:
        """An LPIPS network with pretrained heads.

        Raises:
            NotImplementedError: any name but "vgg_lpips".
        """
        if name != "vgg_lpips":
            raise NotImplementedError(f"no pretrained LPIPS called {name!r}. {nearest(name, CKPT_MAP)}")
        return cls()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two batches (b, 3, h, w) in [-1, 1] → distances (b, 1, 1, 1).

        Raises:
            OSError: the weights of VGG-16 were neither cached nor downloadable, and no checkpoint brought them; the
                message says what to put where.
        """
        if self._unavailable is not None:
            raise OSError(str(self._unavailable))
        ours, theirs = (self.net(self.scaling_layer(image)) for image in (input, target))
        distance: Any = 0
        for i, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            difference = (normalize_tensor(one) - normalize_tensor(two)) ** 2
            distance = distance + spatial_average(getattr(self, f"lin{i}").model(difference))
        return distance


class WithoutLPIPS(nn.Module):
    """In the place of LPIPS where its weight is 0: has no weights, and takes none of a checkpoint that holds them."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass  # names below this module's are neither missing nor left over

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """No distance.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "perceptual_weight was 0 when this loss was built, so it has no LPIPS; build it with another weight"
        )


class ScalingLayer(nn.Module):
    """From [-1, 1] to the statistics VGG-16 was trained with."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, inp: Tensor) -> Tensor:
        """(b, 3, h, w) → (b, 3, h, w)."""
        return (inp - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """A 1×1 convolution without bias, behind dropout."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*layers, nn.Conv2d(chn_in, chn_out, 1, bias=False))


class vgg16(nn.Module):
    """The five convolutional stages of VGG-16, with ImageNet weights.

    Args:
        requires_grad: let the weights train.
        pretrained: load torchvision's weights; the environment variable TAMING_VGG16 may name a local file.
    """

    def __init__(self, requires_grad: bool = False, pretrained: bool = True) -> None:
        super().__init__()
        features = _vgg_features(pretrained)
        for i, (start, end) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)], start=1):
            stage = nn.Sequential()
            for layer in range(start, end):
                stage.add_module(str(layer), features[layer])
            setattr(self, f"slice{i}", stage)
        if not requires_grad:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> VggOutputs:
        """(b, 3, h, w) → the activations that end each stage."""
        outputs = []
        for i in range(1, 6):
            x = getattr(self, f"slice{i}")(x)
            outputs.append(x)
        return VggOutputs(*outputs)


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Unit length over the channels; `eps` is added to the norm, not under the root."""
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + eps)


def spatial_average(x: Tensor, keepdim: bool = True) -> Tensor:
    """Mean over height and width."""
    return x.mean(dim=(2, 3), keepdim=keepdim)


def _heads_path(name: str) -> Path | str:
    """Where the linear heads are: 7 kB, the same file in all three places (its md5 is checked)."""
    published = Path(HEADS_FOLDER) / CKPT_MAP[name]
    if published.is_file():
        return published
    spec = importlib.util.find_spec("lpips")  # not imported: only its data file is wanted
    if spec is not None and spec.submodule_search_locations:
        shipped = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
        if shipped.is_file() and md5_hash(shipped) == MD5_MAP[name]:
            return shipped
    return get_ckpt_path(name, HEADS_FOLDER)


def _vgg_features(pretrained: bool) -> nn.Sequential:
    """The convolutional part of torchvision's VGG-16; its classifier, nine tenths of the weights, is never made."""
    import torchvision

    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None, init_weights=False).features
    if not pretrained:
        device = torch.get_default_device()
        features = features.to_empty(device=device)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        return features
    features = features.to_empty(device="cpu")
    features.load_state_dict(
        {k.removeprefix("features."): v for k, v in _vgg_weights().items() if k.startswith("features.")},
        strict=False,
    )
    return features


def _vgg_weights() -> dict[str, Tensor]:
    import torchvision

    if local := os.environ.get(VGG_PATH_VARIABLE):
        return load_state_dict(local)
    url = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        raise OSError(
            f"LPIPS needs the ImageNet weights of VGG-16, and they could not be downloaded ({error}). Fetch {url} elsewhere and put it "
            f"at {cache}, or name a local copy in the environment variable {VGG_PATH_VARIABLE}."
        ) from error
