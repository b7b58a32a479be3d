"""First-stage networks; implemented in `taming.modules.diffusionmodules`, importable here for existing code."""

from taming.modules.diffusionmodules.blocks import (
    AttnBlock,
    Downsample,
    LinAttnBlock,
    Normalize,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
    nonlinearity,
)
from taming.modules.diffusionmodules.model import Decoder, Encoder, Model, SimpleDecoder, UpsampleDecoder

MemoryEfficientAttnBlock = AttnBlock  # the name of an old back-end; the layer is the same

__all__ = [
    "AttnBlock", "Decoder", "Downsample", "Encoder", "LinAttnBlock", "MemoryEfficientAttnBlock", "Model", "Normalize", "ResnetBlock",
    "SimpleDecoder", "Upsample", "UpsampleDecoder", "get_timestep_embedding", "make_attn", "nonlinearity",
]  # fmt: skip
