import math

import numpy as np
import pytest
import torch

from sgm.modules.autoencoding.regularizers import AbstractRegularizer, DiagonalGaussianRegularizer
from sgm.modules.autoencoding.regularizers.base import IdentityRegularizer
from sgm.modules.autoencoding.regularizers.quantize import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)


def test_the_gaussian_regularizer_reports_the_divergence_of_the_closed_form():
    mean, logvar = torch.full((2, 3, 2, 2), 0.5), torch.full((2, 3, 2, 2), math.log(4.0))
    z, log = DiagonalGaussianRegularizer(sample=False)(torch.cat([mean, logvar], dim=1))
    assert torch.equal(z, mean)
    expected = 12 * 0.5 * (0.25 + 4.0 - 1 - math.log(4.0))
    assert log["kl_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_gaussian_regularizer_draws_with_the_given_deviation():
    z, _ = DiagonalGaussianRegularizer()(
        torch.cat([torch.full((1, 1, 64, 64), 3.0), torch.full((1, 1, 64, 64), 2 * math.log(0.5))], dim=1)
    )
    assert z.mean() == pytest.approx(3.0, abs=0.03) and z.std() == pytest.approx(0.5, abs=0.03)


def test_a_vector_becomes_the_nearest_code_and_beta_weighs_the_commitment():
    quantizer = VectorQuantizer(3, 2, beta=0.25)
    quantizer.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    z = torch.tensor([[1.5, 1.0], [4.0, 5.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    quantised, log = quantizer(z)
    assert log["min_encoding_indices"].tolist() == [1, 2]
    assert quantised[0, :, 0].T.tolist() == [[1.0, 1.0], [5.0, 5.0]]
    distance = (0.25 + 1.0) / 4  # mean over four numbers
    assert float(log["loss/vq"]) == pytest.approx(1.25 * distance)
    log["loss/vq"].backward()
    # only the commitment term pulls the vectors: 0.25 · 2 · (z - e) / 4
    torch.testing.assert_close(z.grad[0, 0, 0], 0.25 * 2 / 4 * torch.tensor([0.5, -1.0]))


def test_sequences_are_quantised_as_maps_are():
    quantizer = VectorQuantizer(9, 4, sane_index_shape=True)
    z = torch.randn(2, 4, 3, 3)
    as_map, log = quantizer(z)
    as_sequence, log_sequence = quantizer(z.flatten(2).transpose(1, 2))
    torch.testing.assert_close(as_sequence, as_map.flatten(2).transpose(1, 2))
    assert torch.equal(log["min_encoding_indices"].flatten(1), log_sequence["min_encoding_indices"])


def test_weight_normalised_codes_are_searched_up_to_date_in_training_and_after_loading():
    quantizer = VectorQuantizer(5, 4, embedding_weight_norm=True)
    z = torch.randn(2, 4, 3, 3)

    def nearest(codes):
        return torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), codes.detach()).argmin(dim=1)

    for p in quantizer.parameters():
        p.data.normal_()
    assert torch.equal(quantizer.train()(z)[1]["min_encoding_indices"], nearest(quantizer.embedding.codes()))
    other = VectorQuantizer(5, 4, embedding_weight_norm=True).eval()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(z)[1]["min_encoding_indices"], nearest(quantizer.embedding.codes()))


def test_the_projected_codebook_keeps_the_shape_of_maps_and_clips_only_if_told_their_channels():
    clip = torch.randn(2, 6, 3, 4, 4)
    assert VectorQuantizerWithInputProjection(6, 8, 2)(clip)[0].shape == (2, 48, 2)
    assert VectorQuantizerWithInputProjection(6, 8, 2, output_dim=6)(clip)[0].shape == clip.shape
    with pytest.raises(ValueError, match="input_dim=6"):
        VectorQuantizerWithInputProjection(6, 8, 2)(torch.randn(2, 5, 4, 4))


def test_only_used_codes_are_drawn_from_a_remapped_codebook(tmp_path):
    np.save(tmp_path / "used.npy", np.array([5, 2]))
    for quantizer, key in (
        (GumbelQuantizer(4, 3, 7, remap=str(tmp_path / "used.npy")), "indices"),
        (EMAVectorQuantizer(7, 4, beta=1.0, remap=str(tmp_path / "used.npy")), "encoding_indices"),
    ):
        _, log = quantizer(torch.randn(2, 4, 3, 3))
        assert log[key].max() < 2


def test_what_has_no_gradient_is_not_trained():
    assert not list(EMAVectorQuantizer(7, 4, beta=1.0).get_trainable_parameters())
    assert not list(IdentityRegularizer().get_trainable_parameters())
    assert len(list(GumbelQuantizer(4, 3, 7).get_trainable_parameters())) == 3
    with pytest.raises(NotImplementedError, match="must define forward"):
        AbstractRegularizer()(torch.zeros(1))


def test_maps_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(b, 4, h, w\)"):
        VectorQuantizer(9, 4)(torch.randn(1, 3, 2, 2))
