"""`DiffusionModel`: the short calls, their conditions and their samplers."""

import pytest
import torch
from omegaconf import OmegaConf

from sgm.models import DiffusionModel
from sgm.models.notebook import DISCRETE_SAMPLERS, SAMPLERS
from sgm.util import append_dims
from taming.checkpoint import save_checkpoint

SMALL = {"model_channels": 32, "num_heads": 4, "context_dim": 16}


@pytest.fixture(scope="module")
def model():
    """A small one whose last layer, zero when made, is moved, so that it sees noise levels and conditions."""
    torch.manual_seed(0)
    built = DiffusionModel(**SMALL, scale_factor=0.5)
    with torch.no_grad():
        for p in built.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return built


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_default_model_samples_a_latent_in_one_call():
    z = DiffusionModel(**SMALL).sample(torch.randn(1, 4, 64, 64), num_steps=1)
    assert z.shape == (1, 4, 64, 64) and torch.isfinite(z).all()


@pytest.mark.parametrize("name", [*SAMPLERS, *DISCRETE_SAMPLERS])
def test_every_sampler_has_a_name_and_leaves_the_noise_as_it_is(model, noise, name):
    before, steps = noise.clone(), []
    z = model.sample(
        noise, condition="a cat", num_steps=3, guidance_scale=2.0, sampler=name, callback=steps.append
    )
    assert z.shape == noise.shape and torch.isfinite(z).all()
    assert torch.equal(noise, before) and steps[:2] == [0, 1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("euler", 0.04),
        ("ddim", 0.04),
        *((n, 0.006) for n in ("heun", "dpmpp2m", "lms", "plms", "dpm", "unipc", "deis")),
    ],
)
def test_samplers_of_both_chapters_meet_on_the_analytic_gaussian(noise, name, error):
    """x_0 ~ N(0, s²): the probability flow takes standard noise ε to s ε; those of order 1 come as near as that in 40 steps."""
    model = DiffusionModel(**SMALL)
    model.denoise = lambda x, sigma, cond: x * append_dims(0.25 / (0.25 + sigma**2), x.ndim)
    z = model.sample(noise, num_steps=40, guidance_scale=1.0, sampler=name)
    assert float((z / noise - 0.5).abs().max()) < error


def test_latents_come_as_the_first_stage_knows_them(model, noise):
    plain = model.sample(noise, num_steps=2)
    model.scale_factor = 1.0
    try:
        assert torch.allclose(model.sample(noise, num_steps=2), 0.5 * plain)
    finally:
        model.scale_factor = 0.5


def test_a_text_and_its_encoding_are_the_same_condition(model, noise):
    encoded = model.conditioner.embedders[0](["a cat"])
    by_text = model.sample(noise, condition="a cat", num_steps=2, guidance_scale=3.0)
    by_tensor = model.sample(noise, condition=encoded, num_steps=2, guidance_scale=3.0)
    by_entry = model.sample(noise, condition={"txt": ["a cat", "a cat"]}, num_steps=2, guidance_scale=3.0)
    by_name = model.sample(noise, condition={"crossattn": encoded}, num_steps=2, guidance_scale=3.0)
    for other in (by_tensor, by_entry, by_name):
        assert torch.allclose(by_text, other, atol=1e-5)
    assert not torch.allclose(
        by_text, model.sample(noise, condition="a dog", num_steps=2, guidance_scale=3.0), atol=1e-5
    )


def test_guidance_of_one_is_the_condition_alone_and_of_zero_none(model, noise):
    one = model.sample(noise, condition="a cat", num_steps=2, guidance_scale=1.0)
    zero = model.sample(noise, condition="a cat", num_steps=2, guidance_scale=0.0)
    nothing = model.sample(noise, num_steps=2, guidance_scale=1.0)
    assert torch.allclose(zero, nothing, atol=1e-5) and not torch.allclose(one, zero, atol=1e-5)
    towards = model.sample(noise, condition="a cat", unconditional="a cat", num_steps=2, guidance_scale=9.0)
    assert torch.allclose(towards, one, atol=1e-4)


def test_each_sample_has_its_own_seed(model, noise):
    kwargs = {"num_steps": 3, "sampler": "euler_ancestral"}
    both = model.sample(noise, generator=[1, 2], **kwargs)
    assert torch.allclose(both[1:], model.sample(noise[1:], generator=[2], **kwargs), atol=1e-5)


def test_eta_is_the_noise_of_stochastic_samplers_and_refused_by_others(model, noise):
    still = model.sample(noise, num_steps=3, sampler="euler_ancestral", eta=0.0, guidance_scale=1.0)
    assert torch.allclose(
        still, model.sample(noise, num_steps=3, sampler="euler", guidance_scale=1.0), atol=1e-5
    )
    with pytest.raises(ValueError, match="EulerEDMSampler adds no noise"):
        model.sample(noise, sampler="euler", eta=0.5)


def test_the_model_is_left_as_it_was(model, noise):
    model.train()
    own = model.sampler.guider
    model.sample(noise, num_steps=1, guidance_scale=1.0)
    assert model.training and model.sampler.guider is own and model.conditioner.embedders[0].ucg_rate == 0.1
    model.eval()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sampler": "eulr"}, "Did you mean 'euler'"),
        ({"condition": ["a", "b", "c"]}, "3 texts do not go with 2 latents"),
        ({"condition": 7}, "this model reads \\['txt'\\]"),
        ({"condition": torch.zeros(3, 5, 16)}, "3 rows"),
    ],
)
def test_impossible_requests_are_explained(model, noise, request_, message):
    with pytest.raises(ValueError, match=message):
        model.sample(noise, num_steps=1, **request_)


def test_noise_without_a_batch_axis_and_heads_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"\(b, c, h, w\)"):
        model.sample(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="num_heads=7"):
        DiffusionModel(num_heads=7)


def test_the_published_call_still_begins_with_a_condition(model):
    torch.manual_seed(3)
    scaled = model.sample({"crossattn": torch.zeros(2, 3, 16)}, batch_size=2, shape=(4, 8, 8))
    assert scaled.shape == (2, 4, 8, 8)


@pytest.fixture
def of_classes(tmp_path):
    """A trained run's folder of a model of classes, over the noise levels of Stable Diffusion."""
    base, embedders = "sgm.modules.diffusionmodules.", "sgm.modules.encoders.modules."
    network = {
        "in_channels": 1, "out_channels": 1, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1,
        "channel_mult": [1], "num_head_channels": 32, "num_classes": "sequential", "adm_in_channels": 8, "use_scale_shift_norm": True,
    }  # fmt: skip
    table = {"num_idx": 1000, "scaling_config": {"target": base + "denoiser_scaling.EpsScaling"},
             "discretization_config": {"target": base + "discretizer.LegacyDDPMDiscretization"}}  # fmt: skip
    classes = {
        "input_key": "cls",
        "target": embedders + "ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 10},
    }
    params = {
        "network_config": {"target": base + "openaimodel.UNetModel", "params": network},
        "denoiser_config": {"target": base + "denoiser.DiscreteDenoiser", "params": table},
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [{**classes, "ucg_rate": 0.1}]}},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "ckpt_path": "a file that is gone",
    }  # fmt: skip
    torch.manual_seed(5)
    built = DiffusionModel(**{**params, "ckpt_path": None})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "configs").mkdir()
    save_checkpoint({"state_dict": built.state_dict()}, tmp_path / "checkpoints" / "last.ckpt")
    config = {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}
    OmegaConf.save(config, tmp_path / "configs" / "now-project.yaml")
    return tmp_path, built


def test_a_trained_run_comes_back_by_its_folder(of_classes):
    folder, built = of_classes
    model = DiffusionModel.from_pretrained(folder, device="cpu")
    noise = torch.randn(3, 1, 8, 8)
    for condition in (7, [7, 7, 7], torch.tensor([7, 7, 7])):
        z = model.sample(noise, condition=condition, num_steps=2, guidance_scale=2.0)
        assert torch.equal(z, built.sample(noise, condition=7, num_steps=2, guidance_scale=2.0))
    assert torch.isfinite(model.sample(noise, condition=range(3), num_steps=2, sampler="ddim", eta=0.0)).all()
