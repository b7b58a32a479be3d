import numpy as np
import pytest
import torch

from taming.modules.vqvae import quantize
from taming.modules.vqvae.quantize import VectorQuantizer2, nearest_codes


def test_the_search_in_blocks_finds_what_the_whole_matrix_shows(monkeypatch):
    z, codebook = torch.randn(300, 6), torch.randn(40, 6)
    expected = torch.cdist(z, codebook).argmin(dim=1)
    monkeypatch.setattr(quantize, "SEARCH_BLOCK", 40 * 7)  # seven vectors at a time
    assert torch.equal(nearest_codes(z, codebook), expected)


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


def test_indices_lead_back_to_the_codes():
    layer = VectorQuantizer2(8, 4, beta=0.25, sane_index_shape=True)
    quant, _, (_, _, indices) = layer(torch.randn(2, 4, 3, 5))
    assert indices.shape == (2, 3, 5)
    assert torch.allclose(layer.get_codebook_entry(indices, (2, 3, 5, 4)), quant, atol=1e-6)


def test_remapping_renumbers_used_codes_and_back(tmp_path):
    np.save(tmp_path / "used.npy", np.array([1, 4, 6]))
    layer = VectorQuantizer2(8, 2, beta=0.25, remap=str(tmp_path / "used.npy"), unknown_index="extra")
    assert layer.re_embed == 4 and layer.unknown_index == 3
    inds = torch.tensor([[1, 4, 6, 5]])
    positions = layer.remap_to_used(inds)
    assert positions.tolist() == [[0, 1, 2, 3]]
    kept = positions.clone()
    assert layer.unmap_to_all(positions).tolist() == [[1, 4, 6, 1]]
    assert torch.equal(positions, kept)  # the caller's tensor is left alone
    with pytest.raises(AssertionError, match="batch axis"):
        layer.remap_to_used(torch.tensor([1, 4]))
    random = VectorQuantizer2(8, 2, beta=0.25, remap=str(tmp_path / "used.npy"))
    assert set(random.remap_to_used(torch.full((1, 200), 5)).unique().tolist()) == {0, 1, 2}
