"""How networks are called, and both bridges to chapter two."""

import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import EDMDiscretization, LegacyDDPMDiscretization
from sgm.modules.diffusionmodules.wrappers import (
    OPENAIUNETWRAPPER,
    DiscreteModel,
    IdentityWrapper,
    LatentDiffusionDenoiser,
    OpenAIWrapper,
)
from taming.util import get_obj_from_str, instantiate_from_config

BASE = "sgm.modules.diffusionmodules."


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x, **options):
        self.calls.append(options)
        return x * self.weight


def test_conditions_reach_the_unet_under_its_names():
    net = Recorder()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    concat, context, y = torch.ones(2, 2, 4, 4), torch.ones(2, 7, 5), torch.ones(2, 9)
    out = OpenAIWrapper(net)(x, t, {"concat": concat, "crossattn": context, "vector": y}, num_video_frames=2)
    assert torch.equal(out, torch.cat([x, concat], dim=1))
    assert net.calls[0] == {"timesteps": t, "context": context, "y": y, "num_video_frames": 2}
    OpenAIWrapper(net)(x, t, {"cond_view": y})
    assert net.calls[1] == {"timesteps": t, "context": None, "y": None, "cond_view": y, "cond_motion": None}
    assert get_obj_from_str(OPENAIUNETWRAPPER) is OpenAIWrapper


def test_pictures_of_another_size_cannot_be_joined():
    with pytest.raises(ValueError, match="batch, height and width must be the same"):
        OpenAIWrapper(Recorder())(torch.ones(2, 3, 4, 4), torch.ones(2), {"concat": torch.ones(2, 1, 8, 8)})


def test_the_identity_wrapper_passes_everything_on():
    net = Recorder()
    assert torch.equal(IdentityWrapper(net)(torch.ones(2), a=1), torch.ones(2)) and net.calls == [{"a": 1}]


def test_compiling_keeps_the_names_of_weights(monkeypatch):
    compiled = []
    monkeypatch.setattr(Recorder, "compile", lambda self: compiled.append(self))
    for kind in (IdentityWrapper, OpenAIWrapper):
        net = Recorder()
        wrapped = kind(net, compile_model=True)
        assert list(wrapped.state_dict()) == ["diffusion_model.weight"] and compiled.pop() is net


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_a_model_of_chapter_two_denoises(gaussian_denoiser, parameterization):
    """The exact denoiser of N(m, s²) in the σ view: (s² x + σ² m) / (s² + σ²)."""
    model = gaussian_denoiser(parameterization)
    bridge = LatentDiffusionDenoiser(model)
    sigma = bridge.sigmas[[10, 2000, 3999]]
    x, s = torch.randn(3, 1, 4, 4) * 5, sigma.reshape(-1, 1, 1, 1)
    expected = (model.std**2 * x + s**2 * model.mean) / (model.std**2 + s**2)
    assert torch.allclose(bridge(x, sigma), expected, atol=1e-4)


def test_a_rectified_flow_denoises(tiny):
    config = tiny.latent_diffusion(
        parameterization="flow",
        conditioning_key=None,
        unet={"use_spatial_transformer": False, "context_dim": None},
    )
    model = instantiate_from_config(config).eval()
    x_0, eps, tau = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), 600 / 1000
    model.apply_model = lambda x, t, cond: (
        (
            torch.testing.assert_close(x, (1 - tau) * x_0 + tau * eps),
            torch.testing.assert_close(t, torch.tensor([599, 599])),
        )
        and (eps - x_0)
    )
    sigma = torch.full((2,), tau / (1 - tau))
    assert torch.allclose(LatentDiffusionDenoiser(model)(x_0 + sigma[0] * eps, sigma), x_0, atol=1e-4)


def test_zero_terminal_snr_begins_at_a_large_finite_level(tiny):
    model = instantiate_from_config(
        tiny.latent_diffusion(parameterization="v", zero_terminal_snr=True, conditioning_key=None)
    )
    assert float(model.alphas_cumprod[-1]) == 0
    bridge = LatentDiffusionDenoiser(model)
    assert torch.isfinite(bridge.sigmas).all() and float(bridge.discretization(3)[0]) == 4096.0
    model.apply_model = lambda x, t, cond: -torch.ones_like(x)  # v = -x_0 in pure noise
    out = bridge(4096.0 * torch.randn(1, 3, 8, 8), torch.tensor([4096.0]))
    assert torch.allclose(out, torch.ones_like(out), atol=2e-3)


def test_conditions_of_both_chapters_reach_the_model(gaussian_denoiser):
    model, seen = gaussian_denoiser(), []
    model.apply_model = lambda x, t, cond: (seen.append(cond), x)[1]
    bridge = LatentDiffusionDenoiser(model)
    x, sigma = torch.ones(1, 1, 2, 2), torch.ones(1)
    context, picture, y = torch.ones(1, 7, 5), torch.ones(1, 1, 2, 2), torch.ones(1, 9)
    for cond in (
        context,
        {"c_crossattn": [context]},
        {"crossattn": context, "concat": picture, "vector": y},
        None,
    ):
        bridge(x, sigma, cond)
    assert seen == [
        context,
        {"c_crossattn": [context]},
        {"c_crossattn": [context], "c_concat": [picture], "c_adm": y},
        None,
    ]
    with pytest.raises(ValueError, match=r"knows no condition \['frames'\]"):
        bridge(x, sigma, {"crossattn": context, "frames": 2})


def test_times_between_the_steps_are_interpolated_where_wanted(gaussian_denoiser):
    model, seen = gaussian_denoiser(), []
    model.apply_model = lambda x, t, cond: (seen.append(t), x)[1]
    smooth, rounded = LatentDiffusionDenoiser(model, quantize=False), LatentDiffusionDenoiser(model)
    between = (smooth.sigmas[100] * smooth.sigmas[101]).sqrt()[None]
    smooth(torch.ones(1, 1), between)
    rounded(torch.ones(1, 1), between * 1.0001)
    smooth(torch.ones(1, 1), torch.tensor([1e3]))
    assert float(seen[0]) == pytest.approx(100.5, abs=0.02)
    assert seen[1].tolist() == [101] and seen[1].dtype == torch.int64
    assert float(seen[2]) == pytest.approx(3999, abs=0.02)


def test_the_bridge_leaves_the_models_weights_to_the_model(tiny):
    model = instantiate_from_config(tiny.latent_diffusion())
    assert list(LatentDiffusionDenoiser(model).state_dict()) == ["sigmas"]


def test_models_that_predict_something_else_are_refused(gaussian_denoiser):
    model = gaussian_denoiser()
    model.parameterization = "score"
    with pytest.raises(ValueError, match="parameterization='score'"):
        LatentDiffusionDenoiser(model)


@pytest.mark.parametrize("scaling", ["EpsScaling", "VScaling", "EDMScaling"])
def test_a_denoiser_becomes_a_model_that_predicts_the_noise(scaling):
    denoiser = DiscreteDenoiser(
        {"target": f"{BASE}denoiser_scaling.{scaling}"},
        1000,
        {"target": BASE + "discretizer.LegacyDDPMDiscretization"},
    )
    labels = []

    def network(x, label, cond):
        labels.append(label)
        return torch.tanh(x)

    model = DiscreteModel(lambda x, s, c: denoiser(network, x, s, c), denoiser.sigmas)
    assert torch.allclose(
        model.alphas_cumprod, torch.tensor(LegacyDDPMDiscretization().alphas_cumprod).float(), atol=1e-6
    )
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([3, 900])
    eps = model.apply_model(x, t)
    sigma = denoiser.sigmas[t].reshape(-1, 1, 1, 1)
    x_0 = (1 + sigma**2).sqrt() * x - sigma * eps
    assert torch.allclose(
        x_0, denoiser(network, x * (1 + sigma**2).sqrt(), denoiser.sigmas[t], None), atol=1e-4
    )
    if scaling != "EDMScaling":
        assert labels[0].tolist() == [3, 900]
    if scaling == "EpsScaling":
        assert torch.allclose(eps, torch.tanh(x), atol=1e-4)


def test_times_between_the_steps_of_a_continuous_denoiser():
    sigmas = EDMDiscretization(sigma_max=700.0)(50, do_append_zero=False, flip=True)
    seen = []
    model = DiscreteModel(lambda x, s, c: (seen.append(s), x)[1], sigmas)
    model.apply_model(torch.ones(3, 1), torch.tensor([10.0, 10.5, 49.0]))
    expected = [float(sigmas[10]), float((sigmas[10] * sigmas[11]).sqrt()), 700.0]
    assert seen[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_steps_must_ascend_from_above_zero():
    for sigmas in (torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="ascends from above 0"):
            DiscreteModel(lambda x, s, c: x, sigmas)
