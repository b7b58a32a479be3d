import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.modules.attention import LinearAttention, attention


def explicit(q, k, v, heads, allowed=None):
    """Equation 1 of Vaswani et al. 2017, one head after the other."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        out.append(scores.softmax(-1) @ vh)
    return torch.cat(out, -1)


@pytest.fixture
def qkv():
    return torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)


def test_equals_the_formula_with_heads_as_the_slow_index(qkv):
    assert torch.allclose(attention(*qkv, heads=3), explicit(*qkv, heads=3), atol=1e-6)


def test_a_mask_hides_keys(qkv):
    mask = torch.rand(2, 7) > 0.5
    mask[:, 0] = True
    out = attention(*qkv, heads=3, mask=mask[:, None, None, :])
    assert torch.allclose(out, explicit(*qkv, heads=3, allowed=mask[:, None, :]), atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_the_mean_of_all_values(qkv):
    q, k, v = qkv
    out = attention(q, k, v, heads=1, mask=torch.zeros(2, 1, 1, 7, dtype=torch.bool))
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-6)


def test_causal_attention_never_sees_a_later_token():
    q, k, v = (torch.randn(1, 6, 8) for _ in range(3))
    before = attention(q, k, v, heads=2, causal=True)
    k[:, 4:], v[:, 4:] = 9.0, 9.0
    after = attention(q, k, v, heads=2, causal=True)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("causal", [False, True])
def test_the_written_out_path_of_short_half_precision_training_agrees_with_the_fused_kernel(causal):
    q, k, v = (torch.randn(2, 16, 32, dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = attention(q, k, v, heads=2, causal=causal)
    written = attention(q.requires_grad_(), k, v, heads=2, causal=causal)
    masked = attention(
        q, k, v, heads=2, mask=torch.ones(16, 16).tril() > 0 if causal else torch.ones(1, 16) > 0
    )
    assert torch.equal(masked, written)
    assert written.grad_fn is not None
    assert torch.allclose(written.float(), fused.float(), atol=2e-2)


def test_tokens_of_a_map_reach_the_kernel_dense(monkeypatch):
    """Otherwise PyTorch falls back to a path that holds all scores: 35 GB for the first stage's 2048 x 2048 image."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "taming.modules.attention.F.scaled_dot_product_attention",
        lambda *qkv, **kw: seen.extend(t.stride(-1) for t in qkv) or fused(*qkv, **kw),
    )
    q, k, v = (
        torch.randn(2, 12, 4, 5).flatten(2).transpose(1, 2) for _ in range(3)
    )  # (b, h w, c), as rearranged
    out = attention(q, k, v, heads=3)
    assert seen == [1, 1, 1]
    assert torch.allclose(out, explicit(q, k, v, heads=3), atol=1e-6)


def test_linear_attention_gives_each_pixel_a_mean_over_all_when_the_keys_are_equal():
    layer = LinearAttention(4, heads=2, dim_head=3)
    with torch.no_grad():
        layer.to_qkv.weight[6:12] = 0  # all keys equal: their softmax over the positions is uniform
    x = torch.randn(1, 4, 3, 5)
    q, _, v = layer.to_qkv(x).chunk(3, dim=1)
    expected = []
    for qh, vh in zip(q.chunk(2, 1), v.chunk(2, 1), strict=True):
        mean = vh.mean(dim=(2, 3))  # (1, 3): the context is the same row for each of the three key channels
        expected.append(torch.einsum("bdhw,be->behw", qh.sum(1, keepdim=True), mean))
    assert torch.allclose(layer(x), layer.to_out(torch.cat(expected, 1)), atol=1e-5)
