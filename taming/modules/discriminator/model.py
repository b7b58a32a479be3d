"""The patch discriminator of the adversarially trained first stages."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from taming.modules.util import ActNorm


def weights_init(m: Any) -> None:
    """Initialisation for `apply`: convolutions N(0, 0.02), batch norms N(1, 0.02) with zero shift."""
    name = type(m).__name__
    if "Conv" in name:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class NLayerDiscriminator(nn.Module):
    """PatchGAN: a map of logits, each about one patch of the image (70 pixels wide for three layers).

    Args:
        input_nc: channels of the image (with those of the condition, if there is one).
        ndf: width of the first layer.
        n_layers: layers of stride 2.
        use_actnorm: normalise with `ActNorm` instead of batch normalisation.

    Source: Isola et al. 2017, section 3.2.2.
    """

    def __init__(
        self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        conv = partial(nn.Conv2d, kernel_size=4, padding=1)
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [conv(input_nc, ndf, stride=2), nn.LeakyReLU(0.2, True)]
        for i in range(1, n_layers + 1):
            # batch normalisation has a shift of its own, which would make the convolution's bias redundant
            layers += [
                conv(widths[i - 1], widths[i], stride=2 if i < n_layers else 1, bias=use_actnorm),
                norm(widths[i]),
                nn.LeakyReLU(0.2, True),
            ]
        self.main = nn.Sequential(*layers, conv(widths[-1], 1, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, input_nc, h, w) → logits (b, 1, h', w'), higher for real images."""
        return self.main(x)
