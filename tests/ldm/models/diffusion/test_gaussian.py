import math

import numpy as np
import pytest
import torch

from ldm.models.diffusion.gaussian import PARAMETERIZATIONS, GaussianSchedule


def schedule(parameterization="eps", v_posterior=0.0, **options):
    made = GaussianSchedule()
    made.parameterization, made.v_posterior = parameterization, v_posterior
    made.register_schedule(**{"timesteps": 50, **options})
    return made


def test_the_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): a product of two Gaussians, worked out by hand."""
    s = schedule()
    t, x0, xt = 20, 0.3, -0.8
    beta, bar = float(s.betas[t]), float(s.alphas_cumprod[t - 1])
    # precisions of x_{t-1} from the step (x_t = √(1-β) x_{t-1} + √β ε) and from the prior (mean √ᾱ x_0, variance 1-ᾱ)
    precision = (1 - beta) / beta + 1 / (1 - bar)
    mean = (math.sqrt(1 - beta) * xt / beta + math.sqrt(bar) * x0 / (1 - bar)) / precision
    found_mean, variance, log_variance = s.q_posterior(
        torch.full((1, 1), x0), torch.full((1, 1), xt), torch.tensor([t])
    )
    assert float(found_mean) == pytest.approx(mean, rel=1e-4)
    assert float(variance) == pytest.approx(1 / precision, rel=1e-4)
    assert float(log_variance) == pytest.approx(-math.log(precision), rel=1e-4)


def test_the_marginal_after_all_steps_is_that_of_applying_them_one_by_one():
    s = schedule(timesteps=20)
    mean, variance = 1.0, 0.0
    for t in range(20):
        beta = float(s.betas[t])
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        found = s.q_mean_variance(torch.ones(1, 1), torch.tensor([t]))
        assert (float(found[0]), float(found[1])) == pytest.approx((mean, variance), rel=1e-3)


@pytest.mark.parametrize("kind", sorted(PARAMETERIZATIONS))
def test_every_parameterization_leads_back_to_the_image(kind):
    s = schedule(kind)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 20, 49])
    row = PARAMETERIZATIONS[kind]
    xt = s.q_sample(x0, t, noise)
    target = row.target(s, x0, t, noise)
    assert torch.allclose(s.predict_start(xt, t, target), x0, atol=1e-4)
    assert torch.allclose(s.predict_noise(xt, t, target), noise, atol=1e-4)
    assert (
        s.lvlb_weights.shape == (50,)
        and torch.isfinite(s.lvlb_weights).all()
        and s.lvlb_weights[0] == s.lvlb_weights[1]
    )


def test_the_posterior_variance_runs_between_its_two_bounds():
    lower, upper = schedule(v_posterior=0.0), schedule(v_posterior=1.0)
    assert torch.allclose(upper.posterior_variance, upper.betas)
    assert (schedule(v_posterior=0.5).posterior_variance > lower.posterior_variance).all()


def test_given_betas_replace_everything():
    betas = np.linspace(0.1, 0.5, 7)
    s = schedule(given_betas=betas)
    assert s.num_timesteps == 7 and s.alphas_cumprod.tolist() == pytest.approx(np.cumprod(1 - betas).tolist())
    assert "lvlb_weights" not in s.state_dict() and len(s.state_dict()) == 12
