"""DPM-Solver, UniPC and DEIS as tables of weights: their orders, their peers in diffusers, and their samplers."""

import math

import pytest
import torch
from torch import nn

from ldm.models.diffusion.deis import DEISRule, DEISSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP
from ldm.models.diffusion.dpm_solver.multistep import DPMRule, Multistep
from ldm.models.diffusion.unipc import UniPCRule, UniPCSampler

SHAPE = (1, 4, 4)
MEAN, STD = 0.5, 0.7
LINEAR = NoiseScheduleVP("linear")
RULES = {
    "dpm++": lambda: DPMRule(True, "exact"),
    "dpm": lambda: DPMRule(False, "exact"),
    "unipc bh1": lambda: UniPCRule("bh1"),
    "unipc bh2": lambda: UniPCRule("bh2"),
    "unipc of noise": lambda: UniPCRule("bh2", predict_x0=False),
    "deis t": lambda: DEISRule(LINEAR, "t"),
    "deis rho": lambda: DEISRule(LINEAR, "rho"),
    "deis lambda": lambda: DEISRule(LINEAR, "lambda"),
}


def solution(point):
    """Where the probability flow takes a point of Gaussian data, and both exact predictions there."""
    bar = point.alpha**2
    spread = math.sqrt(bar * STD**2 + point.sigma**2)
    x = point.alpha * MEAN + 1.3 * spread  # the standardised value stays the same
    eps = point.sigma * (x - point.alpha * MEAN) / spread**2
    return x, eps, (x - point.sigma * eps) / point.alpha


def exact_points(h, n):
    """n + 1 points of steps h in λ, the newest at λ = 0.4 + h."""
    lambdas = torch.tensor([0.4 + h - i * h for i in range(n + 1)], dtype=torch.float64)
    return LINEAR.points(LINEAR.inverse_lambda(lambdas))


def local_error(rule, order, h, correct):
    """The error of one step from exact history."""
    points = exact_points(h, order)
    values = [solution(p) for p in points]
    predictions = [torch.tensor(v[2 if rule.predict_x0 else 1], dtype=torch.float64) for v in values]
    step = rule.corrector(points) if correct else rule.predictor(points)
    x = step.apply(
        torch.tensor(values[1][0], dtype=torch.float64), predictions if correct else predictions[1:]
    )
    return abs(float(x) - values[0][0])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_a_step_has_the_local_error_of_its_order(name, order):
    """Halving the step divides the error of one step by 2^(p+1)."""
    rule = RULES[name]()
    errors = [local_error(rule, order, h, correct=False) for h in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_multistep_dpm_solver_of_order_three_has_order_two(order, solver_type):
    """It takes half of the second derivative; the recorded answers and diffusers have it so. "exact" has order 3."""
    errors = [local_error(DPMRule(True, solver_type), order, h, correct=False) for h in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(min(order, 2) + 1, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["unipc bh1", "unipc bh2", "unipc of noise"])
def test_the_corrector_gains_an_order(name, order):
    """Zhao et al. 2023, theorem 3.1."""
    rule = RULES[name]()
    errors = [local_error(rule, order, h, correct=True) for h in (0.04, 0.02)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 2, abs=0.2)


def test_deis_has_a_fourth_order():
    errors = [local_error(DEISRule(LINEAR, "rho"), 4, h, correct=False) for h in (0.04, 0.02)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.25)


def global_error(rule, order, steps):
    points = LINEAR.points(LINEAR.time_steps("logSNR", 0.8, 0.05, steps))
    run = Multistep(rule, points, order, lower_order_final=False)
    x = torch.tensor(solution(points[0])[0], dtype=torch.float64)
    for p in points[:-1]:
        bar, value = p.alpha**2, float(x)
        eps = p.sigma * (value - p.alpha * MEAN) / (bar * STD**2 + p.sigma**2)
        x = run.advance(
            x, torch.tensor((value - p.sigma * eps) / p.alpha if rule.predict_x0 else eps).double()
        )
    return abs(float(x) - solution(points[-1])[0])


@pytest.mark.parametrize("name", RULES)
def test_a_whole_run_of_order_two_converges_quadratically_at_least(name):
    coarse, fine = (global_error(RULES[name](), 2, n) for n in (100, 200))
    assert math.log2(coarse / fine) > 1.8


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_a_whole_run_of_unipc_has_its_order(variant):
    """Zhao et al. 2023, theorem 3.1: order p + 1 with the corrector. (From 3 on the start, a corrected step of order 1, has its say.)"""
    slopes = []
    for order in (1, 2, 3):
        coarse, fine = (global_error(UniPCRule(variant), order, n) for n in (50, 100))
        slopes.append(math.log2(coarse / fine))
    assert slopes[:2] == pytest.approx([2, 3], abs=0.1) and slopes[2] > 3


def test_more_order_is_more_exact_in_few_steps():
    for rule in (UniPCRule(), DEISRule(LINEAR)):
        first, second, third = (global_error(rule, order, 20) for order in (1, 2, 3))
        assert third < second < first


def test_unipc_of_order_one_without_correction_is_ddim():
    points = exact_points(0.3, 1)
    for predict_x0 in (True, False):
        ours, ddim = UniPCRule("bh2", predict_x0).predictor(points), DPMRule(predict_x0).predictor(points)
        assert ours.keep == pytest.approx(ddim.keep) and ours.weights == pytest.approx(ddim.weights)


def test_deis_in_lambda_is_dpm_solver_with_exact_integrals():
    """Both then integrate the same polynomial."""
    for order in (1, 2, 3):
        points = exact_points(0.3, order)
        ours, peer = DEISRule(LINEAR, "lambda").predictor(points), DPMRule(False, "exact").predictor(points)
        assert ours.keep == pytest.approx(peer.keep) and ours.weights == pytest.approx(peer.weights, rel=1e-9)


# ---------------------------------------------------------------------------------------------------- beside diffusers


class Tiny(nn.Module):
    """A small random network of x and t, the same for both sides."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, t):
        wave = torch.sin(t.float() / 200).reshape(-1, 1, 1, 1)
        return 0.7 * x + 0.3 * self.last(torch.tanh(self.first(x) + wave))


@pytest.fixture
def models(gaussian_denoiser):
    net = Tiny()

    def build(parameterization="eps"):
        model = gaussian_denoiser(parameterization, timesteps=1000)
        model.apply_model = lambda x, t, cond=None: net(x, t)
        return model

    return build


@torch.no_grad()
def peers_latents(scheduler, model, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = model.apply_model(scheduler.scale_model_input(x, t), torch.full((len(x),), int(t)))
        x = scheduler.step(out, t, x).prev_sample
    return x


KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# 999 is a multiple of these: the times that we take between training steps are then whole ones, as diffusers' always are
STEPS = (9, 27)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_gives_the_latents_of_diffusers(models, kind, order, steps):
    from diffusers import DPMSolverMultistepScheduler

    model, x = models(kind), torch.randn(2, *SHAPE)
    peer = DPMSolverMultistepScheduler(
        trained_betas=model.betas.numpy(), prediction_type=KINDS[kind], solver_order=order, final_sigmas_type="sigma_min"
    )  # fmt: skip
    ours, _ = DPMSolverSampler(model, order=order).sample(steps, 2, SHAPE, x_T=x, verbose=False)
    assert torch.allclose(ours, peers_latents(peer, model, x, steps), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("order", "variant"), [(1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh1"), (3, "bh2")])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_gives_the_latents_of_diffusers(models, kind, order, variant, steps):
    from diffusers import UniPCMultistepScheduler

    model, x = models(kind), torch.randn(2, *SHAPE)
    peer = UniPCMultistepScheduler(
        trained_betas=model.betas.numpy(), prediction_type=KINDS[kind], solver_order=order, solver_type=variant,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    ours, kept = UniPCSampler(model, order=order, variant=variant).sample(
        steps, 2, SHAPE, x_T=x, verbose=False
    )
    assert torch.allclose(ours, peers_latents(peer, model, x, steps), atol=1e-4)
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", STEPS)
def test_deis_in_lambda_gives_the_latents_of_diffusers(models, kind, order, steps):
    """diffusers' polynomials are of log ρ; the paper's tAB, our default, are of t and give other latents."""
    from diffusers import DEISMultistepScheduler

    model, x = models(kind), torch.randn(2, *SHAPE)
    peer = DEISMultistepScheduler(
        trained_betas=model.betas.numpy(), prediction_type=KINDS[kind], solver_order=order
    )
    run = {"x_T": x, "verbose": False}
    theirs = peers_latents(peer, model, x, steps)
    ours, _ = DEISSampler(model, order=order, space="lambda").sample(steps, 2, SHAPE, **run)
    assert torch.allclose(ours, theirs, atol=2e-4)
    in_time, _ = DEISSampler(model, order=order).sample(steps, 2, SHAPE, **run)
    assert (order == 1) == torch.allclose(in_time, theirs, atol=2e-4)


@pytest.mark.parametrize("steps", [7, 10])
def test_trailing_steps_and_zero_terminal_snr_give_the_latents_of_diffusers(gaussian_denoiser, models, steps):
    """diffusers too ends these at σ = 0 with the estimate of x_0, and puts 2^-24 for ᾱ = 0."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    model, x = models("v"), torch.randn(2, *SHAPE)
    betas = model.betas
    model.register_schedule(given_betas=rescale_zero_terminal_snr(betas).double().numpy())
    assert float(model.alphas_cumprod[-1]) == 0
    for ours, peer in (
        (DPMSolverSampler, DPMSolverMultistepScheduler),
        (UniPCSampler, UniPCMultistepScheduler),
    ):
        scheduler = peer(
            trained_betas=betas.numpy(), prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
            final_sigmas_type="zero",
        )  # fmt: skip
        mine, _ = ours(model).sample(steps, 2, SHAPE, x_T=x, verbose=False, time_spacing="trailing")
        assert torch.allclose(mine, peers_latents(scheduler, model, x, steps), atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("spacing", ["uniform", "quad", "logSNR", "trailing"])
@pytest.mark.parametrize("sampler_class", [DPMSolverSampler, UniPCSampler, DEISSampler])
def test_every_spacing_runs_with_1_to_T_steps(models, sampler_class, spacing):
    for steps in (1, 2, 3, 16, 100):
        out, _ = sampler_class(models(), order=3).sample(steps, 2, SHAPE, verbose=False, time_spacing=spacing)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", ["multistep", "singlestep", "singlestep_fixed", "adaptive"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_every_method_of_dpm_solver_comes_to_the_same_latents(models, method, order, predict_x0):
    """All solve one equation: with many steps only the solver's error is left."""
    model, x = models(), torch.randn(2, *SHAPE)
    run = {"x_T": x, "verbose": False}
    reference, _ = UniPCSampler(model, order=3).sample(500, 2, SHAPE, **run)
    sampler = DPMSolverSampler(model, order=order, method=method, predict_x0=predict_x0, atol=1e-4, rtol=1e-4)
    out, kept = sampler.sample(100, 2, SHAPE, **run)
    assert (out - reference).abs().max() < 1e-2 and kept is None


@pytest.mark.parametrize("method", ["singlestep", "adaptive"])
def test_single_steps_see_masks_callbacks_and_guidance(models, method):
    model = models("v")
    calls, images, steps = [], [], []
    net = model.apply_model
    model.apply_model = lambda x, t, c: (calls.append(len(x)), net(x, t) * c.reshape(-1, 1, 1, 1))[1]
    x0, mask = torch.zeros(2, *SHAPE), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    out, _ = DPMSolverSampler(model, method=method, order=2).sample(
        8, 2, SHAPE, torch.ones(2), callback=steps.append, img_callback=lambda p, i: images.append((p.shape, i)), mask=mask, x0=x0,
        unconditional_guidance_scale=2.0, unconditional_conditioning=0.9 * torch.ones(2), verbose=False,
    )  # fmt: skip
    assert set(calls) == {4} and torch.isfinite(out).all()
    assert steps == list(range(len(steps))) and [i for _, i in images] == steps and images[0][0] == out.shape
    assert len(steps) == 4 if method == "singlestep" else len(steps) > 1
    assert out[..., :2].abs().mean() < out[..., 2:].abs().mean()


def test_the_points_of_a_schedule_are_finite_at_zero_terminal_snr():
    ns = NoiseScheduleVP("discrete", alphas_cumprod=torch.tensor([0.99915, 0.5, 0.0]))
    last, middle, none = ns.points(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 3)
    assert last.alpha**2 + last.sigma**2 == pytest.approx(1, abs=1e-12)
    assert middle.lamb == pytest.approx(0, abs=1e-5) and none.alpha == pytest.approx(2**-12, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: UniPCSampler(m, order=4), "order=4: UniPCSampler has orders 1 to 3"),
        (lambda m: UniPCSampler(m, variant="bh3"), r"variant='bh3'.*\['bh1', 'bh2'\]"),
        (lambda m: DEISSampler(m, order=0), "order=0: DEISSampler has orders 1 to 4"),
        (lambda m: DEISSampler(m, space="sigma"), "space='sigma'"),
        (lambda m: DPMSolverSampler(m, method="heun"), "method='heun'"),
        (lambda m: DPMSolverSampler(m, solver_type="heun"), "solver_type='heun'"),
        (lambda m: DPMSolverSampler(m, method="adaptive", order=1), "has orders 2 and 3"),
        (lambda m: UniPCSampler(m).make_schedule(5, "karras"), "time_spacing='karras'"),
        (lambda m: UniPCSampler(m).make_schedule(1001), "choose from 1 to 1000"),
        (
            lambda m: DPMSolverSampler(m, method="singlestep").make_schedule(5, "trailing"),
            "no times in between",
        ),
        (lambda m: DEISRule(LINEAR, "x"), "space='x'"),
    ],
)
def test_wrong_options_are_named(models, build, message):
    with pytest.raises(ValueError, match=message):
        build(models())


def test_eta_is_warned_about(models, caplog):
    UniPCSampler(models()).sample(2, 1, SHAPE, eta=0.3, verbose=False)
    assert "UniPCSampler is deterministic" in caplog.text


def test_public_and_planned_steps_agree():
    """`DPM_Solver`'s update takes times of each sample; the planned step takes one for all."""
    points = exact_points(0.2, 3)
    x, history = torch.randn(2, *SHAPE).double(), [torch.randn(2, *SHAPE).double() for _ in range(3)]
    times = [torch.full((2,), p.t, dtype=torch.float64) for p in points]
    for predict_x0 in (True, False):
        solver = DPM_Solver(lambda x, t: x, LINEAR, predict_x0)
        for order in (1, 2, 3):
            theirs = solver.multistep_dpm_solver_update(x, history, times[:0:-1], times[0], order)
            ours = DPMRule(predict_x0).predictor(points[: order + 1]).apply(x, history[::-1][:order])
            assert torch.allclose(ours, theirs)
