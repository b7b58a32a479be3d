import pytest
import torch

from ldm.conversion import autoencoder_table
from sgm.modules.autoencoding.temporal_ae import (
    AE3DConv,
    VideoBlock,
    VideoDecoder,
    VideoResBlock,
    make_time_attn,
)
from sgm.modules.diffusionmodules.model import Decoder, Encoder

LAYERS = {
    "ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "resolution": 16,
    "z_channels": 4,
}  # fmt: skip


def shaken(module):
    """Random numbers in every weight: published initialisations hide the paths over frames behind zeros."""
    for p in module.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return module.eval()


@pytest.mark.parametrize("mode", VideoDecoder.available_time_modes)
@torch.no_grad()
def test_every_time_mode_lets_frames_see_each_other_unless_video_is_skipped(mode):
    decoder = shaken(VideoDecoder(**LAYERS, time_mode=mode))
    z = torch.randn(4, 4, 8, 8)
    other = z.clone()
    other[3] += 1.0
    with_frames = (decoder(z, timesteps=4) - decoder(other, timesteps=4)).abs().amax(dim=(1, 2, 3))
    alone = (decoder(z, timesteps=4, skip_video=True) - decoder(other, timesteps=4, skip_video=True)).abs()
    assert with_frames[2] > 1e-6
    assert alone[:3].max() == 0 and alone[3].max() > 1e-4


@torch.no_grad()
def test_without_video_the_decoder_is_the_image_decoder_of_the_same_weights():
    video, image = shaken(VideoDecoder(**LAYERS)), Decoder(**LAYERS).eval()
    image.load_state_dict({k: v for k, v in video.state_dict().items() if k in image.state_dict()})
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(video(z, timesteps=2, skip_video=True), image(z))


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other_so_that_chunks_of_whole_clips_decode_alike():
    decoder = shaken(VideoDecoder(**LAYERS, time_mode="all"))
    z = torch.randn(6, 4, 8, 8)
    chunks = torch.cat([decoder(part, timesteps=3) for part in z.split(3)])
    torch.testing.assert_close(decoder(z, timesteps=3), chunks, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_layer_is_that_over_frames_where_there_is_one():
    decoder = VideoDecoder(**LAYERS, video_kernel_size=[3, 1, 1])
    assert decoder.get_last_layer() is decoder.conv_out.time_mix_conv.weight
    assert decoder.get_last_layer(skip_time_mix=True) is decoder.conv_out.weight
    spatial = VideoDecoder(**LAYERS, time_mode="attn-only")
    assert spatial.get_last_layer() is spatial.conv_out.weight


@pytest.mark.parametrize(("share", "temporal"), [(1.0, True), (0.0, False)])
@torch.no_grad()
def test_a_residual_block_takes_alpha_of_the_frames_and_an_attention_alpha_of_the_pixels(share, temporal):
    x = torch.randn(4, 32, 4, 4)
    block = shaken(VideoResBlock(32, in_channels=32, temb_channels=0, alpha=share, merge_strategy="fixed"))
    assert torch.equal(block(x, None, timesteps=4), block(x, None, skip_video=True)) != temporal
    attend = shaken(VideoBlock(32, alpha=share, merge_strategy="fixed"))
    same = torch.allclose(attend(x, timesteps=4), attend(x, skip_video=True), atol=1e-6)
    assert same == temporal


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: VideoDecoder(**LAYERS, time_mode="only-last-conv"), AssertionError, "conv-only"),
        (lambda: VideoDecoder(**LAYERS, merge_strategy="learnt"), ValueError, "'fixed' or 'learned'"),
        (lambda: make_time_attn(32, "linear"), AssertionError, "over frames"),
        (lambda: AE3DConv(3, 3, kernel_size=1)(torch.zeros(4, 3, 2, 2)), ValueError, "number of frames"),
        (
            lambda: AE3DConv(3, 3, kernel_size=1)(torch.zeros(4, 3, 2, 2), timesteps=3),
            ValueError,
            "clips of 3",
        ),
    ],
)
def test_bad_options_and_clips_are_refused(build, error, says):
    with pytest.raises(error, match=says):
        build()


@torch.no_grad()
def test_it_equals_the_temporal_decoder_of_diffusers():
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder

    ours = shaken(VideoDecoder(**{**LAYERS, "num_res_blocks": 2}, video_kernel_size=[3, 1, 1]))
    theirs = TemporalDecoder(
        in_channels=4, out_channels=3, block_out_channels=(32, 64), layers_per_block=2
    ).eval()
    first_stage = torch.nn.ModuleDict({"encoder": Encoder(**LAYERS, double_z=True), "decoder": ours})
    converted = autoencoder_table(first_stage).to_diffusers(first_stage.state_dict())
    decoder = {k: v for k, v in converted.items() if k.startswith("decoder.")}
    theirs.load_state_dict({k.removeprefix("decoder."): v for k, v in decoder.items()})
    z, frames = torch.randn(6, 4, 8, 8), 3
    expected = theirs(z, image_only_indicator=torch.zeros(2, frames), num_frames=frames)
    torch.testing.assert_close(ours(z, timesteps=frames), expected, atol=1e-4, rtol=1e-4)
