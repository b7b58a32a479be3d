"""A condition that does not fit the network is named, wherever it arrives."""

import copy

import pytest
import torch

from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.attention import CrossAttention, SpatialTransformer


@pytest.fixture
def wrapper(tiny):
    return DiffusionWrapper(copy.deepcopy(tiny.unet), "crossattn")


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (
            [(1, 3, 6)],
            "width 6, but this cross-attention was built for context_dim=8. Is it the text encoder",
        ),
        ([(1, 8)], r"shape \(1, 8\), but .* context_dim=8: \(batch, tokens, 8\)"),
        ([(1, 3, 8), (1, 3, 6)], "cannot be joined to one context: all need the same batch and width"),
        ([(1, 3, 8), (2, 3, 8)], "cannot be joined to one context"),
    ],
)
def test_a_context_that_does_not_fit_is_one_clear_sentence(wrapper, contexts, message):
    x, t = torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        wrapper(x, t, c_crossattn=[torch.randn(shape) for shape in contexts])


def test_contexts_are_joined_along_their_tokens(wrapper):
    torch.nn.init.normal_(wrapper.diffusion_model.out[2].weight)
    x, t, context = torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), torch.randn(1, 5, 8)
    whole, parts = (wrapper(x, t, c_crossattn=c) for c in ([context], [context[:, :2], context[:, 2:]]))
    assert torch.allclose(whole, parts, atol=1e-5)


def test_a_layer_that_needs_a_context_says_so():
    with pytest.raises(
        ValueError, match="no context was given, but .* context_dim=6; pass the encoded condition"
    ):
        SpatialTransformer(32, 2, 16, context_dim=6)(torch.randn(1, 32, 4, 4))
    with pytest.raises(ValueError, match="width 5, but .* context_dim=6"):
        SpatialTransformer(32, 2, 16, context_dim=6)(torch.randn(1, 32, 4, 4), torch.randn(1, 2, 5))
    assert CrossAttention(8)(torch.randn(1, 3, 8)).shape == (
        1,
        3,
        8,
    )  # none needed: the tokens look at themselves
