"""Samplers on Gaussian data, whose denoiser and probability flow are known, against diffusers, and their manners."""

import math

import pytest
import torch

from sgm.modules.diffusionmodules import sampling
from sgm.modules.diffusionmodules.discretizer import EDMDiscretization, KarrasDiscretization
from sgm.modules.diffusionmodules.guiders import VanillaCFG
from sgm.modules.diffusionmodules.sampling_utils import get_ancestral_step, linear_multistep_coeff

MEAN, STD = 0.5, 0.7
NAMES = [
    "EulerEDMSampler", "HeunEDMSampler", "EulerAncestralSampler", "DPMPP2SAncestralSampler", "DPMPP2MSampler", "LinearMultistepSampler",
    "DPMPP2MSDESampler", "DPMPP3MSDESampler",
]  # fmt: skip


def gaussian(x, sigma, cond):
    """The exact denoiser of N(MEAN, STD²)."""
    s = sigma.reshape(-1, *((1,) * (x.ndim - 1)))
    return (STD**2 * x + s**2 * MEAN) / (STD**2 + s**2)


def make(name, discretization=None, steps=6, **options):
    return getattr(sampling, name)(
        discretization_config=discretization or EDMDiscretization(), num_steps=steps, **options
    )


class Levels:
    """Given noise levels, whatever is asked for."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def __call__(self, n, device="cpu", **options):
        return self.sigmas.to(device)


# --------------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("EulerEDMSampler", {}, 1),
        ("HeunEDMSampler", {}, 2),
        ("EulerAncestralSampler", {"eta": 0.0}, 1),
        ("DPMPP2SAncestralSampler", {"eta": 0.0}, 2),
        ("DPMPP2MSampler", {}, 2),
        ("LinearMultistepSampler", {"order": 1}, 1),
        ("LinearMultistepSampler", {"order": 2}, 2),
        ("DPMPP2MSDESampler", {"eta": 0.0}, 2),
        ("DPMPP2MSDESampler", {"eta": 0.0, "solver_type": "taylor"}, 2),
        ("DPMPP3MSDESampler", {"eta": 0.0}, 2),
    ],
)
def test_samplers_have_the_order_they_claim(name, options, order):
    """Half the steps' length divides the error by 2^order; multistep methods begin with one step of order 1."""
    x = torch.randn(8, 4, dtype=torch.float64)

    def error(n):
        sigmas = torch.logspace(math.log10(20.0), math.log10(0.05), n + 1, dtype=torch.float64)
        out = make(name, Levels(sigmas), n, **options)(gaussian, x, None)
        start = x * (1 + sigmas[0] ** 2).sqrt()
        spread = ((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2)).sqrt()
        return float((out - (MEAN + spread * (start - MEAN))).abs().max())

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.3)


def test_higher_orders_are_more_exact_at_the_same_cost():
    x = torch.randn(8, 4, dtype=torch.float64)
    sigmas = torch.cat(
        [torch.logspace(1.3, -1.5, 20, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    )

    def error(name, **options):
        out = make(name, Levels(sigmas), 20, **options)(gaussian, x, None)
        start = x * (1 + sigmas[0] ** 2).sqrt()
        return float((out - (MEAN + STD / (STD**2 + sigmas[0] ** 2).sqrt() * (start - MEAN))).abs().max())

    assert (
        error("DPMPP3MSDESampler", eta=0.0)
        < error("DPMPP2MSDESampler", eta=0.0)
        < error("EulerEDMSampler") / 3
    )
    assert error("LinearMultistepSampler") < error("EulerEDMSampler") / 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerAncestralSampler", {}),
        ("DPMPP2SAncestralSampler", {}),
        ("EulerEDMSampler", {"s_churn": 40.0}),
        ("HeunEDMSampler", {"s_churn": 40.0}),
        ("DPMPP2MSDESampler", {}),
        ("DPMPP2MSDESampler", {"eta": 0.5}),
        ("DPMPP2MSDESampler", {"solver_type": "taylor"}),
        ("DPMPP3MSDESampler", {}),
        ("DPMPP3MSDESampler", {"solver_type": "exact"}),
    ],
)
def test_stochastic_samplers_draw_from_the_data(name, options):
    """The moments of 40,000 numbers are exact to about 0.01; Euler's method needs more steps for its own part of the error."""
    steps = 800 if name.startswith("Euler") else 200
    out = make(name, steps=steps, **options)(gaussian, torch.randn(200, 200), None)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(STD, rel=0.03)


def test_without_noise_the_sde_solver_is_the_solver_of_the_flow():
    x = torch.randn(2, 3, 4, 4)
    plain = make("DPMPP2MSampler")(gaussian, x, None)
    assert torch.allclose(make("DPMPP2MSDESampler", eta=0.0)(gaussian, x, None), plain, atol=1e-5)


def test_the_last_step_to_zero_is_the_estimate():
    """DPM-Solver++ ends with D(x, σ) itself; one step from pure noise is the mean, nearly."""
    for name in ("DPMPP2MSampler", "DPMPP2MSDESampler", "DPMPP3MSDESampler", "EulerEDMSampler"):
        x = torch.randn(4, 4)
        out = make(name, steps=1)(gaussian, x, None)
        start = x * math.sqrt(1 + 80.0**2)
        assert torch.allclose(out, gaussian(start, torch.full((4,), 80.0), None), atol=1e-4)


def test_multistep_coefficients_are_those_of_adams_and_bashforth():
    for order, weights in {
        1: [1],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }.items():
        found = [linear_multistep_coeff(order, [0, 1, 2, 3, 4], 3, j) for j in range(order)]
        assert found == pytest.approx(weights)
    with pytest.raises(ValueError, match="at step 1 there are 2"):
        linear_multistep_coeff(3, [3, 2, 1], 1, 0)


def test_ancestral_steps_keep_the_variance():
    a, b = torch.tensor([14.6, 3.0, 0.5]), torch.tensor([9.0, 2.9, 0.0])
    down, up = get_ancestral_step(a, b, eta=0.7)
    assert torch.allclose(down**2 + up**2, b**2)
    assert get_ancestral_step(a, b, eta=0.0) == (b, 0.0)


# --------------------------------------------------------------------------------------------------- an independent peer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def curved(x, sigma, cond):
    """A denoiser that is not linear."""
    s = sigma.reshape(-1, 1, 1, 1)
    return x / (1 + s**2) + 0.3 * torch.tanh(x) * s / (1 + s)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    ("name", "peer"),
    [("EulerEDMSampler", "EulerDiscreteScheduler"), ("HeunEDMSampler", "HeunDiscreteScheduler")],
)
def test_euler_and_heun_agree_with_diffusers(name, peer, karras):
    import diffusers

    scheduler = getattr(diffusers, peer)(**SCHEDULE, use_karras_sigmas=karras)
    scheduler.set_timesteps(12)
    x_T = torch.randn(2, 3, 4, 4)
    levels = torch.as_tensor(scheduler.sigmas).float()
    if name.startswith("Heun"):
        levels = torch.cat([levels[:1], levels[1::2]])  # each level but the first is there twice
    x = x_T * (1 + levels[0] ** 2).sqrt()
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = torch.as_tensor(scheduler.sigmas[scheduler.step_index]).float().expand(len(x))
        eps = (x - curved(x, sigma, None)) / sigma.reshape(-1, 1, 1, 1)
        x = scheduler.step(eps, t, x).prev_sample
    ours = make(name, Levels(levels), 12)(curved, x_T, None)
    assert torch.allclose(ours, x, atol=1e-4)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solvers_agree_with_diffusers(algorithm, solver):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type=algorithm, solver_type=solver, use_karras_sigmas=True, final_sigmas_type="zero",
        prediction_type="sample",
    )  # fmt: skip
    scheduler.set_timesteps(12)
    levels, x_T = scheduler.sigmas.float(), torch.randn(2, 3, 4, 4)
    noises = [torch.randn_like(x_T) for _ in range(12)]
    x = x_T
    for t, sigma, noise in zip(scheduler.timesteps, levels, noises, strict=False):
        out = curved(x * (1 + sigma**2).sqrt(), sigma.expand(2), None)
        x = scheduler.step(out, t, x, variance_noise=noise).prev_sample
    is_sde = algorithm.startswith("sde")
    ours = make(
        "DPMPP2MSDESampler", Levels(levels), 12, eta=float(is_sde), solver_type={"midpoint": "dpm_solver", "heun": "taylor"}[solver]
    )  # fmt: skip
    supply = iter(noises)
    ours.noise_sampler = lambda x: next(supply)
    assert torch.allclose(ours(curved, x_T, None), x, atol=1e-4)
    if not is_sde and solver == "midpoint":
        assert torch.allclose(make("DPMPP2MSampler", Levels(levels), 12)(curved, x_T, None), x, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_noise_is_never_changed(name):
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    make(name)(gaussian, x, None)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_have_the_precision_of_the_noise(name, dtype):
    seen = set()

    def watching(x, sigma, cond):
        seen.add((x.dtype, sigma.dtype))
        return gaussian(x, sigma.to(x.dtype), cond)

    out = make(name)(watching, torch.randn(2, 3, dtype=dtype), None)
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert seen == {
        (dtype, torch.promote_types(dtype, torch.float32))
    }  # noise levels are never rounded to half precision


def test_noise_levels_are_made_where_the_latents_are():
    """`device` defaults to "cuda", as published, and does not matter."""
    sampler = make("EulerEDMSampler")
    *_, sigmas, number, cond, uc = sampler.prepare_sampling_loop(torch.randn(2, 3, device="meta"), {"a": 1})
    assert sampler.device == "cuda" and sigmas.device.type == "meta" and number == 7 and uc is cond


@pytest.mark.parametrize(
    "name", ["EulerAncestralSampler", "DPMPP2SAncestralSampler", "DPMPP2MSDESampler", "DPMPP3MSDESampler"]
)
def test_each_sample_can_have_its_own_noise_whatever_else_is_in_the_batch(name):
    x = torch.randn(3, 2, 4, 4)
    together = make(name)(gaussian, x, None, generator=[1, 2, 3])
    alone = make(name)(gaussian, x[1:2], None, generator=[torch.Generator().manual_seed(2)])
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    torch.manual_seed(1)
    untouched = torch.rand(1)
    torch.manual_seed(1)
    make(name)(gaussian, x, None, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), untouched)  # the global generator is left alone
    with pytest.raises(ValueError, match="2 seeds or generators for batch_size=3"):
        make(name)(gaussian, x, None, generator=[1, 2])


def test_churned_steps_take_the_callers_noise_too():
    x = torch.randn(2, 3)
    first, second = (
        make("EulerEDMSampler", s_churn=40.0)(gaussian, x, None, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(first, second) and not torch.equal(first, make("EulerEDMSampler")(gaussian, x, None))


def test_noise_is_drawn_at_every_ancestral_step_from_the_global_generator():
    x = torch.randn(2, 3)
    torch.manual_seed(5)
    for _ in range(6):
        torch.randn_like(x)
    after = torch.rand(1)
    torch.manual_seed(5)
    make("EulerAncestralSampler")(gaussian, x, None)
    assert torch.equal(torch.rand(1), after)


def test_without_eta_ancestral_samplers_need_no_noise():
    x = torch.randn(2, 3, 4, 4)
    torch.manual_seed(5)
    plain = make("EulerAncestralSampler", eta=0.0)(gaussian, x, None)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.allclose(plain, make("EulerEDMSampler")(gaussian, x, None), atol=1e-5)


def test_guidance_conditions_and_further_inputs_reach_the_denoiser():
    seen = []

    def network(x, sigma, cond, **more):
        seen.append((cond["vector"].shape[0], more))
        return 0.5 * x

    sampler = make("HeunEDMSampler", steps=2, guider_config=VanillaCFG(2.0))
    cond = {"vector": torch.ones(2, 5)}
    sampler(network, torch.randn(2, 3, 4, 4), cond, uc={"vector": torch.zeros(2, 5)}, num_video_frames=2)
    assert seen == [(4, {"num_video_frames": 2})] * 3


@torch.no_grad()
def test_guided_conditions_are_joined_once_a_run():
    """Attention keeps keys and values of a context that is the same tensor at every step."""
    seen = []
    sampler = make("HeunEDMSampler", steps=3, guider_config=VanillaCFG(2.0))
    cond, uc = {"crossattn": torch.ones(2, 7, 5)}, {"crossattn": torch.zeros(2, 7, 5)}
    sampler(lambda x, s, c: (seen.append(c["crossattn"]), 0.5 * x)[1], torch.randn(2, 3), cond, uc)
    assert len(seen) == 5 and all(context is seen[0] for context in seen)


def test_the_callback_sees_every_step():
    seen = []
    out = make("DPMPP2MSampler", steps=4)(
        gaussian, torch.randn(2, 3), None, callback=lambda i, x: seen.append((i, x))
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], out)


def test_progress_is_shown_only_where_wanted(capsys):
    make("EulerEDMSampler", verbose=True)(gaussian, torch.randn(1, 3), None)
    assert "EulerEDMSampler" in capsys.readouterr().err
    make("EulerEDMSampler")(gaussian, torch.randn(1, 3), None)
    assert not capsys.readouterr().err


def test_mixed_noise_levels_may_end_at_different_steps():
    x, a, b = torch.randn(2, 3), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])
    for name in ("HeunEDMSampler", "DPMPP2SAncestralSampler"):
        out = make(name).sampler_step(a, b, gaussian, x, None, None)
        assert torch.isfinite(out).all()
        assert torch.allclose(out[1], gaussian(x, a, None)[1], atol=1e-6)  # the row that arrives at σ = 0


def test_the_number_of_steps_of_a_call_counts_before_the_samplers():
    calls = []
    sampler = make("EulerEDMSampler", KarrasDiscretization(), steps=9)
    sampler(lambda x, s, c: (calls.append(float(s[0])), x)[1], torch.randn(1, 2), None, num_steps=3)
    assert calls == pytest.approx(KarrasDiscretization()(3)[:3].tolist())


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: make("EulerEDMSampler", steps=None)(gaussian, torch.randn(1, 2), None), ValueError, "has no num_steps"),
        (lambda: make("DPMPP2MSDESampler", solver_type="rk4"), ValueError, "solver_type='rk4'"),
        (lambda: make("DPMPP2MSDESampler", eta=-1.0), ValueError, "eta=-1"),
        (lambda: make("EulerEDMSampler")(lambda x, s, c: x * float("nan"), torch.randn(1, 2), None), FloatingPointError, "sampling step 1 of 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_named(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
