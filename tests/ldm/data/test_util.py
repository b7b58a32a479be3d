import pytest
import torch

from ldm.data.util import AddMiDaS


def test_the_network_s_picture_joins_the_sample_and_the_picture_stays():
    picture = torch.rand(384, 384, 3) * 2 - 1
    sample = {"jpg": picture.clone(), "txt": "a cat"}
    added = AddMiDaS("dpt_hybrid")(sample)
    assert set(added) == {"jpg", "txt", "midas_in"} and torch.equal(added["jpg"], picture)
    # at the network's own size nothing is scaled, and mean = deviation = 1/2 gives [-1, 1] back
    assert torch.allclose(torch.from_numpy(added["midas_in"]), picture.permute(2, 0, 1), atol=1e-6)


def test_a_sample_without_a_picture_is_named():
    with pytest.raises(KeyError, match="this one has: png"):
        AddMiDaS("dpt_large")({"png": 0})
