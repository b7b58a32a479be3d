import pytest
import torch

from ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer


def test_cross_attention_equals_torchs_multi_head_attention():
    """An independent implementation with the same weights."""
    ours = CrossAttention(query_dim=12, context_dim=12, heads=3, dim_head=4)
    peer = torch.nn.MultiheadAttention(12, 3, bias=True, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        peer.in_proj_bias.zero_()
        peer.out_proj.weight.copy_(ours.to_out[0].weight)
        peer.out_proj.bias.copy_(ours.to_out[0].bias)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    assert torch.allclose(ours(x, context), peer(x, context, context)[0], atol=1e-5)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    assert torch.allclose(
        ours(x, context, mask=mask), peer(x, context, context, key_padding_mask=~mask)[0], atol=1e-5
    )


def test_a_context_of_the_wrong_width_names_both_widths():
    with pytest.raises(ValueError, match="width 768, but .* context_dim=1024"):
        CrossAttention(query_dim=8, context_dim=1024)(torch.randn(1, 2, 8), torch.randn(1, 3, 768))


def test_float32_attention_can_be_asked_for(monkeypatch):
    x = torch.randn(1, 4, 16)
    torch.manual_seed(5)
    plain = CrossAttention(16, heads=2, dim_head=8)
    monkeypatch.setenv("ATTN_PRECISION", "fp32")
    precise = CrossAttention(16, heads=2, dim_head=8)
    precise.load_state_dict(plain.state_dict())
    with torch.no_grad():
        exact = plain(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert precise.precise and torch.allclose(precise(x).float(), exact, atol=3e-2)


@pytest.mark.parametrize("glu", [True, False])
def test_feed_forward_widens_by_its_multiplier(glu):
    layer = FeedForward(8, dim_out=5, mult=2, glu=glu)
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 5)
    assert layer.net[2].in_features == 16


@pytest.mark.parametrize("context_dim", [6, None])
def test_checkpointing_changes_neither_outputs_nor_gradients(context_dim):
    x = torch.randn(2, 4, 8)
    context = torch.randn(2, 3, 6) if context_dim else None
    results = []
    for flag in (True, False):
        torch.manual_seed(3)
        block = BasicTransformerBlock(8, 2, 4, context_dim=context_dim, checkpoint=flag)
        inputs = x.clone().requires_grad_()
        out = block(inputs, context=context)
        out.square().sum().backward()
        results.append([out, inputs.grad, block.attn2.to_k.weight.grad, block.ff.net[0].proj.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_under_checkpointing_recomputes_the_same_mask():
    """The original redrew it in the backward pass, so its gradients belonged to another network."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(8, 2, 4, dropout=0.5, checkpoint=True).train()
    plain = BasicTransformerBlock(8, 2, 4, dropout=0.5, checkpoint=False).train()
    plain.load_state_dict(block.state_dict())
    grads = []
    for b in (block, plain):
        torch.manual_seed(7)
        x = torch.ones(2, 4, 8, requires_grad=True)
        b(x).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads)


def test_one_context_is_shared_among_blocks_and_a_list_gives_one_each():
    layer = SpatialTransformer(32, 2, 16, depth=2, context_dim=[6, 5])
    x = torch.randn(1, 32, 3, 4)
    assert layer(x, [torch.randn(1, 2, 6), torch.randn(1, 3, 5)]).shape == x.shape
    shared = SpatialTransformer(32, 2, 16, depth=2, context_dim=6)
    torch.nn.init.normal_(shared.proj_out.weight)
    context = torch.randn(1, 2, 6)
    assert torch.equal(shared(x, context), shared(x, [context, context]))
    with pytest.raises(ValueError, match="3 entries of context for 2"):
        shared(x, [context] * 3)


def test_a_fresh_transformer_changes_nothing():
    for use_linear in (True, False):
        x = torch.randn(1, 32, 3, 4)
        assert torch.equal(SpatialTransformer(32, 2, 16, use_linear=use_linear)(x), x)
