import numpy as np
import pytest
import torch

from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.modules.vqvae.remap import Remap


@pytest.fixture
def used(tmp_path):
    def save(codes):
        np.save(tmp_path / "used.npy", np.array(codes))
        return str(tmp_path / "used.npy")

    return save


def test_remapping_renumbers_used_codes_and_back(used):
    remap = Remap(8, used([1, 4, 6]), "extra")
    assert remap.re_embed == 4 and remap.unknown_index == 3
    positions = remap.remap_to_used(torch.tensor([[1, 4, 6, 5]]))
    assert positions.tolist() == [[0, 1, 2, 3]]
    kept = positions.clone()
    assert remap.unmap_to_all(positions).tolist() == [[1, 4, 6, 1]]
    assert torch.equal(positions, kept)  # the caller's tensor is left alone
    with pytest.raises(AssertionError, match="batch axis"):
        remap.remap_to_used(torch.tensor([1, 4]))


def test_used_codes_need_no_order_and_the_first_of_a_double_counts(used):
    remap = Remap(8, used([6, 1, 4, 1]), 2)
    inds = torch.arange(8).repeat(2, 1)
    matches = inds[..., None] == remap.used  # the plain definition, at the price of a matrix
    expected = torch.where(matches.any(-1), matches.long().argmax(-1), 2)
    assert torch.equal(remap.remap_to_used(inds), expected)


def test_unknown_codes_become_random_used_ones_under_the_global_seed(used):
    remap = Remap(8, used([1, 4, 6]), "random")
    torch.manual_seed(5)
    drawn = remap.remap_to_used(torch.full((1, 200), 5))
    torch.manual_seed(5)
    assert torch.equal(drawn[0], torch.randint(0, 3, (200,)))


def test_the_used_codes_are_part_of_the_state(used):
    assert Remap(8, used([1, 4, 6]), "random").state_dict()["used"].tolist() == [1, 4, 6]


def test_codes_are_looked_up_by_their_new_number(used):
    layer = VectorQuantizer2(8, 2, beta=0.25, remap=used([1, 4, 6]), unknown_index="extra")
    codes = layer.embedding.weight[[1, 4, 6, 1]]  # the extra number stands for the first
    assert torch.equal(layer.get_codebook_entry(torch.arange(4), None), codes)
    as_map = layer.get_codebook_entry(torch.arange(4), (2, 1, 2, 2))
    assert torch.equal(as_map, codes.reshape(2, 1, 2, 2).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("codes", "complaint"), [([1, 9], "it holds 1 to 9"), ([], "it is empty")])
def test_a_list_of_codes_that_do_not_exist_is_refused(used, codes, complaint):
    with pytest.raises(ValueError, match=f"used codes out of 0 to 7; {complaint}"):
        Remap(8, used(codes), "random")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npy"):
        Remap(8, str(tmp_path / "nowhere.npy"), "random")
