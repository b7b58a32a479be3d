import torch
import torch.nn.functional as F

from taming.modules.vqvae.quantize import EMAVectorQuantizer, EmbeddingEMA


def test_one_update_is_that_of_the_papers_appendix():
    """van den Oord et al. 2017, A.1: N ← γN + (1 - γ)n, m ← γm + (1 - γ)Σz, e = m / N."""
    layer = EMAVectorQuantizer(5, 3, beta=0.25, decay=0.9, eps=0.0).train()
    before = layer.embedding.weight.clone()
    z = torch.randn(2, 3, 4, 4)
    _, _, (_, _, indices) = layer(z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    for code in range(5):
        chosen = vectors[indices == code]
        n = 0.9 * 1 + 0.1 * len(chosen)
        m = 0.9 * before[code] + 0.1 * chosen.sum(dim=0)
        assert torch.allclose(layer.embedding.weight[code], m / n, atol=1e-5)


def test_the_quantised_map_is_that_of_the_codebook_before_its_update():
    layer = EMAVectorQuantizer(5, 3, beta=0.25).train()
    before = layer.embedding.weight.clone()
    quant, loss, (_, _, indices) = layer(z := torch.randn(2, 3, 4, 4))
    expected = before[indices].reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    assert torch.allclose(quant, expected, atol=1e-6)
    assert torch.allclose(loss, 0.25 * F.mse_loss(z, expected))


def test_codes_come_to_the_means_of_their_clusters():
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    layer = EMAVectorQuantizer(3, 2, beta=0.25, decay=0.5).train()
    layer.embedding.weight.data.copy_(centres + 0.5)
    for _ in range(30):
        vectors = centres.repeat(64, 1) + 0.1 * torch.randn(192, 2)
        layer(vectors.t().reshape(1, 2, 12, 16))
    assert torch.allclose(layer.embedding.weight, centres, atol=0.05)


def test_an_unused_code_stays_where_it_is():
    embedding = EmbeddingEMA(3, 2, decay=0.9, eps=1e-5)
    before = embedding.weight.clone()
    for _ in range(20):
        embedding.cluster_size_ema_update(torch.tensor([10.0, 0.0, 10.0]))
        embedding.embed_avg_ema_update(torch.tensor([[10.0, 0.0], [0.0, 0.0], [0.0, 10.0]]))
        embedding.weight_update(3)
    assert torch.allclose(embedding.weight[1], before[1], rtol=1e-3)
    assert torch.allclose(embedding.weight[[0, 2]], torch.eye(2), atol=0.05)


def test_eval_mode_and_a_frozen_codebook_do_not_move():
    layer = EMAVectorQuantizer(5, 3, beta=0.25)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.eval()(torch.randn(1, 3, 4, 4))
    layer.embedding.update = False
    layer.train()(torch.randn(1, 3, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_only_the_encoder_gets_a_gradient():
    layer = EMAVectorQuantizer(5, 3, beta=0.25).train()
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    quant, loss, _ = layer(z)
    (quant.sum() + loss).backward()
    assert bool(z.grad.any()) and not any(p.requires_grad for p in layer.parameters())
