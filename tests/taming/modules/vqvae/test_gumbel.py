import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from taming.modules.vqvae.quantize import GumbelQuantize


def logits_of(layer, z):
    return F.conv2d(z, layer.proj.weight, layer.proj.bias)


def test_codes_are_drawn_with_the_softmaxs_probabilities():
    layer = GumbelQuantize(3, 4, 5).eval()
    z = torch.randn(1, 3, 1, 1).expand(1, 3, 100, 200)
    _, _, (_, _, indices) = layer(z)
    frequencies = torch.bincount(indices.flatten(), minlength=5) / 20000
    probabilities = logits_of(layer, z[:, :, :1, :1]).flatten().softmax(0)
    # four standard deviations of 20,000 draws
    assert torch.allclose(frequencies, probabilities, atol=4 * math.sqrt(0.25 / 20000))


def test_the_loss_is_the_divergence_from_the_uniform_distribution():
    layer = GumbelQuantize(3, 4, 6, kl_weight=0.1)
    z = 3 * torch.randn(2, 3, 4, 4)
    q = Categorical(logits=logits_of(layer, z).permute(0, 2, 3, 1))
    expected = 0.1 * kl_divergence(q, Categorical(logits=torch.zeros_like(q.logits))).mean()
    assert float(layer(z)[1]) == pytest.approx(float(expected), rel=1e-5)


def test_training_is_hard_or_soft_as_asked_and_eval_is_hard():
    z = torch.randn(2, 3, 4, 4)

    def is_hard(layer):
        quant, _, (_, _, indices) = layer(z)
        return torch.allclose(quant, layer.get_codebook_entry(indices.flatten(), (2, 4, 4, 4)), atol=1e-6)

    soft, hard = GumbelQuantize(3, 4, 6, straight_through=False), GumbelQuantize(3, 4, 6)
    assert [is_hard(soft.train()), is_hard(soft.eval()), is_hard(hard.train())] == [False, True, True]


def test_a_high_temperature_mixes_all_codes_evenly():
    layer = GumbelQuantize(3, 4, 6, straight_through=False, temp_init=1e6)
    quant = layer(torch.randn(1, 3, 2, 2))[0]
    assert torch.allclose(quant, layer.embed.weight.mean(0)[None, :, None, None].expand_as(quant), atol=1e-4)


def test_projection_and_codes_both_learn_through_hard_draws():
    layer = GumbelQuantize(3, 4, 6)
    layer(torch.randn(1, 3, 4, 4))[0].square().sum().backward()
    assert bool(layer.proj.weight.grad.any()) and bool(layer.embed.weight.grad.any())


def test_only_used_codes_are_drawn_and_numbered_by_position(tmp_path):
    np.save(tmp_path / "used.npy", np.array([5, 1, 3]))
    layer = GumbelQuantize(3, 4, 6, remap=str(tmp_path / "used.npy"))
    quant, _, (_, _, indices), logits = layer(torch.randn(2, 3, 8, 8), return_logits=True)
    assert logits.shape == (2, 3, 8, 8) and set(indices.unique().tolist()) == {0, 1, 2}
    codes = layer.embed.weight[torch.tensor([5, 1, 3])[indices]].permute(0, 3, 1, 2)
    assert torch.allclose(quant, codes, atol=1e-6)
    assert torch.allclose(layer.get_codebook_entry(indices, (2, 8, 8, 4)), codes, atol=1e-6)


def test_the_temperature_is_no_part_of_the_state():
    assert set(GumbelQuantize(3, 4, 6).state_dict()) == {"proj.weight", "proj.bias", "embed.weight"}
