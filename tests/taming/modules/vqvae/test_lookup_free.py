import math

import pytest
import torch

from taming.modules.vqvae.quantize import FSQ, LFQ

# ---------------------------------------------------------------------------------------------------------------- FSQ


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4], [2, 2, 2], [7]])
def test_every_index_has_its_own_code_and_leads_back(levels):
    layer = FSQ(levels)
    assert layer.n_e == math.prod(levels) and layer.e_dim == len(levels) and not layer.state_dict()
    indices = torch.arange(layer.n_e)
    codes = layer.look_up(indices)
    assert len(codes.unique(dim=0)) == layer.n_e and codes.abs().max() <= 1
    assert torch.equal(layer.codes_to_indices(codes), indices)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 15, 16])
def test_a_channel_takes_all_its_levels_and_no_other_and_keeps_zero(n):
    layer = FSQ([n])
    z = torch.linspace(-8, 8, 4001).reshape(1, 1, 1, -1)
    quant, loss, (_, _, indices) = layer(z)
    assert sorted(indices.unique().tolist()) == list(range(n))
    assert bool((quant.diff() >= 0).all()) and float(loss) == 0
    assert float(layer.bound(torch.zeros(1))) == pytest.approx(0, abs=1e-6)
    # evenly spaced by 1 / ⌊n / 2⌋ (table 1 of the paper normalises by half the width)
    assert torch.allclose(quant.unique().diff(), torch.full((n - 1,), 1 / (n // 2)), atol=1e-6)


def test_the_gradient_is_that_of_the_squeeze():
    layer = FSQ([5, 4])
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    layer(z)[0].sum().backward()
    x = z.detach().requires_grad_()
    (layer.bound(x.permute(0, 2, 3, 1)) / layer.steps).sum().backward()
    assert torch.allclose(z.grad, x.grad)


def test_bfloat16_rounds_as_float32_does():
    layer, z = FSQ([8, 5]), torch.randn(1, 2, 16, 16).bfloat16()
    assert torch.equal(layer(z)[2][2], layer(z.float())[2][2])
    assert layer(z)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("levels", [[], [4, 1]])
def test_levels_below_two_are_refused(levels):
    with pytest.raises(ValueError, match="whole numbers from 2 up"):
        FSQ(levels)


# ---------------------------------------------------------------------------------------------------------------- LFQ


def test_the_bits_of_the_index_are_the_signs():
    layer = LFQ(4, sane_index_shape=True)
    z = torch.tensor([0.3, -2.0, 0.0, 1e-3]).reshape(1, 4, 1, 1)
    quant, _, (_, _, indices) = layer(z)
    assert quant.flatten().tolist() == [1, -1, -1, 1]  # zero counts as negative
    assert indices.tolist() == [[[0b1001]]]  # the first channel is the lowest bit
    assert len(layer.look_up(torch.arange(16)).unique(dim=0)) == 16


def entropies_by_enumeration(layer, vectors):
    """Equations 4 and 5 of Yu et al. 2023 with all 2^bits codes written out."""
    codes = layer.look_up(torch.arange(layer.n_e)).to(vectors)
    q = (-(vectors[:, None] - codes).pow(2).sum(-1) / layer.temperature).softmax(dim=1)

    def entropy(p):
        return torch.special.entr(p).sum(-1)

    return entropy(q).mean(), entropy(q.mean(dim=0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_both_entropies_are_those_over_all_codes(temperature):
    layer, vectors = LFQ(5, temperature=temperature), torch.randn(40, 5, dtype=torch.float64)
    for ours, whole in zip(layer.entropies(vectors), entropies_by_enumeration(layer, vectors), strict=True):
        assert float(ours) == pytest.approx(float(whole), rel=1e-6)


def test_groups_of_bits_bound_the_entropy_of_the_mean_from_above():
    vectors = torch.randn(40, 5, dtype=torch.float64)
    vectors[:, 3] = vectors[:, 0]  # dependent bits in different groups: the bound is strict
    exact, grouped = LFQ(5).entropies(vectors)[1], LFQ(5, group_bits=3).entropies(vectors)[1]
    assert float(exact) < float(grouped) <= 5 * math.log(2)


def test_evenly_used_decided_bits_have_the_least_loss():
    signs = LFQ(3).look_up(torch.arange(8))
    decided, even = LFQ(3, temperature=0.01).entropies(signs)
    assert float(decided) == pytest.approx(0, abs=1e-6) and float(even) == pytest.approx(3 * math.log(2))
    undecided, _ = LFQ(3).entropies(torch.zeros(4, 3))
    assert float(undecided) == pytest.approx(3 * math.log(2))
    _, collapsed = LFQ(3, temperature=0.01).entropies(signs[:1].expand(8, 3))
    assert float(collapsed) == pytest.approx(0, abs=1e-6)


def test_the_entropies_have_the_gradient_of_their_values():
    layer, vectors = LFQ(4, group_bits=2), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.entropies, vectors)


def test_the_loss_weighs_commitment_entropy_and_diversity():
    z = torch.randn(2, 3, 4, 4)
    layer = LFQ(3, entropy_weight=0.3, commitment_weight=0.7, diversity=0.5)
    quant, loss, _ = layer(z)
    decided, even = layer.entropies(z.permute(0, 2, 3, 1).reshape(-1, 3))
    expected = 0.7 * (z - quant).pow(2).mean() + 0.3 * (decided - 0.5 * even)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_training_on_the_loss_alone_spreads_the_codes():
    """From vectors that all fall on one code, the diversity term brings the codebook into use."""
    z = (0.3 + 0.1 * torch.randn(4, 4, 8, 8)).requires_grad_()
    layer, optimizer = LFQ(4, commitment_weight=0.01, diversity=2.0), torch.optim.Adam([z], lr=0.05)
    before = layer(z)[2][2].unique().numel()
    for _ in range(60):
        optimizer.zero_grad()
        layer(z)[1].backward()
        optimizer.step()
    assert before <= 2 and layer(z)[2][2].unique().numel() >= 8


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 3, "temperature": 0.0}, {"bits": 3, "group_bits": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        LFQ(**options)
