import pytest
import torch
from torch import nn

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Encoder,
    FirstStagePostProcessor,
    LatentRescaler,
    MemoryEfficientCrossAttentionWrapper,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
    Resize,
    Upsampler,
    make_attn,
)


def test_a_rescaler_rounds_the_new_sides():
    rescaler = LatentRescaler(factor=1.5, in_channels=4, mid_channels=32, out_channels=5, depth=1)
    assert rescaler(torch.randn(2, 4, 6, 5)).shape == (2, 5, 9, 8)
    assert isinstance(rescaler.attn, AttnBlock) and rescaler.conv_out.kernel_size == (1, 1)


def test_merged_rescalers_go_to_any_latent_size_and_back():
    options = {"resolution": 16, "num_res_blocks": 1, "attn_resolutions": [], "ch": 32, "ch_mult": (1, 1)}
    encoder = MergedRescaleEncoder(in_channels=3, out_ch=32, rescale_factor=0.75, **options)
    decoder = MergedRescaleDecoder(z_channels=32, out_ch=3, rescale_factor=4 / 3, **options)
    code = encoder(torch.randn(1, 3, 16, 16))
    assert code.shape == (1, 32, 6, 6)
    assert decoder(code).shape == (1, 3, 16, 16)


def test_an_upsampler_doubles_as_often_as_the_sizes_say():
    assert Upsampler(in_size=4, out_size=16, in_channels=32, out_channels=3)(torch.randn(1, 32, 4, 4)).shape == (1, 3, 16, 16)  # fmt: skip
    with pytest.raises(AssertionError, match="out_size=2"):
        Upsampler(in_size=4, out_size=2, in_channels=32, out_channels=3)


def test_resize_keeps_the_tensor_itself_at_factor_one_and_knows_modes_without_corners():
    x = torch.randn(1, 2, 4, 4)
    assert Resize()(x) is x
    assert torch.equal(Resize(mode="nearest")(x, scale_factor=2)[..., ::2, ::2], x)
    with pytest.raises(NotImplementedError, match="learned=False"):
        Resize(learned=True)


class Codes(nn.Module):
    """A first stage whose latents are its images, halved."""

    def encode(self, x):
        return nn.functional.avg_pool2d(x, 2)


def test_a_post_processor_halves_once_a_level_and_never_trains_the_first_stage():
    net = FirstStagePostProcessor(ch_mult=[1, 2], in_channels=4, pretrained_model=Codes(), n_channels=32)
    assert net(torch.randn(1, 4, 32, 32)).shape == (1, 64, 4, 4)
    net.train()
    assert not net.pretrained_model.training
    with pytest.raises(AssertionError, match="pretrained_config"):
        FirstStagePostProcessor(ch_mult=[1], in_channels=4)


def test_attention_in_images_adds_to_the_image():
    layer = MemoryEfficientCrossAttentionWrapper(8, heads=2, dim_head=4)
    nn.init.zeros_(layer.to_out[0].weight)
    nn.init.zeros_(layer.to_out[0].bias)
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(layer(x), x)


def test_the_cross_attention_of_a_configuration_is_built_by_its_name():
    options = {"heads": 2, "dim_head": 16, "context_dim": 6}
    layer = make_attn(32, "memory-efficient-cross-attn", options)
    x, context = torch.randn(2, 32, 4, 3), torch.randn(2, 5, 6)
    tokens = CrossAttention.forward(layer, x.flatten(2).transpose(1, 2), context)
    assert torch.allclose(layer(x, context), x + tokens.transpose(1, 2).reshape(x.shape))
    encoder = Encoder(
        ch=32, out_ch=3, ch_mult=(1,), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=8, z_channels=4,
        attn_type="memory-efficient-cross-attn",
    )  # fmt: skip
    assert (
        encoder(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8, 8)
        and "mid.attn_1.to_q.weight" in encoder.state_dict()
    )
