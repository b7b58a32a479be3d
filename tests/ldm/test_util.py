import numpy as np
import pytest
import torch
from torch import nn

from ldm.util import AdamWwithEMAandWings, autocast, isimage, ismap, log_txt_as_img, parallel_data_prefetch


def test_captions_become_black_on_white_pictures():
    pictures = log_txt_as_img(
        (128, 64), ["", "red heart", "a caption longer than the line of twenty characters"]
    )
    assert pictures.shape == (3, 3, 64, 128) and pictures.dtype == torch.float32
    ink = (pictures < 0).flatten(1).sum(1)
    assert ink[0] == 0 < ink[1] < ink[2]
    assert pictures.min() == -1.0 and pictures.max() == 1.0
    several = log_txt_as_img((128, 64), [["red heart", "the same in other words"], ()])  # the first is drawn
    assert torch.equal(several, pictures[[1, 0]])


def test_maps_and_images_are_told_apart_by_their_channels():
    assert (
        isimage(torch.zeros(1, 3, 2, 2))
        and isimage(torch.zeros(1, 1, 2, 2))
        and not isimage(torch.zeros(1, 4, 2, 2))
    )
    assert ismap(torch.zeros(1, 4, 2, 2)) and not ismap(torch.zeros(4, 2, 2)) and not ismap("text")


def square(part):
    return np.asarray(part) ** 2


@pytest.mark.parametrize("processes", [True, False])
def test_prefetching_keeps_the_order(processes):
    assert parallel_data_prefetch(square, np.arange(10), 3, cpu_intensive=processes).tolist() == [
        i * i for i in range(10)
    ]


def test_prefetching_lists_survives_fewer_chunks_than_workers():
    def tagged(part, worker):
        return [(worker, v) for v in part]

    out = parallel_data_prefetch(
        tagged, list(range(5)), 4, target_data_type="list", cpu_intensive=False, use_worker_id=True
    )
    assert [v for _, v in out] == list(range(5))
    with pytest.raises(ValueError, match="cannot become a list"):
        parallel_data_prefetch(square, np.arange(3), 2, target_data_type="list")
    with pytest.raises(TypeError, match="not int"):
        parallel_data_prefetch(square, 5, 2)
    with pytest.raises(ValueError, match="must be 'ndarray' or 'list'"):
        parallel_data_prefetch(square, [1], 2, target_data_type="tensor")


def test_the_optimizers_average_follows_its_own_rate_over_plain_adamw():
    """Weights equal torch's AdamW; the average moves by min(decay, 1 - 1/n), that is, it is a running mean at first."""
    torch.manual_seed(0)
    ours, peer = nn.Linear(3, 2), nn.Linear(3, 2)
    peer.load_state_dict(ours.state_dict())
    optimizers = (
        AdamWwithEMAandWings(ours.parameters(), lr=0.01, weight_decay=0.1, ema_decay=0.9),
        torch.optim.AdamW(peer.parameters(), lr=0.01, weight_decay=0.1),
    )
    seen = []
    for _ in range(4):
        x = torch.randn(5, 3)
        for layer, optimizer in zip((ours, peer), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        seen.append(ours.weight.detach().clone())
        assert torch.allclose(ours.weight, peer.weight, atol=1e-6)
        average = optimizers[0].state[ours.weight]["param_exp_avg"]
        assert torch.allclose(average, torch.stack(seen).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1"):
        AdamWwithEMAandWings(ours.parameters(), ema_decay=1.5)


def test_autocast_decorator_passes_arguments_and_results():
    assert autocast(lambda a, b=1: a + b)(2, b=3) == 5
