import pytest
import torch
from torch import nn

from sgm.modules.attention import SpatialTransformer
from sgm.modules.video_attention import SpatialVideoTransformer, VideoTransformerBlock

MARKS = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module.eval()


@pytest.mark.parametrize(
    "options", [{}, {"ff_in": True}, {"inner_dim": 12}, {"disable_temporal_crossattention": True}]
)
def test_places_do_not_see_each_other(options):
    """Changing one place of the image changes that place in every frame, and no other."""
    block = randomised(VideoTransformerBlock(8, 2, options.get("inner_dim", 8) // 2, **options))
    x = torch.randn(6, 5, 8)
    other = x.clone()
    other[4, 2] += torch.randn(8)  # second clip, second frame, third place
    changed = (block(x, timesteps=3) - block(other, timesteps=3)).abs().amax(-1) > 1e-7
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[3:, 2] = True
    assert torch.equal(changed, expected)


def test_a_block_equals_diffusers_temporal_block():
    from diffusers.models.attention import TemporalBasicTransformerBlock

    ours = randomised(VideoTransformerBlock(8, 2, 4, context_dim=5, ff_in=True, inner_dim=8))
    peer = TemporalBasicTransformerBlock(8, 8, 2, 4, cross_attention_dim=5)
    peer.load_state_dict(ours.state_dict())
    x, context = torch.randn(6, 5, 8), torch.randn(10, 3, 5)
    assert torch.allclose(
        ours(x, context, 3), peer(x, num_frames=3, encoder_hidden_states=context), atol=1e-5
    )


def test_a_batch_must_consist_of_clips():
    block = VideoTransformerBlock(8, 2, 4)
    with pytest.raises(ValueError, match="needs the number of frames"):
        block(torch.randn(6, 5, 8))
    with pytest.raises(ValueError, match="6 images does not consist of clips of 4 frames"):
        block(torch.randn(6, 5, 8), timesteps=4)


def test_the_number_of_frames_may_be_set_at_construction():
    block = randomised(VideoTransformerBlock(8, 2, 4, timesteps=3))
    x = torch.randn(6, 5, 8)
    assert torch.equal(block(x), block(x, timesteps=3))


def test_with_a_mixing_factor_of_one_a_video_transformer_is_one_of_images():
    layer = randomised(
        SpatialVideoTransformer(32, 2, 16, context_dim=5, use_spatial_context=True, merge_factor=1.0)
    )
    image = SpatialTransformer(32, 2, 16, context_dim=5)
    image.load_state_dict({k: v for k, v in layer.state_dict().items() if k in image.state_dict()})
    x, context = torch.randn(6, 32, 2, 3), torch.randn(6, 4, 5)
    assert torch.allclose(layer(x, context, timesteps=3), image(x, context), atol=1e-6)


def test_single_images_stay_out_of_the_mixing():
    """An image among frames looks at none of them; the frames do look at it."""
    layer = randomised(
        SpatialVideoTransformer(
            32, 2, 16, context_dim=5, use_spatial_context=True, merge_strategy="learned_with_images"
        )
    )
    x, context = torch.randn(6, 32, 2, 3), torch.randn(6, 4, 5)
    other = x.clone()
    other[0] += torch.randn(32, 2, 3)  # the first frame of the first clip
    options = {"timesteps": 3, "image_only_indicator": MARKS}
    change = (layer(x, context, **options) - layer(other, context, **options)).abs().amax((1, 2, 3))
    assert torch.equal(change > 1e-6, torch.tensor([True, False, True, False, False, False]))


def test_frames_look_at_the_first_frames_context():
    layer = randomised(
        SpatialVideoTransformer(32, 2, 16, context_dim=5, use_spatial_context=True, merge_factor=0.0)
    )
    x, context = torch.randn(6, 32, 2, 3), torch.randn(6, 4, 5)
    with torch.no_grad():
        layer.transformer_blocks[0].attn2.to_out[0].weight.zero_()  # context only through the frames
    first, second = context.clone(), context.clone()
    first[3] += 1
    second[4] += 1
    out = layer(x, context, timesteps=3)
    assert torch.equal(out, layer(x, second, timesteps=3))
    changed = (out - layer(x, first, timesteps=3)).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(changed, torch.arange(6) >= 3)


def test_a_context_of_the_clips_own_may_be_one_token_or_several():
    layer = randomised(SpatialVideoTransformer(32, 2, 16, context_dim=5, time_context_dim=7))
    x, context, token = torch.randn(6, 32, 2, 3), torch.randn(6, 4, 5), torch.randn(2, 7)
    assert torch.equal(layer(x, context, token, 3), layer(x, context, token[:, None], 3))
    assert layer(x, context, torch.randn(2, 3, 7), 3).shape == x.shape


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"n_heads · d_head = 16 must be in_channels = 32"):
        SpatialVideoTransformer(32, 2, 8)
    layer = SpatialVideoTransformer(32, 2, 16, context_dim=5, use_spatial_context=True)
    with pytest.raises(ValueError, match=r"needs a context \(b·t, m, d\), not None"):
        layer(torch.randn(6, 32, 2, 3), timesteps=3)
    marked = SpatialVideoTransformer(32, 2, 16, merge_strategy="learned_with_images")
    with pytest.raises(ValueError, match="needs image_only_indicator"):
        marked(torch.randn(6, 32, 2, 3), timesteps=3)
