import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.models.diffusion.flow import FlowSampler
from ldm.models.diffusion.gaussian import PARAMETERIZATIONS, GaussianSchedule
from ldm.models.diffusion.objectives import Objective
from ldm.modules.diffusionmodules.forward_process import rectified_flow_betas
from taming.util import instantiate_from_config


def schedule(parameterization="eps", zero_terminal_snr=False, **options):
    made = GaussianSchedule()
    made.parameterization, made.v_posterior = parameterization, 0.0
    made.zero_terminal_snr = zero_terminal_snr
    made.register_schedule(**{"timesteps": 100, **options})
    return made


def build(tiny, **params):
    model = instantiate_from_config(copy.deepcopy(tiny.latent_diffusion(**params)))
    model.learning_rate = 1e-3
    return model


# ------------------------------------------------------------------------------------------------------- min-SNR


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("eps", lambda snr: min(snr, 5) / snr),
        ("x0", lambda snr: min(snr, 5)),
        ("v", lambda snr: min(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_weights_are_the_papers(kind, weight):
    """Hang et al. 2023, section 3.4 and its appendix for ε and v."""
    s, t = schedule(kind), torch.tensor([0, 10, 50, 99])
    found = Objective(min_snr_gamma=5.0).weigh(torch.ones(4), s, t)
    bars = s.alphas_cumprod.double()[t]
    assert found.tolist() == pytest.approx([weight(float(b / (1 - b))) for b in bars], rel=1e-3)


@pytest.mark.parametrize("kind", sorted(PARAMETERIZATIONS))
def test_min_snr_weighs_the_same_error_of_the_image_the_same_whatever_is_predicted(kind):
    s, t = schedule(kind), torch.tensor([20, 60])
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    xt = s.q_sample(x0, t, noise)
    right = s.row.target(s, x0, t, noise)
    wrong = right + 0.1 * torch.randn_like(right)
    of_prediction = ((wrong - right) ** 2).mean(dim=[1, 2, 3])
    of_image = ((s.predict_start(xt, t, wrong) - x0) ** 2).mean(dim=[1, 2, 3])
    expected = s.snr(t).clamp(max=5) * of_image
    assert Objective(min_snr_gamma=5.0).weigh(of_prediction, s, t).tolist() == pytest.approx(
        expected.tolist(), rel=1e-3
    )


def test_a_models_loss_is_weighted_and_its_simple_loss_logged_as_it_is(tiny):
    plain, weighted = build(tiny), build(tiny, objective={"min_snr_gamma": 5.0})
    weighted.load_state_dict(plain.state_dict())
    t, noise = torch.tensor([5, 5]), torch.randn(2, 3, 8, 8)
    given = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8), t, noise
    loss, log = plain.p_losses(*given)
    lighter, its_log = weighted.p_losses(*given)
    assert float(its_log["train/loss_simple"]) == float(log["train/loss_simple"])
    assert float(lighter / loss) == pytest.approx(5 / float(plain.snr(t)[0]), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- noise


def test_offset_noise_shifts_whole_channels():
    """The mean of a channel of n pixels has variance 1/n + offset²."""
    noise = Objective(offset_noise=0.5).draw_noise(torch.zeros(4000, 3, 8, 8))
    assert float(noise.mean(dim=(2, 3)).var()) == pytest.approx(1 / 64 + 0.25, rel=0.05)
    inside = noise - noise.mean(dim=(2, 3), keepdim=True)
    assert float(inside.var()) == pytest.approx(63 / 64, rel=0.02)


def test_switched_off_the_noise_and_times_are_those_of_the_original_stream():
    objective, s = Objective(), schedule()
    torch.manual_seed(1)
    t, noise = objective.draw_times(s, 4, "cpu"), objective.draw_noise(torch.zeros(4, 2))
    torch.manual_seed(1)
    assert torch.equal(t, torch.randint(0, 100, (4,)))
    assert torch.equal(noise, torch.randn(4, 2)) and objective.disturb(noise) is noise


def test_input_perturbation_disturbs_the_input_and_not_the_target_and_only_in_training(tiny):
    model = build(tiny, objective={"input_perturbation": 0.5})
    x, noise = torch.zeros(64, 3, 8, 8), torch.randn(64, 3, 8, 8)
    t = torch.full((64,), 900)
    x_noisy, target = model.noised(x, t, noise)
    assert torch.equal(target, noise)
    extra = (x_noisy - model.q_sample(x, t, noise)) / model.sqrt_one_minus_alphas_cumprod[900]
    assert float(extra.std()) == pytest.approx(0.5, rel=0.03)
    assert torch.equal(model.eval().noised(x, t, noise)[0], model.q_sample(x, t, noise))


# ---------------------------------------------------------------------------------------------- zero terminal SNR


def test_the_last_step_of_a_rescaled_schedule_is_pure_noise_and_the_first_is_as_it_was():
    plain, rescaled = schedule("v"), schedule("v", zero_terminal_snr=True)
    assert float(rescaled.alphas_cumprod[-1]) == 0.0
    assert float(rescaled.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-6)
    # √ᾱ is stretched evenly: each step keeps its share of the way from the first to the last
    shares = [
        (s.sqrt_alphas_cumprod[0] - s.sqrt_alphas_cumprod)
        / (s.sqrt_alphas_cumprod[0] - s.sqrt_alphas_cumprod[-1])
        for s in (plain, rescaled)
    ]
    assert torch.allclose(*shares, atol=1e-5)
    noise = torch.randn(1, 3, 4, 4)
    t = torch.tensor([99])
    assert torch.equal(rescaled.q_sample(torch.randn(1, 3, 4, 4), t, noise), noise)
    x0 = torch.randn(1, 3, 4, 4)
    v = rescaled.get_v(x0, noise, t)
    assert torch.allclose(rescaled.predict_start(noise, t, v), x0)
    assert torch.isfinite(rescaled.q_posterior(x0, noise, t)[0]).all()


def test_the_rescaled_schedule_is_diffusers():
    betas = torch.from_numpy(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).float()
    theirs = rescale_zero_terminal_snr(betas)
    ours = schedule("v", zero_terminal_snr=True, timesteps=1000, linear_start=0.00085, linear_end=0.012).betas
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod[-1] == 0


# --------------------------------------------------------------------------------------------------- rectified flow


class FlowOfGaussian(GaussianSchedule):
    """The exact velocity for Gaussian data N(m, s²): E[ε - x_0 | x_t]; its solution keeps standardised values."""

    mean, std = 0.5, 0.7

    def __init__(self, timesteps=1000):
        super().__init__()
        self.parameterization, self.v_posterior = "flow", 0.0
        self.register_schedule(timesteps=timesteps)

    def apply_model(self, x, t, cond=None):
        signal, noise = self.signal_and_noise(t, x.ndim)
        spread = (x - signal * self.mean) / (signal**2 * self.std**2 + noise**2)
        return noise * spread - (self.mean + signal * self.std**2 * spread)


def solve(steps, model=None):
    model = model or FlowOfGaussian()
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    out, _ = FlowSampler(model).sample(steps, 1, (1, 4, 4), x_T=x, verbose=False)
    return float((out - (model.mean + model.std * x)).abs().max())


def test_euler_is_first_order_on_the_exact_flow():
    assert solve(50) / solve(100) == pytest.approx(2, rel=0.1)
    assert solve(1000) < 2e-3


def test_a_flow_runs_from_the_image_to_pure_noise():
    s = schedule("flow")
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([-1.0, 49.0, 99.0])  # fractions of the way: 0, 1/2, 1
    expected = torch.stack([x0[0], 0.5 * x0[1] + 0.5 * noise[1], noise[2]])
    assert torch.allclose(s.q_sample(x0, t, noise), expected, atol=1e-6)
    mean, variance, log_variance = s.q_mean_variance(x0, torch.tensor([24, 49, 99]))
    assert variance.flatten().tolist() == pytest.approx([1 / 16, 1 / 4, 1])
    assert log_variance.flatten().tolist() == pytest.approx([math.log(1 / 16), math.log(1 / 4), 0], abs=1e-6)
    assert torch.allclose(mean[0], 0.75 * x0[0])


def test_the_buffers_of_a_flow_hold_its_signal_to_noise_ratio():
    bar = np.cumprod(1 - rectified_flow_betas(10))
    tau = np.arange(1, 11) / 10
    assert bar / (1 - bar) == pytest.approx(((1 - tau) / tau) ** 2)


def test_the_steps_are_diffusers_flow_match_euler():
    model = FlowOfGaussian()
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20))
    x_T = torch.randn(2, 1, 4, 4)
    x = x_T
    for sigma, t in zip(theirs.sigmas[:-1], theirs.timesteps, strict=True):
        at = torch.full((2,), float(sigma) * 1000 - 1)
        x = theirs.step(model.apply_model(x, at), t, x).prev_sample
    ours, kept = FlowSampler(model).sample(20, 2, (1, 4, 4), x_T=x_T, verbose=False)
    assert torch.allclose(ours, x, atol=1e-5) and len(kept["x_inter"]) >= 2


def test_logit_normal_times_have_their_mean_and_spread():
    objective = Objective(logit_mean=0.5, logit_std=0.8)
    t = objective.draw_times(schedule("flow"), 20000, "cpu")
    logits = ((t + 1) / 100).double().logit()
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.03)
    index = schedule("flow").table_index(t)
    assert int(index.min()) >= 0 and int(index.max()) <= 99 and index.dtype == torch.long
    uniform = Objective(times="uniform").draw_times(schedule("flow"), 50, "cpu")
    assert uniform.dtype == torch.long


def test_a_latent_flow_trains_logs_and_samples(tiny):
    model = build(
        tiny, parameterization="flow", timesteps=50, log_every_t=25, learn_logvar=True, cond_stage_key="given"
    )
    batch = {"image": torch.randn(4, 8, 8, 3), "given": torch.randn(4, 4, 8, 1)}
    model.get_learned_conditioning = lambda c: c[:, 0]
    model.learning_rate = 3e-3
    optimizer = model.configure_optimizers()
    z, c = model.get_input(batch, "image")
    t, noise = torch.tensor([5, 15, 30, 45]), torch.randn(4, 3, 8, 8)
    before = float(model.p_losses(z, c, t, noise)[0])
    for _ in range(40):
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(model.p_losses(z, c, t, noise)[0]) < 0.9 * before
    assert model.lvlb_weights.tolist() == [1.0] * 50
    log = model.eval().log_images(batch, N=2, ddim_steps=4)
    assert torch.isfinite(log["samples"]).all() and torch.isfinite(log["progressive_row"]).all()
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    kept, _ = FlowSampler(model).sample(
        50, 2, (3, 8, 8), torch.randn(2, 4, 8), mask=mask, x0=torch.zeros(2, 3, 8, 8), verbose=False
    )
    assert float(kept[..., :4].abs().mean()) < 0.5 * float(kept[..., 4:].abs().mean())


def test_ancestral_steps_of_a_flow_are_eulers_over_all_steps():
    """p_sample's mean with the exact velocity, step by step, equals the sampler's result."""
    model = FlowOfGaussian(timesteps=40)
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    expected, _ = FlowSampler(model).sample(40, 1, (1, 4, 4), x_T=x, verbose=False)
    for i in reversed(range(40)):
        t = torch.tensor([i])
        x, _, log_variance = model.q_posterior(model.predict_start(x, t, model.apply_model(x, t)), x, t)
        assert float(log_variance) < -40
    assert torch.allclose(x, expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"objective": {"min_snr": 5}}, "Did you mean 'min_snr_gamma'"),
        ({"objective": {"min_snr_gamma": 0}}, "must be positive"),
        ({"objective": {"offset_noise": -0.1}}, "must not be negative"),
        ({"objective": {"times": "cosine"}}, r"choose one of \['uniform', 'logit-normal'\]"),
        ({"objective": {"times": "logit-normal"}}, "needs parameterization 'flow', not 'eps'"),
        ({"zero_terminal_snr": True}, "needs parameterization 'v' or 'x0', not 'eps'"),
        ({"zero_terminal_snr": True, "parameterization": "flow"}, "not 'flow'"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(tiny, params, message):
    with pytest.raises(ValueError, match=message):
        build(tiny, **params)


def test_a_flow_is_sampled_by_its_own_sampler_without_noise_and_within_its_steps(gaussian_denoiser):
    with pytest.raises(ValueError, match="needs a model with parameterization 'flow'"):
        FlowSampler(gaussian_denoiser("eps"))
    for options, message in (((0, 0.0), "choose from 1 to 1000"), ((10, 1.0), "leave eta at 0")):
        with pytest.raises(ValueError, match=message):
            FlowSampler(FlowOfGaussian()).make_schedule(options[0], ddim_eta=options[1])


def test_other_samplers_refuse_a_flow():
    from ldm.inference import SAMPLERS

    for name, sampler in SAMPLERS.items():
        if name == "flow":
            assert sampler(FlowOfGaussian()).samples_flows
        else:
            with pytest.raises(ValueError, match="use FlowSampler"):
                sampler(FlowOfGaussian())
