import math

import pytest
import torch

from taming.modules.losses.segmentation import BCELoss, BCELossWithQuant


def test_undecided_logits_cost_log_two_and_there_is_nothing_to_log():
    loss, log = BCELoss()(torch.zeros(2, 5, 4, 4), torch.ones(2, 5, 4, 4))
    assert float(loss) == pytest.approx(math.log(2)) and log == {}


def test_the_quantisers_loss_is_added_with_its_weight_and_logged_as_its_mean():
    prediction, target, qloss = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor([1.0, 3.0])
    loss, log = BCELossWithQuant(codebook_weight=0.5)(qloss, target, prediction, "val")
    assert loss.tolist() == pytest.approx(
        [math.log(2) + 0.5, math.log(2) + 1.5]
    )  # not averaged, as published
    assert {k: float(v) for k, v in log.items()} == pytest.approx(
        {"val/total_loss": math.log(2) + 1, "val/bce_loss": math.log(2), "val/quant_loss": 2.0}
    )


def test_the_gradient_is_that_of_a_sigmoid():
    prediction = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.randint(0, 2, (1, 3, 2, 2)).float()
    loss, log = BCELossWithQuant()(torch.tensor(0.0), target, prediction, "train")
    loss.backward()
    expected = (prediction.detach().sigmoid() - target) / target.numel()
    assert torch.allclose(prediction.grad, expected, atol=1e-7)
    assert not any(v.requires_grad for v in log.values())


def test_maps_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="size"):
        BCELoss()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 4, 4))
