import pytest
import torch
from torch import nn

from sgm.modules.diffusionmodules import model
from taming.modules.diffusionmodules.model import Decoder as Home

SMALL = {
    "ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "in_channels": 3, "resolution": 16,
    "z_channels": 4,
}  # fmt: skip


def test_the_first_stage_networks_are_those_of_the_first_chapter():
    assert model.Decoder is Home
    assert all(hasattr(model, name) for name in model.__all__)


def test_a_decoder_hands_conditions_to_every_block_and_to_its_last_layer():
    """So a video decoder changes factories, not the loop."""
    seen = []

    class Layer(nn.Conv2d):
        def forward(self, x, *temb, frames=None):
            seen.append(frames)
            return super().forward(x)

    class Video(model.Decoder):
        def make_res_block(self, in_channels, out_channels):
            return Layer(in_channels, out_channels, 1)

        def make_attention(self, channels):
            return Layer(channels, channels, 1)

        def make_conv_out(self, channels, out_channels):
            return Layer(channels, out_channels, 1)

    decoder = Video(**SMALL)
    assert decoder(torch.randn(1, 4, 8, 8), frames=5).shape == (1, 3, 16, 16)
    layers = sum(isinstance(m, Layer) for m in decoder.modules())
    assert seen == [5] * layers
    assert decoder.get_last_layer() is decoder.conv_out.weight


def test_conditions_without_a_block_that_wants_them_are_an_error():
    with pytest.raises(TypeError, match="frames"):
        model.Decoder(**SMALL)(torch.randn(1, 4, 8, 8), frames=5)
