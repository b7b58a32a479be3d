import pytest
import torch

from taming.modules.losses.adversarial import AdversarialLoss
from taming.modules.losses.lpips import LPIPS, normalize_tensor


def test_a_picture_is_at_distance_zero_from_itself_and_further_from_a_noisier_one(random_vgg):
    metric = LPIPS()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn_like(x)
    distances = [metric(x, (x + s * noise).clamp(-1, 1)).mean().item() for s in (0.0, 0.05, 0.2)]
    assert distances[0] == 0.0 < distances[1] < distances[2]
    assert metric(x, x).shape == (2, 1, 1, 1)


def test_the_linear_heads_of_the_lpips_distribution_are_loaded(random_vgg):
    """All weights of version 0.1 are positive, and its first head has a known sum."""
    import importlib.util
    from pathlib import Path

    path = (
        Path(importlib.util.find_spec("lpips").submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    )
    published = torch.load(path, weights_only=True, map_location="cpu")
    metric = LPIPS()
    assert torch.equal(metric.lin3.model[1].weight, published["lin3.model.1.weight"])
    assert (metric.lin0.model[1].weight >= 0).all()


def test_it_equals_the_lpips_distribution_itself(random_vgg):
    lpips = pytest.importorskip("lpips")
    peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    ours = LPIPS()
    ours.net.load_state_dict(peer.net.state_dict())
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(ours(x, y), peer(x, y), rtol=1e-4)


def test_it_stays_in_eval_mode_inside_a_training_model(random_vgg):
    model = torch.nn.ModuleDict({"loss": LPIPS()}).train()
    assert not model["loss"].training and not model["loss"].lin0.model[0].training
    assert not any(p.requires_grad for p in model.parameters())


def test_without_a_download_it_can_be_built_and_filled_but_not_used_empty(monkeypatch, tmp_path):
    monkeypatch.delenv("TAMING_VGG16", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    metric = LPIPS()
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(
        OSError, match=r"put it at .*vgg16-397923af\.pth, or name a local copy in .* TAMING_VGG16"
    ):
        metric(x, x)
    metric.load_state_dict(metric.state_dict())  # a published checkpoint brings the weights
    assert float(metric(x, x)) == 0.0


def test_features_are_scaled_to_unit_length_with_the_epsilon_outside_the_root():
    x = torch.zeros(1, 4, 1, 1)
    x[0, 0] = 1e-10
    assert float(normalize_tensor(x)[0, 0]) == pytest.approx(0.5)  # 1e-10 / (1e-10 + 1e-10)
    with pytest.raises(NotImplementedError, match="Did you mean 'vgg_lpips'"):
        LPIPS.from_pretrained("vgg_lpip")


def test_a_loss_without_its_weight_neither_builds_nor_fetches_it_but_takes_checkpoints_that_hold_it(
    random_vgg, monkeypatch
):
    options = {"disc_start": 0, "disc_ndf": 8, "disc_num_layers": 1}
    published = AdversarialLoss(**options, perceptual_weight=1.0).state_dict()
    assert any(name.startswith("perceptual_loss.net.") for name in published)
    monkeypatch.setattr("taming.modules.losses.lpips.vgg16", None)  # calling it would be an error
    loss = AdversarialLoss(**options, perceptual_weight=0.0)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"discriminator"}
    loss.load_state_dict(published, strict=True)
    judged = {name: value for name, value in published.items() if name.startswith("discriminator.")}
    assert all(torch.equal(value, judged[name]) for name, value in loss.state_dict().items())
    x = torch.rand(2, 3, 32, 32)
    assert loss.perceptual(x, x).tolist() == [0]
    loss.perceptual_weight = 1.0
    with pytest.raises(RuntimeError, match="perceptual_weight was 0 when this loss was built"):
        loss.perceptual(x, x)
