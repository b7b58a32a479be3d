"""What every sampler understands: conditions, guidance and its rescaling, zero terminal SNR, masks, seeds, callbacks, bad latents."""

import numpy as np
import pytest
import torch

from ldm import inference
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_util import draw, rescale_guided, sources, trailing_timesteps
from ldm.models.diffusion.unipc import UniPCSampler

SHAPE = (1, 4, 4)
SAMPLERS = sorted(set(inference.SAMPLERS) - {"flow"})  # flows have models and tests of their own
QUIET = {"verbose": False}


@pytest.fixture(params=SAMPLERS)
def sampler_class(request):
    """Each of the registered samplers."""
    return inference.SAMPLERS[request.param]


@pytest.fixture
def exact_denoiser(gaussian_denoiser):
    """The exact denoiser of Gaussian data, at times between the training steps too, and where ᾱ = 0."""

    class Exact(gaussian_denoiser):
        def bar(self, t):
            low, share = t.long(), t.frac()
            pair = self.alphas_cumprod[low], self.alphas_cumprod[(low + 1).clamp(max=self.num_timesteps - 1)]
            between = torch.lerp(*(a.clamp(min=1e-9).log() for a in pair), share).exp()
            return torch.where(share == 0, pair[0], between).reshape(-1, 1, 1, 1)

        def apply_model(self, x, t, cond=None):
            bar = self.bar(t.float())
            eps, shrink = self.noise(x, bar), bar.sqrt() * self.std**2 / (bar * self.std**2 + 1 - bar)
            start = self.mean + shrink * (x - bar.sqrt() * self.mean)
            return {"eps": eps, "x0": start, "v": bar.sqrt() * eps - (1 - bar).sqrt() * start}[
                self.parameterization
            ]

    return Exact


@pytest.fixture
def conditional(exact_denoiser):
    """The denoiser of data whose mean is that of the condition, whatever holds it; it notes what it is asked."""

    def build(parameterization="v", timesteps=1000):
        model = exact_denoiser(parameterization, timesteps=timesteps)
        model.seen = []

        def apply_model(x, t, cond):
            model.seen.append(cond)
            while not isinstance(cond, torch.Tensor):
                cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
            model.mean = cond.flatten(1).mean(1).reshape(-1, 1, 1, 1)
            return type(model).apply_model(model, x, t)

        model.apply_model = apply_model
        return model

    return build


WRAPS = {
    "tensor": lambda c: c,
    "list": lambda c: [c],
    "dict": lambda c: {"c_crossattn": [c]},
    "mixed": lambda c: {"c_concat": [c], "c_crossattn": [c, c], "c_adm": c},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_conditions_of_every_structure_give_the_same_images(conditional, sampler_class, wrap):
    model, x_T = conditional(), torch.randn(2, *SHAPE)
    c, u = torch.tensor([[0.9], [-0.4]]), torch.zeros(2, 1)

    def run(wrap, **options):
        sampler = sampler_class(model)
        return sampler.sample(
            6, 2, SHAPE, wrap(c), x_T=x_T, unconditional_guidance_scale=2.0, unconditional_conditioning=wrap(u), **QUIET, **options
        )[0]  # fmt: skip

    assert torch.equal(run(wrap), run(WRAPS["tensor"]))
    model.seen.clear()
    rescaled = run(wrap, guidance_rescale=0.7)
    assert torch.isfinite(rescaled).all() and not torch.equal(rescaled, run(WRAPS["tensor"]))


def test_both_conditions_are_joined_once_a_run(conditional, sampler_class):
    """What a network computes from the prompt alone can then be kept: it is the same object at every step."""
    model = conditional()
    run = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": torch.zeros(1, 1), **QUIET}
    for _ in range(2):
        model.seen.clear()
        sampler = sampler_class(model)
        sampler.sample(5, 1, SHAPE, torch.ones(1, 1), **run)
        assert len({id(c) for c in model.seen}) == 1 and model.seen[0].shape == (2, 1)


def test_rescaling_gives_guidance_the_deviation_it_had_without():
    """Lin et al. 2023, equations 15 and 16."""
    guided, conditional = 3 * torch.randn(2, 4, 8, 8) + 1, torch.randn(2, 4, 8, 8)
    whole = rescale_guided(guided, conditional, 1.0)
    assert torch.allclose(whole.flatten(1).std(1), conditional.flatten(1).std(1))
    half = rescale_guided(guided, conditional, 0.5)
    assert torch.allclose(half, (whole + guided) / 2, atol=1e-6)
    assert torch.equal(rescale_guided(guided, conditional, 0.0), guided)


def test_rescaling_agrees_with_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.allclose(
        rescale_guided(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7), atol=1e-6
    )


# ------------------------------------------------------------------------------------------------- zero terminal SNR


def zero_terminal(model):
    """Lin et al. 2023, algorithm 1: √ᾱ shifted and scaled so that the last is 0."""
    roots = np.sqrt(model.alphas_cumprod.double().numpy())
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    bar = roots**2
    model.register_schedule(given_betas=1 - bar / np.append(1.0, bar[:-1]))
    assert float(model.alphas_cumprod[-1]) == 0
    return model


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_zero_terminal_snr_works_for_v_from_pure_noise(exact_denoiser, sampler_class):
    """Without the leak of the training images' mean, samples have the data's mean and spread."""
    model = zero_terminal(exact_denoiser("v", timesteps=1000))
    x_T = torch.randn(4000, 1, 1, 1)
    out, _ = sampler_class(model).sample(
        40, len(x_T), (1, 1, 1), x_T=x_T, time_spacing="trailing", verbose=False
    )
    assert float(out.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(out.std()) == pytest.approx(0.7, rel=0.1)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_zero_terminal_snr_is_refused_for_noise_prediction(exact_denoiser, sampler_class):
    model = zero_terminal(exact_denoiser("eps", timesteps=1000))
    with pytest.raises(ValueError, match="zero terminal SNR.*parameterization='v'"):
        sampler_class(model).sample(10, 1, SHAPE, time_spacing="trailing", **QUIET)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 999, 1000])
def test_trailing_steps_end_with_the_last_and_are_as_many_as_asked(n):
    steps = trailing_timesteps(n, 1000)
    assert len(steps) == n == len(set(steps.tolist())) and steps[-1] == 999 and steps[0] >= 0
    assert np.all(np.diff(steps) > 0)


def test_trailing_ddim_gives_the_latents_of_diffusers(exact_denoiser):
    from diffusers import DDIMScheduler

    model, x = exact_denoiser("v", timesteps=1000), torch.randn(2, *SHAPE)
    peer = DDIMScheduler(
        trained_betas=model.betas.numpy(), clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
        prediction_type="v_prediction",
    )  # fmt: skip
    peer.set_timesteps(8)
    theirs = x
    for t in peer.timesteps:
        theirs = peer.step(model.apply_model(theirs, torch.full((2,), int(t))), t, theirs).prev_sample
    ours, _ = DDIMSampler(model).sample(8, 2, SHAPE, x_T=x, time_spacing="trailing", **QUIET)
    # both go on 125 steps at a time, ours from the first step to ᾱ_0, theirs to the same ᾱ
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_predictions_of_x0_are_converted_on_request(exact_denoiser, sampler_class):
    """As published they are taken for ε, which gives other images."""
    x_T = torch.randn(2, *SHAPE)
    eps, x0 = (exact_denoiser(p, timesteps=1000) for p in ("eps", "x0"))
    wanted, _ = sampler_class(eps).sample(10, 2, SHAPE, x_T=x_T, **QUIET)
    converted, _ = sampler_class(x0, x0_as_eps=False).sample(10, 2, SHAPE, x_T=x_T, **QUIET)
    published, _ = sampler_class(x0).sample(10, 2, SHAPE, x_T=x_T, **QUIET)
    assert torch.allclose(converted, wanted, atol=1e-3)
    assert not torch.allclose(published, wanted, atol=0.1)


# -------------------------------------------------------------------------------------------- masks, noise, callbacks


def test_a_mask_keeps_its_part(exact_denoiser, sampler_class):
    model, x0, mask = (
        exact_denoiser("v", timesteps=1000),
        torch.full((4, *SHAPE), 0.5),
        torch.zeros(4, 1, 4, 4),
    )
    mask[..., :2] = 1
    x_T = torch.randn(4, *SHAPE)
    out, _ = sampler_class(model).sample(50, 4, SHAPE, x_T=x_T, x0=x0, mask=mask, **QUIET)
    assert (out - x0)[..., :2].abs().max() < 0.35 < (out - x0)[..., 2:].abs().mean()
    with pytest.raises(AssertionError, match="a mask needs x0"):
        sampler_class(model).sample(5, 4, SHAPE, mask=mask, **QUIET)


def test_seeds_of_each_image_do_not_know_the_batch(exact_denoiser, sampler_class):
    model = exact_denoiser("v", timesteps=100)
    x0, mask = torch.zeros(3, *SHAPE), torch.zeros(3, 1, 4, 4)
    mask[..., :1] = 1
    eta = {"eta": 0.7} if sampler_class is DDIMSampler else {}

    def run(seeds):
        n = len(seeds)
        return sampler_class(model).sample(
            5, n, SHAPE, generator=seeds, mask=mask[:n], x0=x0[:n], **eta, **QUIET
        )[0]

    together = run([3, 4, 5])
    apart = torch.cat([run([3]), run([torch.Generator().manual_seed(4)]), run([5])])
    assert torch.allclose(together, apart, atol=1e-6)
    assert torch.allclose(run([5, 3]), together[[2, 0]], atol=1e-6)
    with pytest.raises(ValueError, match="2 seeds or generators for batch_size=3"):
        sampler_class(model).sample(5, 3, SHAPE, generator=[1, 2], **QUIET)


def test_the_original_order_of_draws_is_the_default():
    """x_T, then for each step the mask's noise and the step's."""
    torch.manual_seed(7)
    expected = torch.randn(2, *SHAPE)
    torch.manual_seed(7)
    assert torch.equal(draw((2, *SHAPE), "cpu"), expected)
    assert torch.equal(draw((2, *SHAPE), "cpu", torch.Generator().manual_seed(7)), expected)
    one, two = draw((2, *SHAPE), "cpu", sources([7, 8], 2), repeat=True)
    assert torch.equal(one, two)


def test_callbacks_see_every_step(exact_denoiser, sampler_class):
    steps, estimates = [], []
    sampler_class(exact_denoiser("v", timesteps=100)).sample(
        10, 2, SHAPE, callback=steps.append, img_callback=lambda pred_x0, i: estimates.append((i, pred_x0.shape)), **QUIET
    )  # fmt: skip
    assert steps == list(range(10)) and estimates == [(i, (2, *SHAPE)) for i in range(10)]


def test_estimates_of_x0_are_those_of_the_model(exact_denoiser, sampler_class):
    """Of data with one known value, every estimate is that value."""
    estimates = []
    model = exact_denoiser("v", timesteps=1000, mean=0.3, std=1e-4)
    out, _ = sampler_class(model).sample(
        10, 2, SHAPE, img_callback=lambda pred_x0, i: estimates.append(pred_x0), **QUIET
    )
    assert max(float((e - 0.3).abs().max()) for e in estimates) < 1e-3
    assert float((out - 0.3).abs().max()) < 0.15  # the walk ends at the first training step, not at 0


# ------------------------------------------------------------------------------------------------ latents that explode


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_infinite_latents_are_named_with_their_step(exact_denoiser, sampler_class, bad):
    model, calls = exact_denoiser("v", timesteps=100), []
    net = model.apply_model

    def breaks(x, t, cond=None):
        calls.append(1)
        return net(x, t) * (bad if len(calls) == 4 else 1)

    model.apply_model = breaks
    at = 3 if sampler_class is PLMSSampler else 4  # its first step asks twice
    with pytest.raises(
        FloatingPointError, match=rf"sampling step {at} of 10.*bfloat16 instead of half precision"
    ):
        sampler_class(model).sample(10, 1, SHAPE, **QUIET)
    assert len(calls) < 7  # it does not go on to the end


def test_infinite_latents_are_told_to_the_user_of_a_script(tiny):
    from ldm.util import instantiate_from_config

    model = instantiate_from_config(tiny.latent_diffusion())
    model.get_learned_conditioning = lambda texts: torch.zeros(len(texts), 5, 8)
    model.apply_model = lambda x, t, c: x * float("nan")
    with pytest.raises(inference.InferenceError, match="step 1 of 5.*--precision full, or --bf16"):
        inference.sample_text(model, DDIMSampler(model), ["a"], 5, (3, 8, 8), verbose=False)


# ------------------------------------------------------------------------------------------------------ image to image


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_inversion_and_decoding_take_conditions_of_every_structure(conditional, wrap):
    model, x = conditional(), 0.7 * torch.randn(2, *SHAPE) + 0.5
    c, u = torch.full((2, 1), 0.5), torch.full((2, 1), 0.2)
    sampler = DDIMSampler(model)
    sampler.make_schedule(100, verbose=False)
    options = {
        "unconditional_guidance_scale": 1.5, "unconditional_conditioning": wrap(u), "guidance_rescale": 0.2, **QUIET
    }  # fmt: skip
    noise, _ = sampler.encode(x, wrap(c), 100, **options)
    again = sampler.decode(noise, wrap(c), 100, **options)
    assert (again - x).abs().max() < 0.1
    assert {len(s) if isinstance(s, torch.Tensor) else len(next(iter(_tensors(s)))) for s in model.seen} == {
        4
    }


def _tensors(cond):
    if isinstance(cond, torch.Tensor):
        yield cond
    else:
        for v in cond.values() if isinstance(cond, dict) else cond:
            yield from _tensors(v)


def test_noising_takes_a_seed_for_each_image(exact_denoiser):
    sampler = DDIMSampler(exact_denoiser("v", timesteps=100))
    sampler.make_schedule(10, verbose=False)
    x0, t = torch.zeros(2, *SHAPE), torch.full((2,), 5)
    both = sampler.stochastic_encode(x0, t, generator=[1, 2])
    assert torch.equal(both[1:], sampler.stochastic_encode(x0[1:], t[1:], generator=[2]))
    assert both.std() == pytest.approx(float(sampler.ddim_sqrt_one_minus_alphas[5]), rel=0.4)


def test_thresholds_and_quantised_estimates_reach_the_solvers(exact_denoiser):
    model = exact_denoiser("v", timesteps=100)
    bounded, _ = UniPCSampler(model, predict_x0=False).sample(6, 1, SHAPE, dynamic_threshold=0.1, **QUIET)
    assert float(bounded.square().mean().sqrt()) < 0.3

    class FirstStage:
        @staticmethod
        def quantize(z):
            return z.round(), None, None

    model.first_stage_model = FirstStage
    seen = []
    UniPCSampler(model).sample(
        6, 1, SHAPE, quantize_x0=True, img_callback=lambda p, i: seen.append(p), **QUIET
    )
    assert all(torch.equal(p, p.round()) for p in seen)
