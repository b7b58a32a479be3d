import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sgm.modules import UNCONDITIONAL_CONFIG, GeneralConditioner
from sgm.modules.encoders.modules import AbstractEmbModel, IdentityEncoder
from sgm.util import instantiate_from_config

MODULES = "sgm.modules.encoders.modules."
IDENTITY = {"target": MODULES + "IdentityEncoder"}


def identity(key, **options):
    return {**IDENTITY, "input_key": key, **options}


def classes(**options):
    params = {"embed_dim": 3, "n_classes": 10}
    return {"target": MODULES + "ClassEmbedder", "params": params, "input_key": "cls", **options}


class Pair(AbstractEmbModel):
    """Two outputs from two entries, with a layer that behaves differently in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def forward(self, a, b):
        return [self.layer(a), b[:, None]]


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr("sgm.modules.encoders.modules.Pair", Pair, raising=False)
    return {"target": MODULES + "Pair", "input_keys": ["a", "b"]}


def test_the_number_of_axes_tells_the_kind_and_several_of_a_kind_are_joined():
    keys = ("v", "w", "text", "more", "map", "video")
    conditioner = GeneralConditioner([identity(k) for k in keys])
    shapes = ((2, 3), (2, 4), (2, 7, 5), (2, 7, 6), (2, 1, 8, 8), (2, 4, 3, 8, 8))
    batch = {k: torch.randn(shape) for k, shape in zip(keys, shapes, strict=True)}
    with pytest.raises(
        ValueError, match=r"for 'concat' must agree in all axes but axis 1; they are \(2, 1, 8"
    ):
        conditioner(batch)
    batch["video"] = torch.randn(2, 2, 8, 8)
    c = conditioner(batch)
    assert list(c) == ["vector", "crossattn", "concat"]
    assert torch.equal(c["vector"], torch.cat([batch["v"], batch["w"]], 1))
    assert torch.equal(c["crossattn"], torch.cat([batch["text"], batch["more"]], 2))
    assert torch.equal(c["concat"], torch.cat([batch["map"], batch["video"]], 1))
    assert GeneralConditioner([identity("v")])({"v": torch.randn(2, 4, 3, 8, 8)})["concat"].ndim == 5
    labels = torch.tensor([3, 1])  # whole numbers, for a network with a table of classes
    for rate, kept in ((0.0, [3, 1]), (1.0, [0, 0])):
        vector = GeneralConditioner([identity("v", ucg_rate=rate)])({"v": labels})["vector"]
        assert vector.dtype == torch.long and vector.tolist() == kept


def test_views_and_motion_keep_their_own_names():
    conditioner = GeneralConditioner([identity("cond_view"), identity("cond_motion"), identity("cond_view")])
    x = torch.randn(2, 4, 8, 8)
    c = conditioner({"cond_view": x, "cond_motion": 2 * x})
    assert torch.equal(c["cond_view"], torch.cat([x, x], 1)) and torch.equal(c["cond_motion"], 2 * x)


def test_an_embedder_may_read_several_entries_and_give_several_outputs(pair):
    conditioner = GeneralConditioner([pair])
    c = conditioner({"a": torch.randn(4, 2), "b": torch.randn(4, 6)})
    assert c["vector"].shape == (4, 2) and c["crossattn"].shape == (4, 1, 6)


def test_dropping_zeroes_whole_samples_at_its_rate_in_training_and_evaluation():
    conditioner = GeneralConditioner([identity("x", ucg_rate=0.3)])
    x = torch.ones(4000, 2, 2)
    for mode in (True, False):
        c = conditioner.train(mode)({"x": x})["crossattn"]
        assert set(c.flatten(1).sum(1).tolist()) == {0.0, 4.0}
        # the share's standard deviation is √(0.3 · 0.7 / 4000) = 0.0072
        assert 1 - c.mean().item() == pytest.approx(0.3, abs=4 * 0.0072)
    torch.manual_seed(3)
    kept = torch.bernoulli(torch.full((4000,), 0.7))
    torch.manual_seed(3)
    assert torch.equal(conditioner({"x": x})["crossattn"], kept[:, None, None] * x)


def test_the_older_way_of_dropping_replaces_entries_in_the_batch_following_numpys_seed():
    conditioner = GeneralConditioner([classes(ucg_rate=0.5, legacy_ucg_value=9), identity("txt")])
    before = torch.get_rng_state()
    batches = []
    for _ in range(2):
        np.random.seed(1)
        batches.append({"cls": torch.zeros(40, dtype=torch.long), "txt": torch.zeros(40, 2)})
        c = conditioner(batches[-1])
        assert torch.equal(c["vector"][:, :3], conditioner.embedders[0](batches[-1]["cls"]))
    assert torch.equal(batches[0]["cls"], batches[1]["cls"])
    assert set(batches[0]["cls"].tolist()) == {0, 9}
    assert torch.equal(torch.get_rng_state(), before)
    texts = {"txt": ("a", "b", "c")}
    text = GeneralConditioner([identity("txt", ucg_rate=1.0, legacy_ucg_value="")])
    with pytest.raises(
        TypeError, match=r"emb_models\[0\] \(IdentityEncoder\) gives a str; a condition must be"
    ):
        text(texts)
    assert texts["txt"] == ["", "", ""]


def test_both_conditions_of_guidance_come_without_dropping_and_the_rates_return():
    conditioner = GeneralConditioner([identity("x", ucg_rate=1.0), classes(ucg_rate=1.0, legacy_ucg_value=9)])
    conditioner.embedders[0].inner = IdentityEncoder()
    conditioner.embedders[0].inner.ucg_rate = 0.7
    seen = []
    conditioner.embedders[0].register_forward_hook(lambda m, *_: seen.append(m.inner.ucg_rate))
    batch, other = ({"x": torch.full((2, 2), v), "cls": torch.tensor([1, 2])} for v in (1.0, 2.0))
    c, uc = conditioner.get_unconditional_conditioning(batch, other, ["cls"], ["x"])
    assert not c["vector"][:, :2].any() and torch.equal(uc["vector"][:, :2], other["x"])
    assert c["vector"][:, 2:].any() and not uc["vector"][:, 2:].any()
    assert seen == [0.0, 0.0] and batch["cls"].tolist() == [1, 2]
    again = conditioner.get_unconditional_conditioning(batch)
    assert all(torch.equal(again[0][k], again[1][k]) for k in again[0])
    with pytest.raises(KeyError):
        conditioner.get_unconditional_conditioning({"x": batch["x"]})
    assert [e.ucg_rate for e in conditioner.embedders] == [1.0, 1.0]
    assert conditioner.embedders[0].inner.ucg_rate == 0.7


def test_a_frozen_embedder_never_trains_and_a_trainable_one_does(pair):
    conditioner = GeneralConditioner([pair, classes(is_trainable=True)]).train()
    frozen, trained = conditioner.embedders
    assert not frozen.layer.training and not frozen.layer[1].training and trained.training
    batch = {"a": torch.randn(8, 2), "b": torch.randn(8, 1), "cls": torch.arange(8)}
    c = conditioner(batch)
    assert torch.equal(c["vector"][:, :2], frozen.layer[0](batch["a"]))  # no dropout
    c["vector"].sum().backward()
    assert trained.embedding.weight.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not conditioner.eval().embedders[1].training


def test_configurations_of_omegaconf_and_the_one_without_conditions_build():
    config = OmegaConf.create(
        {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [classes()]}}
    )
    assert instantiate_from_config(config)({"cls": torch.tensor([1])})["vector"].shape == (1, 3)
    assert instantiate_from_config(UNCONDITIONAL_CONFIG)({"jpg": 1}) == {}


def test_wrong_configurations_and_batches_are_named(pair, caplog):
    with pytest.raises(AssertionError, match=r"emb_models\[1\]: Identity must derive from AbstractEmbModel"):
        GeneralConditioner([identity("x"), {"target": "torch.nn.Identity", "input_key": "x"}])
    with pytest.raises(KeyError, match=r"emb_models\[0\] \(IdentityEncoder\) needs input_key, or input_keys"):
        GeneralConditioner([IDENTITY])
    with pytest.raises(KeyError, match="Expected key `target`"):
        GeneralConditioner([{"input_key": "x"}])
    with pytest.raises(ValueError, match=r"emb_models\[0\] \(Pair\): legacy_ucg_value needs one input_key"):
        GeneralConditioner([{**pair, "legacy_ucg_value": 0}])
    with caplog.at_level(logging.WARNING):
        conditioner = GeneralConditioner([identity("txt", ucg_rat=0.1)])
    assert "emb_models[0].ucg_rat has no effect. Did you mean 'ucg_rate'?" in caplog.text
    with pytest.raises(
        KeyError, match=r"no 'txt', which emb_models\[0\] \(IdentityEncoder\) reads. Did you mean 'text'"
    ):
        conditioner({"text": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"gives a tensor \(1, 1, 1, 1, 1, 1\); a condition has 1 to 5 axes"):
        conditioner({"txt": torch.ones((1,) * 6)})


def test_the_embedders_cost_no_hub_library_until_one_is_built():
    code = "import sys, sgm.modules.encoders.modules; print(sorted({'transformers', 'open_clip', 'kornia'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
