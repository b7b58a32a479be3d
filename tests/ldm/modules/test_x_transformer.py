"""The token transformer and each of its options, against torch's own layers and against what the papers' equations say."""

import math

import pytest
import torch
from torch import nn

from ldm.modules.x_transformer import (
    Attention,
    AttentionLayers,
    Encoder,
    FixedPositionalEmbedding,
    GRUGating,
    Residual,
    Rezero,
    RMSNorm,
    Scale,
    ScaleNorm,
    TransformerWrapper,
)
from ldm.modules.x_transformer_variants import layer_types

DIM, HEADS = 128, 2


def copy_attention(peer, ours):
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        peer.in_proj_bias.zero_()
    peer.out_proj.load_state_dict(ours.to_out.state_dict())


def peer_of(layers, kind=nn.TransformerEncoderLayer, norm_first=True):
    """Torch's layer with the weights of ours, and random norms in both."""
    peer = kind(
        DIM, HEADS, DIM * 4, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    attentions = [peer.self_attn] + ([peer.multihead_attn] if kind is nn.TransformerDecoderLayer else [])
    norms = [getattr(peer, f"norm{i + 1}") for i in range(len(layers))]
    for norm, (own, _, _) in zip(norms, layers, strict=True):
        nn.init.normal_(own.weight, 1.0, 0.1)
        norm.load_state_dict(own.state_dict())
    for attention, (_, own, _) in zip(attentions, layers[:-1], strict=True):
        copy_attention(attention, own)
    peer.linear1.load_state_dict(layers[-1][1].net[0][0].state_dict())
    peer.linear2.load_state_dict(layers[-1][1].net[2].state_dict())
    return peer


def test_the_encoder_equals_torchs():
    ours = Encoder(dim=DIM, depth=1, heads=HEADS).eval()
    peer, x = peer_of(ours.layers), torch.randn(2, 7, DIM)
    assert torch.allclose(ours(x), peer(x), atol=1e-5)
    _, seen = ours(x, return_hiddens=True)
    maps = seen.attn_intermediates[0].post_softmax_attn
    assert maps.shape == (2, HEADS, 7, 7) and torch.allclose(maps.sum(-1), torch.ones(2, HEADS, 7))


def test_norms_after_the_sums_equal_torchs_but_for_the_last_one_which_is_the_wrappers():
    ours = Encoder(dim=DIM, depth=1, heads=HEADS, pre_norm=False).eval()
    peer = peer_of(ours.layers, norm_first=False)
    x = torch.randn(2, 7, DIM)
    assert torch.allclose(peer.norm2(ours(x)), peer(x), atol=1e-5)


def test_causal_layers_with_cross_attention_equal_torchs_decoder():
    ours = AttentionLayers(dim=DIM, depth=1, heads=HEADS, causal=True, cross_attend=True).eval()
    peer = peer_of(ours.layers, nn.TransformerDecoderLayer)
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 3, DIM)
    real = torch.tensor([[True, True, True], [True, False, False]])
    later = nn.Transformer.generate_square_subsequent_mask(5)
    expected = peer(x, context, tgt_mask=later, memory_key_padding_mask=~real)
    assert torch.allclose(ours(x, context=context, context_mask=real), expected, atol=1e-5)


def test_learned_keys_and_values_equal_torchs():
    """torch.nn.MultiheadAttention(add_bias_kv) appends one learned key and value; the order of keys does not matter."""
    ours = Attention(DIM, heads=HEADS, num_mem_kv=1)
    peer = nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, batch_first=True).eval()
    copy_attention(peer, ours)
    with torch.no_grad():
        peer.bias_k.copy_(ours.mem_k.reshape(1, 1, DIM))
        peer.bias_v.copy_(ours.mem_v.reshape(1, 1, DIM))
    x = torch.randn(2, 7, DIM)
    assert torch.allclose(ours(x)[0], peer(x, x, x)[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_mem_kv": 2}, {"causal": True, "num_mem_kv": 1}])
def test_looking_at_the_scores_changes_nothing(options):
    layer, x = Attention(16, dim_head=8, heads=2, **options), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    fast, none = layer(x, mask=mask)
    slow, seen = layer(x, mask=mask, keep=True)
    assert torch.allclose(fast, slow, atol=1e-6)
    assert none == (None, None) and seen.post_softmax_attn.shape == (2, 2, 5, 5 + layer.num_mem_kv)


def test_masked_tokens_are_not_seen_and_see_the_mean_of_all():
    layer, x = Attention(16, dim_head=8, heads=2), torch.randn(1, 4, 16)
    mask = torch.tensor([[True, True, True, False]])
    out = layer(x, mask=mask)[0]
    assert torch.allclose(out[:, :3], layer(x[:, :3])[0], atol=1e-6)
    assert torch.allclose(out[:, 3], layer.to_out(layer.to_v(x).mean(1)), atol=1e-6)


def test_with_sparse_scores_a_query_takes_the_best_keys_only():
    layer, x = Attention(16, dim_head=16, heads=1, sparse_topk=1), torch.randn(1, 6, 16)
    best = (layer.to_q(x) @ layer.to_k(x).transpose(1, 2)).argmax(-1)[0]
    assert torch.allclose(layer(x)[0], layer.to_out(layer.to_v(x)[:, best]), atol=1e-5)
    plain = Attention(16, dim_head=16, heads=1)
    plain.load_state_dict(layer.state_dict())
    layer.sparse_topk = 6
    assert torch.allclose(layer(x)[0], plain(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="at least one score"):
        Attention(16, sparse_topk=0)


def test_talking_heads_mix_scores_and_probabilities():
    layer, x = Attention(16, dim_head=8, heads=2, talking_heads=True), torch.randn(1, 5, 16)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with torch.no_grad():
        layer.pre_softmax_proj.copy_(swap)
        layer.post_softmax_proj.copy_(swap)
    plain = Attention(16, dim_head=8, heads=2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.allclose(layer(x)[0], plain(x)[0], atol=1e-6)  # swapped and swapped back
    with torch.no_grad():
        layer.post_softmax_proj.mul_(0.5)
    assert torch.allclose(layer(x)[0] - layer.to_out.bias, (plain(x)[0] - plain.to_out.bias) / 2, atol=1e-6)


def test_attention_on_attention_gates_its_result():
    layer, x = Attention(16, dim_head=8, heads=2, on_attn=True), torch.randn(1, 5, 16)
    plain = Attention(16, dim_head=8, heads=2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.to_out = nn.Identity()
    value, gate = layer.to_out[0](plain(x)[0]).chunk(2, dim=-1)
    assert torch.allclose(layer(x)[0], value * gate.sigmoid(), atol=1e-6)


def test_scores_of_the_layer_before_are_added():
    layers = Encoder(dim=16, depth=2, heads=2, residual_attn=True, attn_dim_head=8)
    with torch.no_grad():
        layers.layers[2][1].to_q.weight.zero_()  # no scores of its own
    first, second = layers(torch.randn(1, 5, 16), return_hiddens=True)[1].attn_intermediates
    assert torch.allclose(first.post_softmax_attn, second.post_softmax_attn, atol=1e-6)


def test_scores_of_cross_attention_are_added_on_their_own():
    layers = AttentionLayers(
        dim=16, depth=2, heads=2, cross_attend=True, only_cross=True, cross_residual_attn=True
    )
    with torch.no_grad():
        layers.layers[2][1].to_q.weight.zero_()
    seen = layers(torch.randn(1, 5, 16), context=torch.randn(1, 3, 16), return_hiddens=True)[1]
    first, second = (i.post_softmax_attn for i in seen.attn_intermediates)
    assert first.shape == (1, 2, 5, 3) and torch.allclose(first, second, atol=1e-6) and seen.hiddens == []


def test_norms_without_a_mean():
    x = torch.randn(3, 8) * 5
    ours, peer = RMSNorm(8), nn.RMSNorm(8, eps=0)
    nn.init.normal_(ours.g)
    peer.weight = ours.g
    assert torch.allclose(ours(x), peer(x), atol=1e-5)
    scale = ScaleNorm(8)
    nn.init.constant_(scale.g, 3.0)
    assert torch.allclose(scale(x).norm(dim=-1), torch.full((3,), 3 * math.sqrt(8)))
    assert torch.equal(scale(torch.zeros(1, 8)), torch.zeros(1, 8)) and scale.g.shape == (1,)


def test_sines_then_cosines_of_positions():
    out = FixedPositionalEmbedding(4)(torch.zeros(1, 3, 4), offset=5)
    expected = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in (5, 6, 7)]
    assert torch.allclose(out[0], torch.tensor(expected), atol=1e-6)
    with pytest.raises(ValueError, match="dim=5 must be even"):
        FixedPositionalEmbedding(5)


def test_the_gate_follows_the_equations_of_a_gated_recurrent_unit():
    layer, x, residual = GRUGating(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gru = layer.gru
    (ir, iz, new), (hr, hz, hn) = (
        (t @ w.t() + b).chunk(3, dim=-1)
        for t, w, b in ((x, gru.weight_ih, gru.bias_ih), (residual, gru.weight_hh, gru.bias_hh))
    )
    keep = (iz + hz).sigmoid()
    expected = (1 - keep) * torch.tanh(new + (ir + hr).sigmoid() * hn) + keep * residual
    assert torch.allclose(layer(x, residual), expected, atol=1e-6)


def test_factors_multiply_a_layers_result_and_leave_what_comes_with_it():
    x = torch.randn(2, 4)
    assert torch.equal(Scale(0.5, nn.Identity())(x), x / 2) and torch.equal(Residual()(x, x), 2 * x)
    layer = Rezero(nn.Linear(4, 4))
    assert torch.equal(layer(x), torch.zeros(2, 4))
    attention = Attention(4, dim_head=2, heads=2)
    out, seen = Scale(0.5, attention)(x[None], keep=True)
    assert torch.allclose(out, attention(x[None])[0] / 2) and seen.pre_softmax_attn.shape == (1, 2, 2, 2)


def test_with_rezero_attention_counts_for_nothing_at_first_and_nothing_is_normalised():
    layers = Encoder(dim=16, depth=1, heads=2, use_rezero=True, use_rmsnorm=True)
    x = torch.randn(1, 5, 16)
    assert torch.allclose(layers(x), x + layers.layers[1][1](x))
    assert [n for n in layers.state_dict() if n.startswith("layers.0")] == [
        "layers.0.1.g", "layers.0.1.fn.to_q.weight", "layers.0.1.fn.to_k.weight", "layers.0.1.fn.to_v.weight",
        "layers.0.1.fn.to_out.weight", "layers.0.1.fn.to_out.bias",
    ]  # fmt: skip


def test_macaron_layers_count_feed_forward_networks_half():
    layers = Encoder(dim=16, depth=1, heads=2, macaron=True)
    (norm1, half1, _), (norm2, attention, _), (norm3, half2, _) = layers.layers
    x = torch.randn(1, 5, 16)
    h = x + 0.5 * half1.fn(norm1(x))
    h = h + attention(norm2(h))[0]
    assert torch.allclose(layers(x), h + 0.5 * half2.fn(norm3(h)), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("af", 2), "afaf"),
        (("af", 3, None, None, 1), "aafaff"),  # Press et al. 2020, section 4: s^k (sf)^(n-k) f^k
        (("af", 3, None, None, 3), "aaafff"),
        (("acf", 2, None, None, 1), "acacff"),
        (("af", 6, None, 4), "affaffafffff"),  # three attentions, in the first two thirds of twelve layers
        (("af", 2, ("a", "a", "f")), "aaf"),
    ],
)
def test_orders_of_layers(arguments, expected):
    assert layer_types(*arguments) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ff_drpout": 0.1}, "no option 'ff_drpout'. Did you mean 'ff_dropout'"),
        ({"attn_heads": 2}, "no option 'attn_heads'"),
        ({"gate_residul": True}, "Did you mean 'gate_residual'"),
        ({"sandwich_coef": 3}, "between 1 and depth=2"),
        ({"par_ratio": 5}, "more than 1 and at most 4"),
        ({"custom_layers": ("a", "x")}, "a layer 'x'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionLayers(dim=8, depth=2, **options)


def test_published_names_of_the_weights_of_options():
    layers = AttentionLayers(
        dim=8, depth=1, heads=2, cross_attend=True, gate_residual=True, use_scalenorm=True, position_infused_attn=True, ff_glu=True,
        attn_on_attn=True, attn_num_mem_kv=3, attn_talking_heads=True, attn_dim_head=4,
    )  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in layers.state_dict().items()}
    assert shapes["pia_pos_emb.inv_freq"] == (4,) and shapes["layers.0.0.g"] == (1,)
    assert shapes["layers.1.1.mem_k"] == shapes["layers.0.1.mem_v"] == (2, 3, 4)
    assert shapes["layers.0.1.pre_softmax_proj"] == shapes["layers.0.1.post_softmax_proj"] == (2, 2)
    assert shapes["layers.0.1.to_out.0.weight"] == (16, 8) and shapes["layers.2.2.gru.weight_hh"] == (24, 8)
    assert shapes["layers.2.1.net.0.proj.weight"] == (64, 8)


def wrapper(**options):
    layers = options.pop("attn_layers", None) or Encoder(
        dim=16, depth=1, attn_dropout=options.pop("drop", 0.0)
    )
    return TransformerWrapper(num_tokens=9, max_seq_len=6, attn_layers=layers, **options)


def test_attention_dropout_acts_in_training_only():
    model, tokens = wrapper(drop=0.5), torch.randint(0, 9, (1, 6))
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_tied_embeddings_give_logits_from_their_own_weights():
    model, tokens = wrapper(tie_embedding=True), torch.randint(0, 9, (2, 4))
    embeddings = model(tokens, return_embeddings=True)
    assert torch.allclose(model(tokens), embeddings @ model.token_emb.weight.t()) and model.to_logits is None
    with pytest.raises(ValueError, match="tie_embedding needs emb_dim=8"):
        wrapper(tie_embedding=True, emb_dim=8)


def test_memory_tokens_are_seen_and_taken_off_again():
    model, tokens = wrapper(num_memory_tokens=2).eval(), torch.randint(0, 9, (3, 4))
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2])
    h = model.token_emb(tokens) + model.pos_emb(tokens)
    h = torch.cat([model.memory_tokens.expand(3, 2, 16), h], dim=1)
    longer = torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], dim=1)
    expected = model.norm(model.attn_layers(h, mask=longer))[:, 2:]
    assert torch.allclose(model(tokens, mask=mask, return_embeddings=True), expected, atol=1e-6)


@pytest.mark.parametrize("positions", [False, True])
def test_a_text_in_two_calls_with_memory_is_the_text_in_one(positions):
    """Where memory is not normalised, as published, this holds for layers without norms."""
    layers = AttentionLayers(
        dim=16,
        depth=2,
        heads=2,
        causal=True,
        use_rezero=True,
        position_infused_attn=positions,
        attn_num_mem_kv=1,
    )
    for n, p in layers.named_parameters():
        if n.endswith(".g"):
            nn.init.constant_(p, 0.7)
    model = wrapper(attn_layers=layers, use_pos_emb=False, max_mem_len=6).eval()
    tokens = torch.randint(0, 9, (2, 6))
    assert model.pos_emb is None
    first, mems = model(tokens[:, :4], return_mems=True)
    second, mems, maps = model(tokens[:, 4:], mems=mems, return_mems=True, return_attn=True)
    assert torch.allclose(torch.cat([first, second], dim=1), model(tokens), atol=1e-5)
    assert [m.shape for m in mems] == [(2, 6, 16)] * 2 and maps[0].shape == (2, 2, 2, 7)


def test_wrong_calls_are_named():
    model, tokens = wrapper(), torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(ValueError, match="7 tokens for 6 positions"):
        model(tokens)
    with pytest.raises(ValueError, match="max_mem_len ≥ 1"):
        model(tokens[:, :2], return_mems=True)
    with pytest.raises(ValueError, match="2 memories for 1 self-attentions"):
        model(tokens[:, :2], mems=[None, None])
    with pytest.raises(AssertionError, match="cross_attend=True"):
        model(tokens[:, :2], context=torch.zeros(1, 2, 16))
    crossing = AttentionLayers(dim=16, depth=1, cross_attend=True)
    with pytest.raises(AssertionError, match="pass one"):
        crossing(torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="width 8, but this attention was built for dim=16"):
        crossing(torch.zeros(1, 2, 16), context=torch.zeros(1, 2, 8))
    with pytest.raises(AssertionError, match="never causal"):
        Encoder(dim=16, depth=1, causal=True)
