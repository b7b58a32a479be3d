"""The orders in which codes are read."""

import pytest
import torch

from taming.modules.transformer import permuter as p

TABLES = ["Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing"]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("side", [2, 8, 16])
def test_reverse_undoes_every_order(name, side):
    model = getattr(p, name)(side, side)
    x = torch.randint(0, 1000, (3, side * side))
    assert torch.equal(model(model(x), reverse=True), x)
    assert torch.equal(model.forward_shuffle_idx.sort().values, torch.arange(side * side))


def test_a_z_curve_reads_quarters_one_after_the_other():
    order = p.ZCurve(4, 4).forward_shuffle_idx.tolist()
    assert order == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert [p.mortonify(i, j) for i, j in ((0, 1), (1, 0), (3, 3), (2, 5))] == [1, 2, 15, 25]


def test_a_z_curve_of_an_oblong_map_is_an_order_too():
    model, x = p.ZCurve(3, 5), torch.arange(15)[None]
    assert torch.equal(model(model(x), reverse=True), x)


def test_a_spiral_starts_in_the_middle_and_moves_to_neighbours():
    order = p.SpiralOut(4, 4).forward_shuffle_idx
    places = torch.stack([order // 4, order % 4], dim=1)
    assert places[0].tolist() == [2, 1]
    assert (places.diff(dim=0).abs().sum(dim=1) == 1).all()
    assert torch.equal(p.SpiralIn(4, 4).forward_shuffle_idx, order.flip(0))


def test_subsampling_reads_a_coarse_map_first():
    assert p.Subsample(4, 4).forward_shuffle_idx[:4].tolist() == [0, 2, 8, 10]


def test_every_other_row_is_read_backwards():
    assert p.AlternateParsing(2, 3).forward_shuffle_idx.tolist() == [0, 1, 2, 5, 4, 3]


@pytest.mark.parametrize("name, size", [("Subsample", (4, 6)), ("Subsample", (6, 6)), ("SpiralOut", (3, 3)), ("SpiralIn", (2, 4))])  # fmt: skip
def test_maps_an_order_cannot_read_are_refused(name, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        getattr(p, name)(*size)


def test_codes_of_another_map_are_refused():
    with pytest.raises(ValueError, match=r"16\) codes, not \(1, 9\)"):
        p.ZCurve(4, 4)(torch.zeros(1, 9))
