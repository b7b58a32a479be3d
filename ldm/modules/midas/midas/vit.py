"""Vision transformers as encoders of DPT: tokens of four depths become feature maps of four resolutions.

The transformers are timm's; only what goes in and what is taken out is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneSpec:
    """A transformer, and where its feature maps are taken.

    Args:
        name: timm's.
        width: of its tokens.
        blocks: numbers of the blocks after which tokens are taken.
        widths: of the four feature maps; where `blocks` are only two, the first two maps are those of the
            convolutional stages below the transformer.
    """

    name: str
    width: int
    blocks: tuple[int, ...]
    widths: tuple[int, int, int, int]


# Source: Ranftl et al. 2021, section 3 and table 5
BACKBONES = {
    "vitl16_384": BackboneSpec("vit_large_patch16_384", 1024, (5, 11, 17, 23), (256, 512, 1024, 1024)),
    "vitb16_384": BackboneSpec("vit_base_patch16_384", 768, (2, 5, 8, 11), (96, 192, 384, 768)),
    "vitb_rn50_384": BackboneSpec("vit_base_r50_s16_384", 768, (8, 11), (256, 512, 768, 768)),
}
PATCH = 16


class Slice(nn.Module):
    """The readout "ignore": tokens of the patches, without the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1 + n, d) → (b, n, d)."""
        return x[:, 1:]


class AddReadout(Slice):
    """The readout "add": the class token is added to each."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1 + n, d) → (b, n, d)."""
        return x[:, 1:] + x[:, :1]


class ProjectReadout(Slice):
    """The readout "project": the class token is concatenated to each, and both are projected to the old width."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1 + n, d) → (b, n, d)."""
        tokens = x[:, 1:]
        return self.project(torch.cat([tokens, x[:, :1].expand_as(tokens)], dim=-1))


READOUTS = {"ignore": Slice, "add": AddReadout, "project": ProjectReadout}


def _resample(level: int, width: int) -> nn.Module | None:
    """From 1/16 of the picture's size to 1/4, 1/8, 1/16 and 1/32."""
    if level < 2:
        factor = 4 // 2**level
        return nn.ConvTranspose2d(width, width, factor, stride=factor)
    return nn.Conv2d(width, width, 3, stride=2, padding=1) if level == 3 else None


class Reassemble(nn.Module):
    """Tokens to a feature map. The children's names are those of the published weights (1 and 2 had none).

    Source: Ranftl et al. 2021, section 3, "Reassemble".
    """

    def __init__(self, level: int, width_in: int, width_out: int, readout: str) -> None:
        super().__init__()
        self.add_module("0", READOUTS[readout](width_in))
        self.add_module("3", nn.Conv2d(width_in, width_out, 1))
        if (resample := _resample(level, width_out)) is not None:
            self.add_module("4", resample)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, 1 + h·w, d) of a grid (h, w) → (b, c, h', w')."""
        read, *layers = self.children()
        x = rearrange(read(tokens), "b (h w) d -> b d h w", h=grid[0])
        for layer in layers:
            x = layer(x)
        return x


class ViTBackbone(nn.Module):
    """A picture to four feature maps, at 1/4, 1/8, 1/16 and 1/32 of its size.

    Args:
        backbone: a key of `BACKBONES`.
        readout: a key of `READOUTS`: what becomes of the class token.
        use_pretrained: let timm fetch weights of ImageNet.
    """

    def __init__(self, backbone: str, readout: str = "project", use_pretrained: bool = False) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone={backbone!r} is unknown; choose one of {sorted(BACKBONES)}")
        if readout not in READOUTS:
            raise ValueError(f"readout={readout!r} is unknown; choose one of {sorted(READOUTS)}")
        try:
            import timm
        except ImportError as error:
            raise ImportError("depth networks need timm: python -m pip install timm") from error
        self.spec = spec = BACKBONES[backbone]
        self.model: Any = timm.create_model(spec.name, pretrained=use_pretrained)
        self.stages = 4 - len(spec.blocks)
        for level in range(self.stages, 4):
            reassemble = Reassemble(level, spec.width, spec.widths[level], readout)
            self.add_module(f"act_postprocess{level + 1}", reassemble)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings, those of the patches scaled to another grid (bilinear), (1, 1 + h·w, d)."""
        cls, patches = self.model.pos_embed[:, :1], self.model.pos_embed[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        patches = rearrange(patches, "b (h w) d -> b d h w", h=side)
        patches = F.interpolate(patches, size=grid, mode="bilinear")
        return torch.cat([cls, rearrange(patches, "b d h w -> b (h w) d")], dim=1)

    def patches(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(b, 3, h, w) → patches (b, d, h / 16, w / 16), and the maps of the convolutional stages, if it has some."""
        embed, maps = self.model.patch_embed, []
        if self.stages:
            x = embed.backbone.stem(x)
            for stage in embed.backbone.stages:
                x = stage(x)
                maps.append(x)
            x = embed.backbone.norm(x)
        return embed.proj(x), maps[: self.stages]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, 3, h, w), sides multiples of 32 → four maps (b, widths[i], h / 2^(i+2), w / 2^(i+2))."""
        height, width = x.shape[-2:]
        if height % (2 * PATCH) or width % (2 * PATCH):
            raise ValueError(
                f"depth networks take sides that are multiples of {2 * PATCH}, not {width} x {height}; "
                "ldm.modules.midas.api.load_midas_transform makes such pictures"
            )
        grid = (height // PATCH, width // PATCH)
        patches, maps = self.patches(x)
        tokens = rearrange(patches, "b d h w -> b (h w) d")
        cls = self.model.cls_token.expand(len(x), -1, -1)
        tokens = torch.cat([cls, tokens], dim=1) + self.positions(grid)
        for number, block in enumerate(self.model.blocks[: self.spec.blocks[-1] + 1]):
            tokens = block(tokens)
            if number in self.spec.blocks:
                maps.append(getattr(self, f"act_postprocess{len(maps) + 1}")(tokens, grid))
        return maps
