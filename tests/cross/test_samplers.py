"""The discrete view of chapter two and the σ view of chapter three give the same samples."""

import math

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.unipc import UniPCSampler
from sgm.modules.diffusionmodules import sampling
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.guiders import VanillaCFG
from sgm.modules.diffusionmodules.wrappers import DiscreteModel, LatentDiffusionDenoiser
from taming.util import instantiate_from_config

SHAPE = (3, 8, 8)


class Levels:
    """Given noise levels, whatever is asked for."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def __call__(self, n, device="cpu", **options):
        return self.sigmas.to(device)


def latent_diffusion(tiny, **options):
    model = instantiate_from_config(tiny.latent_diffusion(**options)).eval().requires_grad_(False)
    torch.manual_seed(1)
    for p in model.parameters():  # the last layer of a new network gives zeros
        torch.nn.init.normal_(p, std=(p[0].numel() if p.ndim > 1 else 100) ** -0.5)
    return model


def assert_same(found, expected, tolerance=1e-4):
    """Relative to the largest number."""
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ddim_without_noise_is_eulers_method(tiny, parameterization, scale):
    """Song et al. 2021, section 4.3: in x / √ᾱ and σ, DDIM is Euler's method. DDIM ends at ᾱ_0, not at 1."""
    model = latent_diffusion(tiny, parameterization=parameterization)
    x_T, c, uc = torch.randn(2, *SHAPE), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    ddim = DDIMSampler(model)
    expected, _ = ddim.sample(
        10,
        2,
        SHAPE,
        c,
        x_T=x_T,
        verbose=False,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=uc,
    )
    bridge = LatentDiffusionDenoiser(model)
    visited = np.append(ddim.ddim_timesteps[::-1], 0)
    sigmas = bridge.sigmas[torch.from_numpy(visited.copy())]
    sampler = sampling.EulerEDMSampler(
        discretization_config=Levels(sigmas), num_steps=10, guider_config=VanillaCFG(scale)
    )
    found = sampler(bridge, x_T, c, uc) / (1 + sigmas[-1] ** 2).sqrt()
    assert_same(found, expected)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 10, 20])
def test_dpm_solver_2m_is_the_same_in_both_chapters(tiny, parameterization, steps):
    model = latent_diffusion(tiny, parameterization=parameterization)
    x_T, c = torch.randn(2, *SHAPE), torch.randn(2, 5, 8)
    expected, _ = DPMSolverSampler(model).sample(
        steps, 2, SHAPE, c, x_T=x_T, verbose=False, time_spacing="trailing"
    )
    bridge = LatentDiffusionDenoiser(model)
    found = sampling.DPMPP2MSampler(discretization_config=bridge.discretization, num_steps=steps)(
        bridge, x_T, c
    )
    assert_same(found, expected)


def test_dpm_solver_of_order_3_is_the_noiseless_3m_sde_in_both_chapters(tiny):
    model = latent_diffusion(tiny)
    x_T, c = torch.randn(2, *SHAPE), torch.randn(2, 5, 8)
    solver = DPMSolverSampler(model, order=3, solver_type="taylor", lower_order_final=False)
    expected, _ = solver.sample(10, 2, SHAPE, c, x_T=x_T, verbose=False, time_spacing="trailing")
    bridge = LatentDiffusionDenoiser(model)
    sampler = sampling.DPMPP3MSDESampler(discretization_config=bridge.discretization, num_steps=10, eta=0.0)
    assert_same(sampler(bridge, x_T, c), expected)


@pytest.mark.parametrize(
    ("key", "condition"),
    [
        ("crossattn", lambda: torch.randn(2, 5, 8)),
        ("concat", lambda: torch.randn(2, 2, 8, 8)),
        ("hybrid", lambda: {"c_crossattn": [torch.randn(2, 5, 8)], "c_concat": [torch.randn(2, 2, 8, 8)]}),
    ],
)
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0", "flow"])
def test_models_of_chapter_two_run_under_every_sampler(tiny, key, condition, parameterization):
    unet = {"in_channels": 3 if key == "crossattn" else 5} | (
        {"use_spatial_transformer": False, "context_dim": None} if key == "concat" else {}
    )
    model = latent_diffusion(tiny, parameterization=parameterization, conditioning_key=key, unet=unet)
    bridge = LatentDiffusionDenoiser(model)
    for name in ("EulerEDMSampler", "HeunEDMSampler", "EulerAncestralSampler", "DPMPP2SAncestralSampler", "DPMPP2MSampler", "LinearMultistepSampler", "DPMPP2MSDESampler", "DPMPP3MSDESampler"):  # fmt: skip
        sampler = getattr(sampling, name)(
            discretization_config=bridge.discretization, num_steps=3, guider_config=VanillaCFG(2.0)
        )
        out = sampler(bridge, torch.randn(2, *SHAPE), condition(), condition())
        assert out.shape == (2, *SHAPE) and torch.isfinite(out).all(), name


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("EulerEDMSampler", {}, 1), ("HeunEDMSampler", {}, 2), ("EulerAncestralSampler", {"eta": 0.0}, 1),
        ("DPMPP2MSampler", {}, 2), ("DPMPP2MSDESampler", {"eta": 0.0}, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_samplers_keep_their_order_over_a_model_of_chapter_two(
    gaussian_denoiser, name, options, order, parameterization
):
    """From ᾱ of the last step to that of step 1500; between steps chosen evenly in ln σ, rounded to the table."""
    model = gaussian_denoiser(parameterization)
    bridge, x = LatentDiffusionDenoiser(model), torch.randn(8, 1, 4, 4)

    def error(n):
        wanted = torch.logspace(*(math.log10(float(bridge.sigmas[i])) for i in (3999, 1500)), n + 1)
        sigmas = bridge.sigmas[bridge.sigma_to_idx(wanted)]
        out = getattr(sampling, name)(discretization_config=Levels(sigmas), num_steps=n, **options)(
            bridge, x, None
        )
        end = 1500
        found = out / (1 + sigmas[-1] ** 2).sqrt()
        exact = model.exact(x, model.alphas_cumprod[-1], model.alphas_cumprod[end])
        return float((found - exact).abs().max())

    assert math.log2(error(8) / error(16)) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler, DPMSolverSampler, UniPCSampler])
def test_denoisers_of_chapter_three_run_under_the_samplers_of_chapter_two(tiny, sampler_class):
    """There and back again: the samples are those of the model itself."""
    model = latent_diffusion(tiny)
    bridge = LatentDiffusionDenoiser(model)
    back = DiscreteModel(bridge, bridge.sigmas)
    x_T, c, uc = torch.randn(2, *SHAPE), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    options = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": uc,
        "verbose": False,
        "x_T": x_T,
    }
    if sampler_class in (DPMSolverSampler, UniPCSampler):
        options["time_spacing"] = "trailing"  # whole steps
    expected, found = (sampler_class(m).sample(6, 2, SHAPE, c, **options)[0] for m in (model, back))
    assert_same(found, expected)


@pytest.mark.parametrize(("scaling", "parameterization"), [("EpsScaling", "eps"), ("VScaling", "v")])
def test_both_engines_denoise_alike(tiny, scaling, parameterization):
    """One network under a discrete denoiser of chapter three and as a model of chapter two."""
    model = latent_diffusion(tiny, parameterization=parameterization, linear_start=0.00085, linear_end=0.0120)
    base = "sgm.modules.diffusionmodules."
    denoiser = DiscreteDenoiser(
        {"target": f"{base}denoiser_scaling.{scaling}"},
        1000,
        {"target": base + "discretizer.LegacyDDPMDiscretization"},
    )
    bridge = LatentDiffusionDenoiser(model)
    assert torch.allclose(bridge.sigmas, denoiser.sigmas, rtol=1e-4)
    c, sigma = torch.randn(2, 5, 8), torch.tensor([0.7, 11.0])
    x = torch.randn(2, *SHAPE) * sigma.reshape(-1, 1, 1, 1)
    expected = denoiser(
        lambda z, t, cond: model.model.diffusion_model(z, t, context=cond["crossattn"]),
        x,
        sigma,
        {"crossattn": c},
    )
    assert_same(bridge(x, sigma, c), expected)
