import math

import pytest
import torch
from torch import nn

from sgm.modules.diffusionmodules.util import AlphaBlender, get_alpha

MARKS = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def test_a_fixed_factor_is_the_share_of_the_spatial_path():
    blend = AlphaBlender(0.25, "fixed")
    spatial, temporal = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    assert torch.allclose(blend(spatial, temporal), 0.25 * spatial + 0.75 * temporal)
    assert not list(blend.parameters()) and list(blend.state_dict()) == ["mix_factor"]


def test_a_learned_factor_is_a_logit():
    blend = AlphaBlender(math.log(3), "learned")  # σ(log 3) = 3/4
    spatial, temporal = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    assert torch.allclose(blend(spatial, temporal, MARKS), 0.75 * spatial + 0.25 * temporal, atol=1e-6)
    assert [name for name, _ in blend.named_parameters()] == ["mix_factor"]


@pytest.mark.parametrize(
    ("pattern", "shape"), [("b t -> (b t) 1 1", (6, 4, 5)), ("b t -> b 1 t 1 1", (2, 4, 3, 5, 5))]
)
def test_single_images_keep_the_spatial_path(pattern, shape):
    blend = AlphaBlender(math.log(3), "learned_with_images", pattern)
    spatial, temporal = torch.ones(shape), torch.zeros(shape)
    out = blend(spatial, temporal, MARKS)
    out = out.reshape(2, 3, -1)[..., 0] if len(shape) == 3 else out[:, 0, :, 0, 0]
    assert torch.allclose(out, torch.where(MARKS.bool(), 1.0, 0.75))


def test_the_blend_is_computed_in_the_type_of_the_features():
    blend = AlphaBlender(0.3, "learned")
    assert blend(torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()).dtype == torch.bfloat16


def test_diffusers_blends_the_same():
    from diffusers.models.transformers.transformer_temporal import AlphaBlender as Peer

    for strategy in AlphaBlender.strategies:
        ours, peer = AlphaBlender(0.4, strategy, "b t -> b 1 t 1 1"), Peer(0.4, strategy)
        spatial, temporal = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
        assert torch.allclose(ours(spatial, temporal, MARKS), peer(spatial, temporal, MARKS))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="merge_strategy='mean' is unknown; choose one of"):
        AlphaBlender(0.5, "mean")
    with pytest.raises(ValueError, match="needs image_only_indicator"):
        AlphaBlender(0.5).get_alpha()
    with pytest.raises(NotImplementedError, match="merge_strategy='mean' is unknown"):
        get_alpha("mean", torch.zeros(1), MARKS)


def test_the_older_alpha_sends_the_ones_of_images_through_the_sigmoid_too():
    """As published; with σ(1) = 0.7311."""
    alpha = get_alpha("learned_with_images", torch.tensor([-1.0]), MARKS, is_attn=True)
    assert alpha.shape == (6, 1, 1)
    assert torch.allclose(alpha.flatten(), torch.where(MARKS.bool(), 0.73106, 0.26894).flatten(), atol=1e-5)
    marks = get_alpha("fixed_with_images", torch.tensor([-1.0]), MARKS, apply_sigmoid=False)
    assert torch.equal(marks, MARKS[:, None, :, None, None])
    for strategy in ("fixed", "learned"):
        assert torch.equal(get_alpha(strategy, nn.Parameter(torch.zeros(1)), MARKS), torch.tensor([0.5]))
