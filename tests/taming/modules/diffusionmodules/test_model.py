import pytest
import torch
from torch import nn

from taming.modules.diffusionmodules.blocks import (
    AttnBlock,
    Downsample,
    Normalize,
    Upsample,
    get_timestep_embedding,
    make_attn,
)
from taming.modules.diffusionmodules.model import Decoder, Encoder, Model, VUNet

OPTIONS = {
    "ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "in_channels": 3, "resolution": 16,
    "z_channels": 4,
}  # fmt: skip


def test_encoder_and_decoder_are_each_others_sizes_for_any_divisible_image():
    encoder, decoder = Encoder(**OPTIONS), Decoder(**OPTIONS)
    for height, width in ((16, 16), (20, 8)):
        moments = encoder(torch.randn(2, 3, height, width))
        assert moments.shape == (2, 8, height // 4, width // 4)
        assert decoder(moments[:, :4]).shape == (2, 3, height, width)
    assert decoder.z_shape == (1, 4, 4, 4)
    assert tuple(decoder.last_z_shape) == (2, 4, 5, 2)


def test_levels_attend_by_the_resolution_they_were_built_for_and_the_middle_always():
    encoder = Encoder(**OPTIONS)
    assert [len(level.attn) for level in encoder.down] == [0, 1, 0]
    assert isinstance(encoder.mid.attn_1, AttnBlock)
    assert isinstance(Encoder(**OPTIONS, attn_type="none").mid.attn_1, nn.Identity)


def test_downsampling_pads_right_and_bottom_only():
    layer = Downsample(1, with_conv=True)
    nn.init.zeros_(layer.conv.bias)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 0, 0] = 1.0  # picks the upper left pixel of each window
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]  # no row or column of zeros before the image
    assert Upsample(1, with_conv=False)(x)[0, 0, :2, :4].tolist() == [[0, 0, 1, 1]] * 2


def test_the_time_embedding_is_sines_then_cosines_with_frequencies_down_to_1_over_10000():
    code = get_timestep_embedding(torch.tensor([0, 3]), 7)
    assert code.shape == (2, 7) and torch.all(code[:, 6] == 0)
    frequencies = torch.tensor([1.0, 10000**-0.5, 1e-4])
    assert torch.allclose(code[1, :3], torch.sin(3 * frequencies)) and torch.allclose(
        code[1, 3:6], torch.cos(3 * frequencies)
    )
    with pytest.raises(ValueError, match="one axis"):
        get_timestep_embedding(torch.zeros(2, 2), 8)


def test_misspelt_options_are_warned_about_and_the_other_networks_options_are_not():
    with pytest.warns(UserWarning, match="'atn_resolutions' is unknown.*Did you mean 'attn_resolutions'"):
        Encoder(**OPTIONS, atn_resolutions=[4])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder(**OPTIONS, tanh_out=True, give_pre_end=True)
        Decoder(**OPTIONS, double_z=True)


def test_widths_that_do_not_divide_into_groups_say_so():
    with pytest.raises(ValueError, match="multiple of 32 channels, not 40"):
        Normalize(40)
    with pytest.raises(AssertionError, match="Did you mean 'linear'"):
        make_attn(32, attn_type="linaer")


def test_tanh_out_bounds_the_image_and_give_pre_end_stops_before_the_last_norm():
    z = 100 * torch.randn(1, 4, 4, 4)
    assert Decoder(**OPTIONS, tanh_out=True)(z).abs().max() <= 1
    assert Decoder(**OPTIONS, give_pre_end=True)(z).shape == (1, 32, 16, 16)


def test_the_unet_needs_its_time_and_joins_a_context_to_the_channels():
    options = {k: v for k, v in OPTIONS.items() if k != "z_channels"}
    model = Model(**{**options, "in_channels": 5})
    x, context = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 16, 16)
    assert model(x, torch.tensor([3]), context=context).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="needs t"):
        model(x, context=context)


def test_a_vunets_latent_reaches_its_output():
    model = VUNet(**OPTIONS, c_channels=1)
    x = torch.randn(1, 1, 16, 16)
    one, other = (model(x, torch.randn(1, 4, 4, 4)) for _ in range(2))
    assert one.shape == (1, 3, 16, 16) and not torch.allclose(one, other)


def test_the_autoencoder_equals_diffusers_class_with_the_same_weights():
    """An independent implementation: diffusers' Encoder, weights copied in order of use."""
    from diffusers.models.autoencoders.vae import Encoder as PeerEncoder

    ours = Encoder(
        ch=32,
        out_ch=3,
        ch_mult=(1, 2),
        num_res_blocks=2,
        attn_resolutions=[],
        in_channels=3,
        resolution=16,
        z_channels=4,
    ).eval()
    peer = PeerEncoder(
        in_channels=3, out_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=2,
        norm_num_groups=32, double_z=True,
    ).eval()  # fmt: skip
    renames = {
        "down.": "down_blocks.", ".block.": ".resnets.", ".downsample.": ".downsamplers.0.", "nin_shortcut": "conv_shortcut",
        "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "mid.attn_1": "mid_block.attentions.0",
        "norm_out": "conv_norm_out", ".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", "proj_out": "to_out.0",
    }  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    peer.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 16, 24)
    assert torch.allclose(ours(x), peer(x), atol=1e-4)
