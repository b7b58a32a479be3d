import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend

from sgm.modules.attention import (
    BasicTransformerBlock,
    BasicTransformerSingleLayerBlock,
    CrossAttention,
    MemoryEfficientCrossAttention,
    SelfAttention,
    SimpleTransformer,
    SpatialTransformer,
)


def test_masks_follow_pytorchs_convention():
    """Bool (True = look) and additive masks, broadcastable to (b, heads, n, m), against PyTorch's own attention."""
    layer = CrossAttention(8, context_dim=5, heads=2, dim_head=4)
    x, context = torch.randn(3, 6, 8), torch.randn(3, 4, 5)
    q, k, v = (
        p.unflatten(-1, (2, 4)).transpose(1, 2)
        for p in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    for mask in (torch.rand(3, 1, 6, 4) > 0.3, torch.randn(1, 2, 6, 4)):
        if mask.dtype == torch.bool:
            mask[..., 0] = True
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        assert torch.allclose(layer(x, context, mask=mask), layer.to_out(expected), atol=1e-6)


def test_the_old_back_ends_name_is_the_same_attention_without_masks():
    layer = MemoryEfficientCrossAttention(8, heads=2, dim_head=4)
    plain = CrossAttention(8, heads=2, dim_head=4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(NotImplementedError, match="use CrossAttention"):
        layer(x, mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


@pytest.mark.parametrize("cls", [CrossAttention, MemoryEfficientCrossAttention])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_across_frames_every_group_looks_at_its_first(cls, frames):
    """The originals' plain attention repeated the first frames too often; the memory-efficient one's groups hold."""
    layer, x = cls(8, heads=2, dim_head=4), torch.randn(6, 5, 8)
    expected = torch.cat([layer(x[i : i + 1], x[i - i % frames][None]) for i in range(6)])
    assert torch.allclose(layer(x, n_times_crossframe_attn_in_self=frames), expected, atol=1e-6)


def test_frames_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch of 5 does not divide"):
        CrossAttention(8, heads=2, dim_head=4)(torch.randn(5, 3, 8), n_times_crossframe_attn_in_self=2)


def test_additional_tokens_are_seen_and_cut_off():
    layer, x, extra = CrossAttention(8, heads=2, dim_head=4), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    assert torch.allclose(
        layer(x, additional_tokens=extra), layer(torch.cat([extra, x], 1))[:, 3:], atol=1e-6
    )
    assert not torch.allclose(layer(x, additional_tokens=extra), layer(x), atol=1e-3)


def test_a_chosen_kernel_gives_the_same_numbers():
    layer = CrossAttention(8, heads=2, dim_head=4)
    x = torch.randn(2, 5, 8)
    expected = layer(x)
    layer.backend = SDPBackend.MATH
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_checkpointing_passes_additional_tokens_and_frames_on():
    """The original dropped them."""
    x, extra = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 2, 8)
    block = BasicTransformerBlock(8, 2, 4, checkpoint=True)
    plain = BasicTransformerBlock(8, 2, 4, checkpoint=False)
    plain.load_state_dict(block.state_dict())
    options = {"additional_tokens": extra, "n_times_crossframe_attn_in_self": 2}
    assert torch.allclose(block(x, **options), plain(x, **options), atol=1e-6)
    assert not torch.allclose(plain(x, **options), plain(x), atol=1e-3)


def test_a_block_with_extra_tokens_equals_one_that_holds_them():
    """Without context both attentions see the tokens in front, and the feed-forward network works on each token alone."""
    block = BasicTransformerBlock(8, 2, 4, checkpoint=False)
    x, extra = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    h = x + block.attn1(torch.cat([extra, block.norm1(x)], 1))[:, 3:]
    h = h + block.attn2(torch.cat([extra, block.norm2(h)], 1))[:, 3:]
    assert torch.allclose(block(x, additional_tokens=extra), h + block.ff(block.norm3(h)), atol=1e-6)


def test_unknown_attention_modes_name_the_known():
    with pytest.raises(
        ValueError, match=r"'flash' is unknown; choose one of \['softmax', 'softmax-xformers'\]"
    ):
        BasicTransformerBlock(8, 2, 4, attn_mode="flash")
    with pytest.raises(ValueError, match="'flash' is unknown"):
        BasicTransformerSingleLayerBlock(8, 2, 4, attn_mode="flash")
    with pytest.raises(ValueError, match="'flash' is unknown"):
        SelfAttention(8, attn_mode="flash")


def test_a_context_width_from_a_yaml_list_is_understood():
    """The refiner's: four equal widths, also for transformers of another depth."""
    for depth in (1, 4):
        widths = OmegaConf.create([6, 6, 6, 6])
        layer = SpatialTransformer(32, 2, 16, depth=depth, context_dim=widths, use_checkpoint=False)
        assert [b.attn2.to_k.in_features for b in layer.transformer_blocks] == [6] * depth
    with pytest.raises(ValueError, match="2 entries of context_dim for 3"):
        SpatialTransformer(32, 2, 16, depth=3, context_dim=[6, 7])


def test_a_simple_transformer_is_its_blocks_in_a_row():
    net = SimpleTransformer(8, depth=2, heads=2, dim_head=4, context_dim=5)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 5)
    assert torch.equal(net(x, context), net.layers[1](net.layers[0](x, context), context))
    assert {k.split(".")[0] for k in net.state_dict()} == {"layers"}


@pytest.mark.parametrize("mode", SelfAttention.ATTENTION_MODES)
def test_self_attention_equals_timms_in_every_mode(mode):
    from timm.layers import Attention

    ours = SelfAttention(16, num_heads=4, qkv_bias=True, attn_mode=mode)
    peer = Attention(16, num_heads=4, qkv_bias=True)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    assert torch.allclose(ours(x), peer(x), atol=1e-6)


def test_only_the_written_out_attention_heeds_its_scale():
    x = torch.randn(2, 5, 8)
    sharp = SelfAttention(8, num_heads=2, qk_scale=30.0, attn_mode="math")
    q, k, v = sharp.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    expected = ((30 * q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(sharp(x), sharp.proj(expected), atol=1e-5)
    default = SelfAttention(8, num_heads=2, attn_mode="torch")
    default.load_state_dict(sharp.state_dict())
    other = SelfAttention(8, num_heads=2, qk_scale=30.0, attn_mode="torch")
    other.load_state_dict(sharp.state_dict())
    assert torch.equal(default(x), other(x))


def test_attention_weights_are_dropped_in_training_only():
    layer = SelfAttention(8, num_heads=2, attn_drop=0.5, attn_mode="math")
    x = torch.randn(2, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="dim=10 does not divide into num_heads=4"):
        SelfAttention(10, num_heads=4)
