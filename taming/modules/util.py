"""Activation normalisation and the stand-ins for conditioning stages that have nothing to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taming.util import count_params

__all__ = ["AbstractEncoder", "ActNorm", "Labelator", "SOSProvider", "count_params"]


class ActNorm(nn.Module):
    """A learned scale and shift per channel that starts by normalising the first training batch.

    Args:
        num_features: channels.
        logdet: `forward` also returns the log-determinant of the map, per sample.
        affine: must be True, as published.
        allow_reverse_init: let a reverse pass come first, and start from its statistics.

    Source: Kingma & Dhariwal 2018 (Glow), section 3.1.
    """

    initialized: Tensor

    def __init__(
        self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False
    ) -> None:
        if not affine:
            raise ValueError("ActNorm is an affine map; affine=False is not defined")
        super().__init__()
        self.logdet = logdet
        self.allow_reverse_init = allow_reverse_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set shift and scale so that `x`, (b, c, h, w), comes out with zero mean and unit variance per channel."""
        self.loc.copy_(-x.mean(dim=(0, 2, 3), keepdim=True))
        self.scale.copy_(1 / (x.std(dim=(0, 2, 3), keepdim=True) + 1e-6))

    def _start(self, x: Tensor) -> None:
        if self.training and self.initialized.item() == 0:
            self.initialize(x)
            self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        """(b, c, h, w) or (b, c) → the same shape, with (b,) log-determinants beside it if `logdet`."""
        if reverse:
            return self.reverse(x)
        flat = x.ndim == 2
        x = x[:, :, None, None] if flat else x
        self._start(x)
        h = self.scale * (x + self.loc)
        logdet = x.shape[2] * x.shape[3] * self.scale.abs().log().sum() * torch.ones(x.shape[0]).to(x)
        h = h.flatten(1) if flat else h
        return (h, logdet) if self.logdet else h

    def reverse(self, output: Tensor) -> Tensor:
        """The inverse map.

        Raises:
            RuntimeError: in training before any forward pass, unless `allow_reverse_init`.
        """
        flat = output.ndim == 2
        output = output[:, :, None, None] if flat else output
        if self.training and self.initialized.item() == 0 and not self.allow_reverse_init:
            raise RuntimeError(
                "ActNorm has seen no forward pass yet; allow_reverse_init=True lets the reverse pass start it"
            )
        self._start(output)
        h = output / self.scale - self.loc
        return h.flatten(1) if flat else h


class AbstractEncoder(nn.Module):
    """A conditioning stage: something with `encode`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The encoded condition."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode")


class Labelator(AbstractEncoder):
    """Class labels as a one-token condition.

    Args:
        n_classes: number of classes.
        quantize_interface: answer as a quantiser does, `(code, None, [None, None, indices])`.
    """

    def __init__(self, n_classes: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.quantize_interface = quantize_interface

    def encode(self, c: Tensor) -> Any:
        """(b,) labels → (b, 1)."""
        c = c[:, None]
        return (c, None, [None, None, c.long()]) if self.quantize_interface else c


class SOSProvider(AbstractEncoder):
    """A start-of-sequence token for unconditional training.

    Args:
        sos_token: the token.
        quantize_interface: answer as a quantiser does, `(code, None, [None, None, indices])`.
    """

    def __init__(self, sos_token: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.sos_token = sos_token
        self.quantize_interface = quantize_interface

    def encode(self, x: Tensor) -> Any:
        """Anything with a batch axis b → (b, 1) tokens."""
        c = torch.full((x.shape[0], 1), self.sos_token, dtype=torch.long, device=x.device)
        return (c, None, [None, None, c]) if self.quantize_interface else c
