import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VectorQuantizer as Peer

from taming.modules.vqvae.quantize import VectorQuantizer, VectorQuantizer2


def test_the_gradient_passes_straight_through():
    layer = VectorQuantizer2(8, 4, beta=0.25)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    quant, _, _ = layer(z)
    weights = torch.randn_like(quant)
    (quant * weights).sum().backward()
    assert torch.allclose(z.grad, weights)


@pytest.mark.parametrize(("legacy", "commitment", "codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_beta_weighs_the_codebook_in_legacy_form_and_the_commitment_otherwise(legacy, commitment, codebook):
    """Equation 3 of van den Oord et al. 2017; the gradients of the two terms tell the weights."""
    layer = VectorQuantizer2(8, 4, beta=0.25, legacy=legacy)
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    _, loss, (_, _, indices) = layer(z)
    loss.backward()
    vectors = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    difference = vectors - layer.embedding.weight.detach()[indices]
    assert torch.allclose(
        z.grad.permute(0, 2, 3, 1).reshape(-1, 4), commitment * 2 * difference / difference.numel(), atol=1e-6
    )
    expected = torch.zeros(8, 4).index_add_(0, indices, -codebook * 2 * difference / difference.numel())
    assert torch.allclose(layer.embedding.weight.grad, expected, atol=1e-6)


@pytest.mark.parametrize("legacy", [True, False])
def test_it_agrees_with_diffusers(legacy):
    ours, theirs = VectorQuantizer2(12, 4, beta=0.3, legacy=legacy), Peer(12, 4, beta=0.3, legacy=legacy)
    theirs.load_state_dict(ours.state_dict())
    z = 0.1 * torch.randn(2, 4, 3, 5)
    (quant, loss, (_, _, indices)), (peer_quant, peer_loss, (_, _, peer_indices)) = ours(z), theirs(z)
    assert torch.equal(indices, peer_indices)
    assert torch.allclose(quant, peer_quant, atol=1e-6) and torch.allclose(loss, peer_loss, atol=1e-6)


def test_indices_lead_back_to_the_codes():
    layer = VectorQuantizer2(8, 4, beta=0.25, sane_index_shape=True)
    quant, _, (_, _, indices) = layer(torch.randn(2, 4, 3, 5))
    assert indices.shape == (2, 3, 5)
    assert torch.allclose(layer.get_codebook_entry(indices, (2, 3, 5, 4)), quant, atol=1e-6)


def test_the_earlier_form_equals_the_later_and_counts_codes():
    early, late = VectorQuantizer(8, 4, beta=0.25), VectorQuantizer2(8, 4, beta=0.25)
    late.load_state_dict(early.state_dict())
    z = torch.randn(2, 4, 3, 5)
    (quant, loss, (perplexity, onehot, indices)), (same, also, (_, _, flat)) = early(z), late(z)
    assert torch.equal(quant, same) and torch.equal(loss, also) and torch.equal(indices[:, 0], flat)
    assert torch.equal(onehot, F.one_hot(flat, 8).float())
    entropy = torch.distributions.Categorical(probs=onehot.mean(dim=0)).entropy()
    assert float(perplexity) == pytest.approx(float(entropy.exp()), rel=1e-4)


def test_with_l2_norm_only_angles_count():
    """Yu et al. 2022, section 3.2: vectors and codes lie on the unit sphere."""
    layer = VectorQuantizer2(16, 4, beta=0.25, l2_norm=True)
    z = torch.randn(2, 4, 3, 3)
    quant, loss, (_, _, indices) = layer(z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 4)
    cosine = F.cosine_similarity(vectors[:, None], layer.embedding.weight[None], dim=-1)
    assert torch.equal(indices, cosine.argmax(dim=1))
    assert torch.allclose(quant.norm(dim=1), torch.ones(2, 3, 3), atol=1e-6)
    # |a - b|² = 2 - 2 cos on the sphere; the two terms weigh 1 and 0.25
    assert float(loss) == pytest.approx(float(1.25 * (2 - 2 * cosine.max(dim=1).values).mean() / 4), rel=1e-5)
    scaled, _, (_, _, same) = layer(7 * z)
    assert torch.equal(indices, same) and torch.allclose(quant, scaled, atol=1e-6)


def test_the_gumbel_options_are_refused():
    layer = VectorQuantizer2(8, 4, beta=0.25)
    for options in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(AssertionError, match="Gumbel"):
            layer(torch.zeros(1, 4, 2, 2), **options)
