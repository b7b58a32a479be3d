"""Colour tokens."""

import pytest
import torch

from taming.modules.transformer.mingpt import KMeans


def test_well_separated_clusters_are_found_and_pictures_come_back():
    centres = torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 0.0], [0.0, 10.0, 0.0]])
    points = centres.repeat(30, 1) + 0.01 * torch.randn(90, 3)
    model = KMeans(ncluster=3, niter=20)
    assert not model.is_initialized()
    for seed in range(20):  # Lloyd's algorithm may begin with two centres in one cluster
        torch.manual_seed(seed)
        model.initialize(points)
        if torch.cdist(centres, model.C).min(dim=1).values.max() < 0.1:
            break
    assert torch.cdist(centres, model.C).min(dim=1).values.max() < 0.1
    assert model.is_initialized()
    image = points[:12].t().reshape(1, 3, 3, 4)
    tokens = model(image)
    assert tokens.shape == (1, 12)
    torch.testing.assert_close(model(tokens, reverse=True, shape=(3, 3, 4)), image, atol=0.1, rtol=0)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="4 centres of 3 channels"):
        KMeans(ncluster=4).initialize(torch.zeros(3, 3))
