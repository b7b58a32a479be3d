import pytest
import torch
from einops import rearrange
from torch import nn

from sgm.modules.spacetime_attention import PostHocSpatialTransformerWithTimeMixingAndMotion as Transformer
from sgm.modules.spacetime_attention import SpatialTransformer

B, T, V, H, W = 2, 3, 2, 2, 4
WORKING = {
    "context_dim": 5, "motion_context_dim": 4, "use_linear": True, "use_spatial_context": True, "time_mix_legacy": False,
}  # fmt: skip


def build(seed=0, **options):
    torch.manual_seed(seed)
    layer = Transformer(32, 2, 16, **{**WORKING, **options})
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    return layer.eval()


def inputs():
    torch.manual_seed(1)
    return {
        "x": torch.randn(B * T * V, 32, H, W), "context": torch.randn(B, T, 5), "cond_view": torch.randn(B * V, 4, 3, 5),
        "cam": torch.randn(B * T * V, 6),
    }  # fmt: skip


def influence(layer, b, t, v, y, x):
    """Which of (b, t, v, y, x) change when one pixel does, with the norm over pixels out of the way."""
    layer.norm = nn.Identity()
    given = inputs()
    other = dict(given, x=given["x"].clone())
    rearrange(other["x"], "(b t v) c h w -> b t v h w c", t=T, v=V)[b, t, v, y, x] += 1
    change = (layer(**given) - layer(**other)).abs().amax(1) > 1e-7
    return rearrange(change, "(b t v) h w -> b t v h w", t=T, v=V)


def silence(layer, *names):
    """Take attention out of the result, so that what is left shows what the rest sees."""
    for name in names:
        for block in getattr(layer, name):
            for attention in (block.attn1, block.attn2):
                nn.init.zeros_(attention.to_out[0].weight)
    return layer


def test_views_of_a_moment_see_each_other_at_the_same_pixel():
    layer = silence(build(), "transformer_blocks", "motion_blocks")
    expected = torch.zeros(B, T, V, H, W, dtype=torch.bool)
    expected[1, 2, :, 1, 3] = True
    assert torch.equal(influence(layer, 1, 2, 0, 1, 3), expected)


def test_in_the_second_version_neighbouring_pixels_take_the_views_place():
    """As published and trained: v consecutive entries of the flattened (view, pixel) axis share their attention."""
    layer = silence(build(use_3d_attention=True), "transformer_blocks", "motion_blocks")
    expected = torch.zeros(B, T, V, H, W, dtype=torch.bool)
    expected[1, 2, 0, 1, 2:] = True  # pixels 6 and 7 of 8
    assert torch.equal(influence(layer, 1, 2, 0, 1, 3), expected)


def test_moments_of_a_view_see_each_other_at_the_same_pixel():
    layer = silence(build(), "transformer_blocks", "time_mix_blocks")
    expected = torch.zeros(B, T, V, H, W, dtype=torch.bool)
    expected[0, :, 1, 0, 2] = True
    assert torch.equal(influence(layer, 0, 1, 1, 0, 2), expected)


def test_with_mixing_factors_of_one_it_is_a_transformer_of_images():
    layer = build(merge_factor=1.0)
    image = SpatialTransformer(32, 2, 16, context_dim=5, use_linear=True)
    image.load_state_dict({k: v for k, v in layer.state_dict().items() if k in image.state_dict()})
    given = inputs()
    context = (
        given["context"].repeat_interleave(V, dim=1).flatten(0, 1)[:, None]
    )  # of each image: that of its moment
    assert torch.allclose(layer(**given), image(given["x"], context), atol=1e-5)


def test_views_and_moments_may_have_a_factor_each():
    shared, own = build(), build(separate_motion_merge_factor=True, merge_factor_motion=0.9)
    assert (
        "time_mixer_motion.mix_factor" in own.state_dict()
        and "time_mixer_motion.mix_factor" not in shared.state_dict()
    )
    given = inputs()
    with torch.no_grad():
        own.time_mixer_motion.mix_factor.fill_(0.5)
    assert torch.allclose(own(**given), shared(**given), atol=1e-6)


def test_the_camera_of_a_views_first_moment_counts():
    layer, given = build(use_camera_emb=True, adm_in_channels=6), inputs()
    cam = rearrange(given["cam"], "(b t v) d -> b t v d", t=T, v=V)
    later, first = cam.clone(), cam.clone()
    later[:, 1:] += 1
    first[:, 0] += 1
    out = layer(**given)
    assert torch.equal(out, layer(**{**given, "cam": later.flatten(0, 2)}))
    assert not torch.allclose(out, layer(**{**given, "cam": first.flatten(0, 2)}), atol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"time_mix_legacy": True}, {"use_motion_attention": False}, {"use_spatial_context": False}]
)
def test_options_that_never_worked_say_so(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*never worked"):
        Transformer(32, 2, 16, **{**WORKING, **wrong})


def test_wrong_inputs_are_named():
    layer, given = build(), inputs()
    with pytest.raises(ValueError, match=r"needs a context \(b, t, d\) and cond_view"):
        layer(**{**given, "cond_view": None})
    with pytest.raises(ValueError, match="batch of 11 images is not 2 clips × 3 moments"):
        layer(**{**given, "x": given["x"][:-1]})
    with pytest.raises(ValueError, match="needs adm_in_channels"):
        build(use_camera_emb=True)
    with pytest.raises(ValueError, match="needs cam"):
        build(use_camera_emb=True, adm_in_channels=6)(**{**given, "cam": None})
