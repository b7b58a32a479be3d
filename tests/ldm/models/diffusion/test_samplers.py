"""Every sampler against the known solution of Gaussian data, against diffusers, and against itself."""

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import concatenate

SHAPE = (1, 4, 4)


@pytest.fixture
def x_T():
    return torch.randn(8, *SHAPE)


def error(sampler_class, model, x_T, steps):
    sampler = sampler_class(model)
    out, _ = sampler.sample(steps, len(x_T), SHAPE, x_T=x_T, verbose=False)
    exact = model.exact(x_T, sampler.ddim_alphas[-1], sampler.ddim_alphas_prev[0])
    return float((out - exact).abs().max())


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_ddim_is_first_order(gaussian_denoiser, x_T, parameterization):
    model = gaussian_denoiser(parameterization)
    coarse, fine = (error(DDIMSampler, model, x_T, n) for n in (100, 200))
    assert coarse / fine == pytest.approx(2.0, rel=0.1)  # half the step, half the error


def test_plms_is_of_higher_order_than_ddim(gaussian_denoiser, x_T):
    model = gaussian_denoiser()
    plms = [error(PLMSSampler, model, x_T, n) for n in (50, 100)]
    assert plms[0] / plms[1] > 2.5 and plms[1] < error(DDIMSampler, model, x_T, 100) / 5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", ["singlestep_fixed", "multistep"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
def test_dpm_solvers_have_the_order_they_claim(gaussian_denoiser, order, method, predict_x0, solver_type):
    """Lu et al. 2022, theorem 3.2, on the continuous linear schedule in double precision."""
    model = gaussian_denoiser()
    ns = NoiseScheduleVP("linear")
    x = torch.randn(8, *SHAPE, dtype=torch.float64)

    def solve(evaluations):
        fn = model_wrapper(lambda x, t: model.noise(x, ns.marginal_alpha(t).reshape(-1, 1, 1, 1) ** 2), ns)
        return DPM_Solver(fn, ns, predict_x0).sample(
            x, steps=evaluations, t_start=0.8, t_end=0.05, order=order, method=method, skip_type="logSNR", lower_order_final=False,
            solver_type=solver_type,
        )  # fmt: skip

    def spread(t):
        bar = ns.marginal_alpha(torch.tensor([t], dtype=torch.float64)) ** 2
        return bar.sqrt() * model.mean, (bar * model.std**2 + 1 - bar).sqrt()

    (m0, s0), (m1, s1) = spread(0.8), spread(0.05)
    exact = m1 + s1 * (x - m0) / s0
    coarse, fine = ((solve(n) - exact).abs().max() for n in (48, 96))
    # a multistep solver begins with one step of order 1, whose error is quadratic in its length
    expected = min(order, 2) if method == "multistep" else order
    assert float(torch.log2(coarse / fine)) == pytest.approx(expected, abs=0.35)


def test_the_adaptive_solver_keeps_to_its_tolerance(gaussian_denoiser):
    model, ns = gaussian_denoiser(), NoiseScheduleVP("linear")
    fn = model_wrapper(lambda x, t: model.noise(x, ns.marginal_alpha(t).reshape(-1, 1, 1, 1) ** 2), ns)
    x = torch.randn(4, *SHAPE)
    errors = []
    for tolerance in (0.05, 0.005):
        out = DPM_Solver(fn, ns).sample(
            x, method="adaptive", order=3, atol=tolerance / 10, rtol=tolerance, t_end=1e-3
        )
        bars = (ns.marginal_alpha(torch.tensor([t])) ** 2 for t in (1.0, 1e-3))
        errors.append(float((out - model.exact(x, *bars)).abs().max()))
    assert errors[1] < errors[0] < 0.1


@pytest.mark.parametrize("method", ["singlestep", "multistep", "singlestep_fixed"])
@pytest.mark.parametrize("skip_type", ["logSNR", "time_uniform", "time_quadratic"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_combination_uses_exactly_the_network_calls_it_was_given(method, skip_type, order):
    """Several of them crashed in the original."""
    calls = []
    ns = NoiseScheduleVP("discrete", betas=torch.linspace(0.03, 0.11, 1000) ** 2)
    fn = model_wrapper(lambda x, t: (calls.append(1), 0.9 * x)[1], ns)
    out = DPM_Solver(fn, ns, predict_x0=True).sample(
        torch.randn(2, *SHAPE), steps=7, order=order, method=method, skip_type=skip_type
    )
    assert torch.isfinite(out).all()
    assert len(calls) == (7 if method != "singlestep_fixed" else 7 // order * order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "choose singlestep"),
        ({"skip_type": "karras"}, "choose 'logSNR'"),
        ({"order": 4}, "must be 1, 2 or 3"),
        ({"method": "multistep", "steps": 2}, "too few for a multistep solver of order 3"),
        ({"method": "multistep", "order": 2, "solver_type": "heun"}, "choose one of"),
    ],
)
def test_wrong_solver_options_are_named(options, message):
    ns = NoiseScheduleVP("linear")
    with pytest.raises(ValueError, match=message):
        DPM_Solver(model_wrapper(lambda x, t: x, ns), ns).sample(torch.randn(1, *SHAPE), **options)


def diffusers_latents(scheduler, model, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = model.apply_model(x, torch.full((len(x),), int(t)))
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_gives_the_latents_of_diffusers(gaussian_denoiser, x_T, kind):
    """Same steps (shifted by one) and the same last ᾱ; diffusers computes in float32 throughout."""
    from diffusers import DDIMScheduler

    model = gaussian_denoiser("eps" if kind == "epsilon" else "v", timesteps=1000)
    peer = DDIMScheduler(
        trained_betas=model.betas.numpy(), clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind
    )  # fmt: skip
    ours, _ = DDIMSampler(model).sample(20, len(x_T), SHAPE, x_T=x_T, verbose=False)
    assert torch.allclose(ours, diffusers_latents(peer, model, x_T, 20), atol=1e-4)


def test_plms_gives_the_latents_of_diffusers(gaussian_denoiser, x_T):
    from diffusers import PNDMScheduler

    model = gaussian_denoiser(timesteps=1000)
    peer = PNDMScheduler(
        trained_betas=model.betas.numpy(), skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    ours, _ = PLMSSampler(model).sample(20, len(x_T), SHAPE, x_T=x_T, verbose=False)
    assert torch.allclose(ours, diffusers_latents(peer, model, x_T, 20), atol=1e-4)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.parametrize("steps", [1, 2, 3, 27, 101, 1000])
def test_any_number_of_steps_from_1_to_T_runs(gaussian_denoiser, sampler_class, steps):
    """DDIM with 3, 27, 101, … or all 1000 steps never worked in the original."""
    if steps == 1000 and sampler_class is not DDIMSampler:
        steps = 250
    model = gaussian_denoiser(timesteps=1000)
    out, _ = sampler_class(model).sample(steps, 2, SHAPE, verbose=False)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("steps", [0, 1001])
def test_other_numbers_are_refused(gaussian_denoiser, steps):
    with pytest.raises(ValueError, match="choose from 1 to 1000"):
        DDIMSampler(gaussian_denoiser(timesteps=1000)).sample(steps, 1, SHAPE, verbose=False)


def test_full_noise_samples_the_datas_distribution(gaussian_denoiser):
    """η = 1 is DDPM: its samples have the mean and spread of the data."""
    model = gaussian_denoiser(timesteps=1000)
    out, _ = DDIMSampler(model).sample(200, 4000, (1, 1, 1), eta=1.0, verbose=False)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.05) and float(out.std()) == pytest.approx(
        0.7, abs=0.05
    )


def test_inversion_leads_back_to_the_noise(gaussian_denoiser, x_T):
    model = gaussian_denoiser("v", timesteps=1000)
    sampler = DDIMSampler(model)
    sampler.make_schedule(200, verbose=False)
    start = sampler.decode(x_T, None, 200, verbose=False)
    noise, info = sampler.encode(start, None, 200, verbose=False, return_intermediates=4)
    assert (noise - x_T).abs().mean() < 0.05 and len(info["intermediates"]) == len(
        info["intermediate_steps"]
    ) > 3
    with pytest.raises(AssertionError, match="t_enc=500"):
        sampler.encode(start, None, 500)


def test_noising_and_decoding_at_little_strength_keeps_the_image(gaussian_denoiser):
    model = gaussian_denoiser(timesteps=1000)
    sampler = DDIMSampler(model)
    sampler.make_schedule(50, verbose=False)
    x0 = torch.randn(4, *SHAPE) * 0.7 + 0.5

    def redrawn(steps):
        noisy = sampler.stochastic_encode(x0, torch.full((4,), steps))
        return sampler.decode(noisy, None, steps, verbose=False)

    assert (redrawn(3) - x0).abs().mean() < 0.3 < (redrawn(45) - x0).abs().mean()
    assert torch.isfinite(redrawn(50)).all()  # full strength overran the table in the original


def test_a_mask_keeps_its_part_of_the_image(gaussian_denoiser, x_T):
    model = gaussian_denoiser(timesteps=1000)
    x0, mask = torch.full((8, *SHAPE), 0.5), torch.zeros(8, 1, 4, 4)
    mask[..., :2] = 1
    out, _ = DDIMSampler(model).sample(100, 8, SHAPE, x_T=x_T, x0=x0, mask=mask, verbose=False)
    assert (out - x0)[..., :2].abs().max() < 0.3 < (out - x0)[..., 2:].abs().mean()
    with pytest.raises(AssertionError, match="a mask needs x0"):
        DDIMSampler(model).sample(5, 8, SHAPE, mask=mask, verbose=False)


class Conditional:
    """Predicts the mean of its condition, and counts how often it is asked."""

    def __init__(self, schedule):
        self.__dict__.update(schedule.__dict__)
        self._schedule, self.calls = schedule, []

    def __getattr__(self, name):
        return getattr(self._schedule, name)

    def apply_model(self, x, t, cond):
        self.calls.append(len(x))
        while not isinstance(cond, torch.Tensor):
            cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
        return torch.ones_like(x) * cond.flatten(1).mean(1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "wrap",
    [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}, lambda c: {"c_concat": [c], "c_adm": c}],
    ids=["tensor", "list", "dict", "mixed"],
)
@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_guidance_is_one_batch_and_extrapolates(gaussian_denoiser, sampler_class, wrap):
    model = Conditional(gaussian_denoiser())
    sampler = sampler_class(model)
    c, u = torch.full((2, 3, 4), 0.7), torch.full((2, 3, 4), 0.2)
    guided = sampler.guided(torch.zeros(2, *SHAPE), torch.tensor([5, 5]), wrap(c), 3.0, wrap(u))
    assert model.calls == [4]
    assert torch.allclose(guided, torch.full_like(guided, 0.2 + 3.0 * 0.5))
    for scale, uncond in ((1.0, wrap(u)), (3.0, None)):
        assert torch.allclose(
            sampler.guided(torch.zeros(2, *SHAPE), torch.tensor([5, 5]), wrap(c), scale, uncond),
            torch.tensor(0.7),
        )


def test_conditions_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"\['c_concat'\].*needs the same in both"):
        concatenate({"c_crossattn": torch.ones(1)}, {"c_concat": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\(1, 5, 8\).*\(1, 7, 8\)"):
        concatenate(torch.ones(1, 7, 8), torch.ones(1, 5, 8))


def test_a_scale_for_each_step(gaussian_denoiser):
    model = Conditional(gaussian_denoiser(timesteps=100))
    c, u = torch.ones(1, 1), torch.zeros(1, 1)
    run = {"conditioning": c, "unconditional_conditioning": u, "verbose": False}
    DDIMSampler(model).sample(4, 1, SHAPE, ucg_schedule=[2.0, 1.0, 1.0, 3.0], **run)
    assert model.calls == [2, 1, 1, 2]
    with pytest.raises(AssertionError, match="3 scales for 4 steps"):
        DDIMSampler(model).sample(4, 1, SHAPE, ucg_schedule=[1.0] * 3, **run)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_generator_is_the_only_source_of_noise(gaussian_denoiser, sampler_class):
    model = gaussian_denoiser(timesteps=100)
    options = {"eta": 0.5} if sampler_class is DDIMSampler else {}
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(9)
        draws.append(
            sampler_class(model).sample(5, 2, SHAPE, verbose=False, generator=generator, **options)[0]
        )
    assert torch.equal(*draws)


def test_callbacks_and_kept_steps(gaussian_denoiser):
    seen, images = [], []
    _, kept = DDIMSampler(gaussian_denoiser(timesteps=100)).sample(
        10, 1, SHAPE, verbose=False, log_every_t=4, callback=seen.append, img_callback=lambda pred, i: images.append(i)
    )  # fmt: skip
    assert seen == images == list(range(10))
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 5  # the start, then indices 9, 8, 4, 0


def test_a_batch_of_another_size_is_warned_about(gaussian_denoiser, caplog):
    DDIMSampler(gaussian_denoiser(timesteps=100)).sample(2, 2, SHAPE, torch.zeros(3, 1), verbose=False)
    assert "3 conditionings for batch_size=2" in caplog.text


def test_plms_refuses_noise_and_ddim_thresholding(gaussian_denoiser):
    model = gaussian_denoiser(timesteps=100)
    with pytest.raises(ValueError, match="must be 0 for PLMS"):
        PLMSSampler(model).sample(4, 1, SHAPE, eta=0.5, verbose=False)
    with pytest.raises(NotImplementedError, match="no dynamic thresholding"):
        DDIMSampler(model).sample(4, 1, SHAPE, dynamic_threshold=1.0, verbose=False)
    bounded, _ = PLMSSampler(model).sample(4, 1, SHAPE, dynamic_threshold=0.1, verbose=False)
    assert bounded.square().mean().sqrt() < 0.3


def test_samplers_compute_where_the_model_is(gaussian_denoiser):
    assert DDIMSampler(gaussian_denoiser(timesteps=10)).device == torch.device("cpu")


def test_unknown_model_and_guidance_types_are_named():
    ns = NoiseScheduleVP("linear")
    with pytest.raises(ValueError, match="model_type='eps'"):
        model_wrapper(lambda x, t: x, ns, model_type="eps")
    with pytest.raises(ValueError, match="guidance_type='cfg'"):
        model_wrapper(lambda x, t: x, ns, guidance_type="cfg")
    with pytest.raises(ValueError, match="needs betas or alphas_cumprod"):
        NoiseScheduleVP("discrete")
