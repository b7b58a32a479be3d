"""sgm.inference.api: from parameters to samplers, and a pipeline over tiny models, end to end."""

import copy
import dataclasses

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from scripts.demo import backend
from sgm.inference import api
from sgm.inference.api import ModelArchitecture, SamplingParams, SamplingPipeline
from sgm.util import instantiate_from_config

PARTS = "sgm.modules.diffusionmodules"
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PARAMS = {"steps": 4, "width": 32, "height": 16, "orig_width": 32, "orig_height": 16, "scale": 3.0}


def engine(keys):
    """SDXL's parts with few weights: latents 8 times smaller than images, two numbers a key (one for a score)."""
    encoders = "sgm.modules.encoders.modules"
    text = {
        "target": f"{encoders}.FrozenOpenCLIPEmbedder2", "input_key": "txt",
        "params": {"arch": CLIP, "version": None, "device": "cpu", "legacy": False, "always_return_pooled": True},
    }  # fmt: skip
    numbers = [
        {"target": f"{encoders}.ConcatTimestepEmbedderND", "input_key": k, "params": {"outdim": 4}}
        for k in keys
    ]
    width = 8 + sum(4 if key == "aesthetic_score" else 8 for key in keys)
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    unet = {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1],
        "num_head_channels": 16, "context_dim": 16, "num_classes": "sequential", "adm_in_channels": width,
    }  # fmt: skip
    denoiser = {
        "num_idx": 1000,
        "scaling_config": {"target": f"{PARTS}.denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{PARTS}.discretizer.LegacyDDPMDiscretization"},
    }
    first_stage = {"embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "network_config": {"target": f"{PARTS}.openaimodel.UNetModel", "params": unet},
            "denoiser_config": {"target": f"{PARTS}.denoiser.DiscreteDenoiser", "params": denoiser},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [text, *numbers]},
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        },
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configurations and weights under the names of SDXL 1.0's."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sdxl")
    for spec, last in (("base", "target_size_as_tuple"), ("refiner", "aesthetic_score")):
        config = engine(["original_size_as_tuple", "crop_coords_top_left", last])
        OmegaConf.save(OmegaConf.create({"model": config}), root / f"sd_xl_{spec}.yaml")
        model = instantiate_from_config(config)
        for weight in model.model.parameters():  # the last layers of blocks begin with zeros
            if weight.ndim > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
        state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
        save_file(state, root / f"sd_xl_{spec}_1.0.safetensors")
    return {"model_path": root, "config_path": root, "device": "cpu"}


@pytest.fixture(scope="module")
def base(folders):
    return SamplingPipeline(ModelArchitecture.SDXL_V1_BASE, **folders)


@pytest.fixture(scope="module")
def refiner(folders):
    return SamplingPipeline("stable-diffusion-xl-v1-refiner", **folders)


def test_text_becomes_images_of_the_size_asked_for_and_the_seed_decides(base):
    made = []
    for prompt, seed in (("a cat", 1), ("a cat", 1), ("a cat", 2), ("a red heart in the snow", 1)):
        torch.manual_seed(seed)
        made.append(base.text_to_image(SamplingParams(**PARAMS), prompt, samples=2))
    first, again, other_seed, other_prompt = made
    assert first.shape == (2, 3, 16, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other_seed)
    assert not torch.equal(first, other_prompt)


def test_what_to_avoid_is_heeded_and_without_it_base_models_of_sdxl_have_no_unconditional_text(
    base, monkeypatch
):
    """Nothing to avoid: the embedding is zero, as in training; in legacy models it is that of the empty text."""
    made, zeroed = {}, []
    plain = base.model.conditioner.get_unconditional_conditioning
    monkeypatch.setattr(
        base.model.conditioner,
        "get_unconditional_conditioning",
        lambda *args, **options: (
            zeroed.append(options["force_uc_zero_embeddings"]) or plain(*args, **options)
        ),
    )
    for negative in ("", "ugly", "grey"):
        torch.manual_seed(0)
        made[negative] = base.text_to_image(SamplingParams(**PARAMS), "a cat", negative)
    assert zeroed == [["txt"], [], []]
    assert not torch.equal(made[""], made["ugly"]) and not torch.equal(made["ugly"], made["grey"])
    legacy = copy.copy(base)
    legacy.specs = dataclasses.replace(base.specs, is_legacy=True)
    torch.manual_seed(0)
    assert not torch.equal(legacy.text_to_image(SamplingParams(**PARAMS), "a cat"), made[""])
    assert zeroed[-1] == []


def test_images_are_redrawn_as_far_as_the_strength_says(base):
    image = torch.rand(1, 3, 16, 32) * 2 - 1
    _, z = base.image_to_image(
        SamplingParams(**PARAMS, img2img_strength=0.0), image, "a cat", return_latents=True
    )
    with torch.no_grad():
        posterior = base.model.first_stage_model.encode(image)
    # only the lowest level is left, a single number: no step is made, and the image comes back with noise of the level 0
    assert (z - posterior.mean).abs().max() < 8 * posterior.std.max()
    _, far = base.image_to_image(SamplingParams(**PARAMS), image, "a cat", samples=3, return_latents=True)
    assert far.shape == (3, 4, 2, 4) and not torch.allclose(far[:1], z)


def test_two_stages_walk_the_way_of_one(base, refiner):
    """With the same network in both, the refiner that goes on where the base stopped gives what one model alone gives."""
    params = SamplingParams(
        **{**PARAMS, "steps": 8, "sampler": api.Sampler.EULER_EDM, "guider": api.Guider.IDENTITY}
    )
    torch.manual_seed(3)
    alone = base.text_to_image(params, "a cat")
    second = copy.copy(refiner)
    second.model = base.model
    torch.manual_seed(3)
    assert torch.allclose(_both(base, second, params), alone, atol=1e-5)
    torch.manual_seed(3)
    assert not torch.allclose(_both(base, refiner, params), alone, atol=1e-2)
    anew = backend.draw(base, params, "a cat", refiner=refiner, strength=0.4, finish_denoising=False)
    assert anew.shape == (1, 3, 16, 32) and torch.isfinite(anew).all()


def _both(base, refiner, params):
    return backend.draw(base, params, "a cat", refiner=refiner, strength=0.5)


@pytest.mark.parametrize("sampler", list(api.Sampler))
@pytest.mark.parametrize("discretization", list(api.Discretization))
def test_every_sampler_is_built_with_its_options(sampler, discretization):
    params = SamplingParams(
        steps=7, sampler=sampler, discretization=discretization, s_churn=0.5, eta=0.3, order=2, s_noise=1.1
    )
    made = api.get_sampler_config(params)
    assert type(made).__name__ == sampler.value and type(made.discretization).__name__ == discretization.value
    assert made.num_steps == 7 and made.guider.scale == 6.0
    for name in api.SAMPLER_OPTIONS[sampler]:
        assert getattr(made, name) == getattr(params, name)


def test_unknown_choices_and_missing_files_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match="unknown sampler 'Euler'"):
        api.get_sampler_config(SamplingParams(sampler="Euler"))
    with pytest.raises(ValueError, match="unknown thresholder 'dynamic'"):
        api.get_guider_config(SamplingParams(thresholder="dynamic"))
    with pytest.raises(ValueError, match="'sdxl' is unknown"):
        SamplingPipeline("sdxl", **folders)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*sd_xl_base_1.0.safetensors"):
        SamplingPipeline(ModelArchitecture.SDXL_V1_BASE, **{**folders, "model_path": tmp_path})
