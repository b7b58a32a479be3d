"""First-stage networks; implemented in `taming.modules.diffusionmodules` and `ldm.modules.diffusionmodules.model`, importable here."""

from ldm.modules.attention import LinearAttention, MemoryEfficientCrossAttention
from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    LinAttnBlock,
    MemoryEfficientAttnBlock,
    MemoryEfficientCrossAttentionWrapper,
    Model,
    Normalize,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
    nonlinearity,
)

__all__ = [
    "AttnBlock", "Decoder", "Downsample", "Encoder", "LinAttnBlock", "LinearAttention", "MemoryEfficientAttnBlock",
    "MemoryEfficientCrossAttention", "MemoryEfficientCrossAttentionWrapper", "Model", "Normalize", "ResnetBlock", "Upsample",
    "get_timestep_embedding", "make_attn", "nonlinearity",
]  # fmt: skip
