import math

import pytest
import torch

from taming.modules.vqvae import codebook
from taming.modules.vqvae.codebook import CodebookUsage, code_counts, nearest_codes, perplexity_of
from taming.modules.vqvae.quantize import (
    FSQ,
    LFQ,
    EMAVectorQuantizer,
    GumbelQuantize,
    VectorQuantizer,
    VectorQuantizer2,
)

ALL = {
    "VectorQuantizer": lambda: VectorQuantizer(8, 3, beta=0.25),
    "VectorQuantizer2": lambda: VectorQuantizer2(8, 3, beta=0.25),
    "with angles": lambda: VectorQuantizer2(8, 3, beta=0.25, l2_norm=True),
    "GumbelQuantize": lambda: GumbelQuantize(3, 3, 8),
    "EMAVectorQuantizer": lambda: EMAVectorQuantizer(8, 3, beta=0.25),
    "FSQ": lambda: FSQ([2, 2, 2]),
    "LFQ": lambda: LFQ(3),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@every
def test_all_answer_alike_and_lead_from_indices_back_to_the_quantised_map(make):
    layer = make().eval()
    quant, loss, (perplexity, onehot, indices) = layer(torch.randn(2, 3, 4, 5))
    assert quant.shape == (2, 3, 4, 5) and loss.ndim == 0 and bool(loss.isfinite())
    assert indices.dtype == torch.int64 and indices.numel() == 40
    assert perplexity is None or 1 <= float(perplexity) <= 8
    assert onehot is None or torch.equal(onehot.argmax(dim=1), indices.flatten())
    assert torch.allclose(layer.get_codebook_entry(indices.reshape(-1), (2, 4, 5, 3)), quant, atol=1e-6)
    assert layer.get_codebook_entry(torch.tensor([[1, 2]]), None).shape == (1, 2, 3)


@every
@pytest.mark.parametrize("index", [8, -1])
def test_an_index_outside_the_codebook_is_named_with_the_range(make, index):
    with pytest.raises(
        IndexError, match=rf"code index {index} is outside this codebook of 8 codes \(0 to 7\)"
    ):
        make().get_codebook_entry(torch.tensor([0, index]), None)


@every
def test_a_wrong_number_of_indices_is_refused(make):
    with pytest.raises(AssertionError, match=r"5 indices of codes with 3 channels do not fill"):
        make().get_codebook_entry(torch.zeros(5, dtype=torch.long), (1, 2, 3, 3))


@every
def test_maps_with_other_channels_are_refused(make):
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\), not \(1, 6, 2, 2\)"):
        make()(torch.zeros(1, 6, 2, 2))


def test_the_search_in_blocks_finds_what_the_whole_matrix_shows(monkeypatch):
    z, codes = torch.randn(300, 6), torch.randn(40, 6)
    whole = nearest_codes(z, codes)
    assert torch.equal(whole, torch.cdist(z, codes).argmin(dim=1))
    monkeypatch.setattr(codebook, "SEARCH_BLOCK", 40 * 7)  # seven vectors at a time
    assert torch.equal(nearest_codes(z, codes), whole)


def test_the_first_of_equal_codes_is_taken_whatever_the_blocks(monkeypatch):
    codes = torch.tensor([[3.0, 3.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).repeat(9, 1)
    z = torch.tensor([[0.0, 5.0], [1.0, 0.0], [-2.0, 0.0]]).repeat(5, 1)
    for block in (1, 100, 1 << 24):
        monkeypatch.setattr(codebook, "SEARCH_BLOCK", block)
        assert nearest_codes(z, codes).tolist() == [0, 1, 3] * 5


def test_near_codes_are_told_apart_under_autocast():
    codes = torch.tensor([[1.0], [1.001], [1.002]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_codes(codes, codes).tolist() == [0, 1, 2]


def test_16384_codes_for_eight_maps_of_64_by_64_never_meet_in_one_matrix():
    """(n, k) would be 537 million numbers; a block of them is made at a time, and the backward pass keeps none."""
    made, saved = [], []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.append(max((t.numel() for t in [out] if isinstance(t, torch.Tensor)), default=0))
            return out

    layer = VectorQuantizer2(16384, 8, beta=0.25)
    z = torch.randn(8, 8, 64, 64, requires_grad=True)

    def keep(t):
        saved.append(t.numel())
        return t

    with Sizes(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        quant, loss, _ = layer(z)
    assert max(made) <= codebook.SEARCH_BLOCK
    assert 0 < max(saved) <= z.numel()
    (loss + quant.sum()).backward()
    assert bool(z.grad.isfinite().all())


def test_evenly_used_codes_have_their_number_as_perplexity():
    assert float(perplexity_of(torch.tensor([3, 3, 3, 0]))) == pytest.approx(3, rel=1e-4)
    assert float(perplexity_of(torch.tensor([5, 0]))) == pytest.approx(1, rel=1e-4)
    # one half and two quarters: entropy 1.5 bits
    assert float(perplexity_of(torch.tensor([2, 1, 1]))) == pytest.approx(math.sqrt(8), rel=1e-4)


def test_counts_are_those_of_bincount():
    indices = torch.randint(0, 9, (4, 5, 6))
    assert torch.equal(code_counts(indices, 12), torch.bincount(indices.flatten(), minlength=12))


def test_only_the_latest_codes_count_in_the_window():
    usage, stream = CodebookUsage(20, window=7), torch.randint(0, 20, (60,))
    for size, at in ((3, 0), (5, 3), (1, 8), (30, 9), (2, 39)):  # shorter and longer than the window
        usage.update(stream[at : at + size].reshape(1, -1))
        latest = stream[max(0, at + size - 7) : at + size]
        assert torch.equal(usage.counts, torch.bincount(latest, minlength=20))
        assert float(usage.share()) == pytest.approx(latest.unique().numel() / 20)


def test_without_a_window_every_code_counts():
    usage = CodebookUsage(4, window=None)
    for _ in range(3):
        usage.update(torch.tensor([[0, 1]]))
    assert usage.counts.tolist() == [3, 3, 0, 0]
    assert float(usage.share()) == 0.5 and float(usage.perplexity()) == pytest.approx(2, rel=1e-4)
