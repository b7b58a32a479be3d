"""The short calls of a notebook: `from ldm.models import LatentDiffusion`."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.lr_scheduler import get_scheduler
from ldm.models import LatentDiffusion
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.latent_space import LatentSpace
from ldm.models.diffusion.plms import PLMSSampler
from taming.modules.ema import LitEma
from taming.util import ConfigError, instantiate_from_config

PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8))


def built(config):
    torch.manual_seed(1)
    model = instantiate_from_config(OmegaConf.create(config)).eval()
    for parameter in model.model.parameters():
        if (
            parameter.ndim > 1 and not parameter.any()
        ):  # an untrained network ends in zeros, and so does its attention
            torch.nn.init.normal_(parameter, std=0.1)
    if model.use_ema:
        model.model_ema = LitEma(model.model)
    return model


def text_config(tiny, **params):
    return tiny.latent_diffusion(
        first_stage_config=tiny.kl, cond_stage_config=tiny.text, cond_stage_key="caption", **params
    )


@pytest.fixture
def text_model(tiny):
    """16×16 pictures over latents of 8×8."""
    return built(text_config(tiny))


@pytest.fixture
def class_model(tiny):
    classes = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 4, "key": "class_label"},
    }
    return built(tiny.latent_diffusion(cond_stage_config=classes, cond_stage_key="class_label"))


def pixels(picture):
    return np.asarray(picture).astype(int)


# ------------------------------------------------------------------------------------------------- the default model


@pytest.fixture(scope="module")
def default():
    torch.manual_seed(0)
    return LatentDiffusion(latent_dim=4, attention_resolutions=[8, 16, 32], num_heads=8)


def test_the_short_name_is_the_class_of_every_configuration():
    assert LatentDiffusion is ddpm.LatentDiffusion


def test_importing_the_package_of_models_loads_none_of_them():
    code = "import sys, ldm.models; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_three_numbers_build_a_model_that_draws(default):
    unet = default.model.diffusion_model
    # 32, 16 and 8 are reached by the factors 1, 2 and 4
    assert (unet.in_channels, list(unet.attention_resolutions), unet.num_heads) == (4, [4, 2, 1], 8)
    picture = default.generate("red heart", num_steps=2, progress=False)
    assert isinstance(picture, Image.Image) and picture.size == (128, 128)


def test_the_default_model_learns(default):
    optimizer = torch.optim.AdamW(default.trained_parameters(), lr=1e-3)
    scheduler = get_scheduler(optimizer, num_warmup_steps=1, num_training_steps=10)
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1, "caption": ["red heart", "blue cat"]}
    default.train()
    before = default.cond_stage_model.transformer.token_emb.weight.clone()
    for _ in range(3):
        loss, _ = default.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert torch.isfinite(loss) and default.learning_rate == 1e-4
    # gradients pass through the untrained network's last layer of zeros from the second step on
    assert not torch.equal(before, default.cond_stage_model.transformer.token_emb.weight)


def test_further_parameters_are_the_published_ones():
    model = LatentDiffusion(
        latent_dim=3, attention_resolutions=[4], num_heads=4, image_size=16, model_channels=32, timesteps=10, use_ema=False,
        parameterization="eps",
    )  # fmt: skip
    assert (model.channels, model.num_timesteps, model.use_ema, model.parameterization) == (
        3,
        10,
        False,
        "eps",
    )
    assert inference.image_size(model) == (64, 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"attention_resolutions": [7]},
            ValueError,
            "do not pass through 7; choose among 32, 16, 8, 4, 2, 1",
        ),
        ({"attention_resolutions": [0]}, ValueError, "do not pass through 0"),
        ({"num_heads": 7}, ValueError, "num_heads=7 must divide model_channels=64"),
        ({"latent_dims": 4}, TypeError, "latent_dims"),
        ({"first_stage_config": {}}, TypeError, "cond_stage_config"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(given, error, message):
    with pytest.raises(error, match=message):
        LatentDiffusion(**given)


def test_configurations_in_yaml_stay_strict():
    with pytest.raises(ConfigError, match="latent_dim"):
        instantiate_from_config(
            {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"latent_dim": 4}}
        )


# ----------------------------------------------------------------------------------------------------------- drawing


def test_generate_is_guided_ddim_and_the_first_stage(text_model):
    drawn = text_model.generate(
        "red heart", 3, 5.0, generator=torch.Generator().manual_seed(3), progress=False
    )
    with torch.no_grad():
        c, uc = (text_model.get_learned_conditioning([text]) for text in ("red heart", ""))
        start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        z, _ = DDIMSampler(text_model).sample(
            3, 1, (3, 8, 8), c, x_T=start, unconditional_guidance_scale=5.0, unconditional_conditioning=uc, verbose=False
        )  # fmt: skip
        image = ((text_model.decode_first_stage(z) + 1) / 2).clamp(0, 1)[0]
    assert np.array_equal(drawn, (255 * image.permute(1, 2, 0).numpy()).astype(np.uint8))


def test_text_is_guided_by_seven_and_a_half_unless_said_otherwise(text_model):
    plain, said, other = (
        pixels(text_model.generate("a", 2, scale, generator=0, progress=False)) for scale in (None, 7.5, 1.0)
    )
    assert np.array_equal(plain, said) and not np.array_equal(plain, other)


def test_a_number_seeds_each_picture_on_its_own(text_model):
    four = text_model.generate(["a", "b"], 2, num_images=2, generator=10, progress=False)
    alone = text_model.generate("b", 2, generator=13, progress=False)
    assert np.array_equal(pixels(four[3]), pixels(alone))
    assert len({p.tobytes() for p in four}) == 4


@pytest.mark.parametrize("name", ["plms", "dpm", "unipc", "deis"])
def test_other_samplers_and_sizes(text_model, name):
    picture = text_model.generate("a", 2, sampler=name, height=32, width=48, generator=0, progress=False)
    assert picture.size == (48, 32)


def test_averaged_weights_draw_and_the_model_is_left_as_it_was(tiny):
    model = built(text_config(tiny, use_ema=True)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model.generate("a", 2, generator=0, progress=False)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.model_ema.diffusion_modelout2weight.zero_()
    assert pixels(model.generate("a", 2, generator=0, progress=False)).tolist() != pixels(first).tolist()


def test_sample_takes_a_prompt_and_answers_with_pictures(text_model):
    drawn = text_model.sample(
        "a", condition=None, num_steps=2, guidance_scale=7.5, generator=0, progress=False
    )
    assert np.array_equal(pixels(drawn), pixels(text_model.generate("a", 2, generator=0, progress=False)))
    with torch.no_grad():
        c = text_model.get_learned_conditioning(["a"])
    encoded = text_model.sample(condition=c, num_steps=2, generator=0, progress=False)
    assert np.array_equal(pixels(drawn), pixels(encoded))
    assert [p.size for p in text_model.sample(["a", "b"], None, 2, progress=False)] == [(16, 16)] * 2


def test_sample_as_published_still_answers_with_latents(text_model):
    c = text_model.get_learned_conditioning(["a", "b"])
    latents, kept = text_model.sample(c, 2, return_intermediates=True, timesteps=3, verbose=False)
    assert latents.shape == (2, 3, 8, 8) and kept[0].shape == latents.shape
    assert text_model.sample(cond=c, batch_size=1, timesteps=2, verbose=False).shape == (1, 3, 8, 8)


def test_classes_are_drawn_by_number(class_model):
    one = class_model.sample(condition=2, num_steps=2, generator=5, progress=False)
    two = class_model.sample(condition=[1, 2], num_steps=2, guidance_scale=3.0, generator=4, progress=False)
    assert isinstance(one, Image.Image) and len(two) == 2
    plain = class_model.sample(condition=torch.tensor([1, 2]), num_steps=2, generator=4, progress=False)
    assert np.array_equal(pixels(plain[1]), pixels(one))
    assert not np.array_equal(pixels(plain[1]), pixels(two[1]))
    with pytest.raises(ValueError, match="labels from 9 to 9 for 4 classes"):
        class_model.sample(condition=9, num_steps=2)


def test_an_unconditional_model_needs_no_words(tiny):
    model = built(
        tiny.latent_diffusion(
            cond_stage_config="__is_unconditional__",
            unet={"use_spatial_transformer": False, "context_dim": None},
        )
    )
    assert model.generate(num_steps=2, progress=False).size == (8, 8)
    assert len(model.generate(num_steps=2, num_images=2, progress=False)) == 2
    with pytest.raises(ValueError, match="can be left out, text or a class, not None"):
        model.generate(num_steps=2, guidance_scale=2.0)
    with pytest.raises(inference.InferenceError, match="not conditioned on text"):
        model.generate("a", num_steps=2)
    model.cond_stage_key = "caption"
    with pytest.raises(ValueError, match="this model is unconditional"):
        model.generate("a", num_steps=2)
    with pytest.raises(ValueError, match="no room"):
        model.generate("a", num_steps=2, condition=torch.zeros(1, 3, 8, 8))


def test_a_hybrid_model_takes_a_picture_beside_the_prompt(tiny):
    model = built(text_config(tiny, conditioning_key="hybrid", unet={"in_channels": 4, "out_channels": 3}))
    mask = torch.randn(1, 1, 8, 8)
    as_tensor, as_dict = (
        model.sample(["a", "b"], condition=c, num_steps=2, generator=0, progress=False)
        for c in (mask, {"c_concat": [mask]})
    )
    assert [p.tobytes() for p in as_tensor] == [p.tobytes() for p in as_dict]
    other = model.sample(["a", "b"], condition=-mask, num_steps=2, generator=0, progress=False)
    assert other[0].tobytes() != as_tensor[0].tobytes()
    with pytest.raises(ValueError, match="3 rows does not go with 2 pictures|2 rows does not go with 3"):
        model.sample(["a", "b"], condition=mask.expand(3, -1, -1, -1), num_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 7}, "prompt=7 must be a text"),
        ({"prompt": []}, "must be a text, or a list of at least one"),
        ({}, "conditioned on 'caption': give a prompt or a condition"),
        ({"prompt": "a", "condition": torch.zeros(1, 16, 8)}, "has no room for both"),
        ({"prompt": "a", "num_images": 0}, "num_images=0"),
        ({"prompt": "a", "num_steps": 0}, "choose from 1 to 1000"),
        ({"prompt": "a", "dtype": torch.int8}, "dtype=torch.int8: choose"),
        ({"prompt": "a", "generator": [1, 2]}, "2 seeds or generators for batch_size=1"),
    ],
)
def test_wrong_calls_are_answered_in_a_sentence(text_model, options, message):
    with pytest.raises(ValueError, match=message):
        text_model.generate(**{"num_steps": 2, "progress": False, **options})


def test_wrong_samplers_and_sizes_are_refused(text_model):
    with pytest.raises(inference.InferenceError, match=r"no sampler 'unipcc'.*unipc"):
        text_model.generate("a", sampler="unipcc")
    with pytest.raises(inference.InferenceError, match="multiples of 2"):
        text_model.generate("a", height=17)


def test_guidance_needs_something_that_can_be_left_out(tiny):
    model = built(tiny.latent_diffusion(cond_stage_key="LR_image"))
    context = torch.randn(1, 2, 8)
    assert model.sample(condition=context, num_steps=2, progress=False).size == (8, 8)
    with pytest.raises(ValueError, match="leave guidance_scale at 1"):
        model.sample(condition=context, num_steps=2, guidance_scale=3.0)


def test_bfloat16_is_close_to_float32(text_model):
    full, half = (
        pixels(text_model.generate("a", 2, generator=0, dtype=dtype, progress=False))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not np.array_equal(full, half) and np.abs(full - half).mean() < 8


def test_a_bar_shows_progress_unless_it_is_not_wanted(text_model, capsys):
    text_model.generate("a", 2)
    assert "DDIM Sampler: 100%" in capsys.readouterr().err
    text_model.generate("a", 2, progress=False)
    assert "Sampler" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- image to image


def test_strength_nothing_gives_the_first_stages_picture(text_model):
    drawn = text_model.img2img(PICTURE, "a", strength=0.0, progress=False)
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(PICTURE) / 127.5 - 1).permute(2, 0, 1)[None].float()
        back = text_model.first_stage_model.decode(text_model.first_stage_model.encode(x).mode())[0]
    expected = (255 * ((back + 1) / 2).clamp(0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(pixels(drawn) - expected).max() <= 1


def test_the_stronger_the_further_away(text_model):
    kept = pixels(text_model.img2img(PICTURE, "a", strength=0.0, progress=False))
    far = [
        np.abs(
            pixels(text_model.img2img(PICTURE, "a", strength=s, num_steps=10, generator=1, progress=False))
            - kept
        ).mean()
        for s in (0.2, 1.0)
    ]
    assert 0 < far[0] < far[1]


def test_image_to_image_is_the_published_noising_and_denoising(text_model):
    drawn = text_model.img2img(
        PICTURE, "a", 0.5, 4, 3.0, generator=torch.Generator().manual_seed(2), progress=False
    )
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(PICTURE) / 127.5 - 1).permute(2, 0, 1)[None].float()
        z = text_model.first_stage_model.encode(x).mode() * text_model.scale_factor
        sampler = DDIMSampler(text_model)
        sampler.make_schedule(4)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
        c, uc = (text_model.get_learned_conditioning([text]) for text in ("a", ""))
        z = sampler.stochastic_encode(z, torch.tensor([2]), noise=noise)
        z = sampler.decode(z, c, 2, 3.0, uc, verbose=False)
        image = ((text_model.decode_first_stage(z) + 1) / 2).clamp(0, 1)[0]
    assert np.array_equal(drawn, (255 * image.permute(1, 2, 0).numpy()).astype(np.uint8))


def test_pictures_come_as_files_images_or_tensors(text_model, tmp_path):
    PICTURE.resize((19, 26)).save(tmp_path / "a.png")
    # latents of 8 are halved once, and the first stage has factor 2: sides are multiples of 4
    assert text_model.img2img(tmp_path / "a.png", "a", num_steps=4, progress=False).size == (16, 24)
    tensor = torch.zeros(3, 16, 16)
    two = text_model.img2img(tensor, "a", num_steps=4, num_images=2, generator=0, progress=False)
    assert len(two) == 2 and two[0].tobytes() != two[1].tobytes()
    again = text_model.img2img(tensor, "a", num_steps=4, generator=1, progress=False)
    assert np.array_equal(pixels(two[1]), pixels(again))


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (PICTURE, {"strength": 1.5}, inference.InferenceError, "strength 1.5 must lie between 0"),
        (PICTURE.resize((3, 16)), {}, inference.InferenceError, "3x16 pixels is too small"),
        (torch.zeros(2, 3, 8, 8), {}, ValueError, r"one picture \(3, h, w\)"),
        ("nowhere.png", {}, FileNotFoundError, "nowhere.png"),
    ],
)
def test_what_is_no_picture_is_refused(text_model, image, options, error, message):
    with pytest.raises(error, match=message):
        text_model.img2img(image, "a", **options)


def test_flows_are_drawn_by_their_own_sampler_alone(tiny):
    model = built(text_config(tiny, parameterization="flow"))
    assert model.generate("a", 2, progress=False).size == (16, 16)
    with pytest.raises(inference.InferenceError, match="does not sample rectified flows"):
        model.img2img(PICTURE, "a")
    with pytest.raises(ValueError, match="FlowSampler"):
        model.generate("a", 2, sampler="ddim")


# ---------------------------------------------------------------------------------------------------------- loading


def test_a_runs_folder_becomes_a_model(tmp_path, tiny, text_model):
    OmegaConf.save(OmegaConf.create({"model": text_config(tiny)}), tmp_path / "config.yaml")
    torch.save({"state_dict": text_model.state_dict()}, tmp_path / "model.ckpt")
    loaded = LatentDiffusion.from_pretrained(tmp_path, device="cpu")
    assert not loaded.training
    drawn = [m.generate("a", 2, generator=0, progress=False).tobytes() for m in (loaded, text_model)]
    assert drawn[0] == drawn[1]
    with pytest.raises(
        inference.InferenceError, match="holds a LatentDiffusion, not a LatentInpaintDiffusion"
    ):
        ddpm.LatentInpaintDiffusion.from_pretrained(tmp_path, device="cpu")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(inference.InferenceError, match="there is no folder or file"):
        LatentDiffusion.from_pretrained(tmp_path / "nothing")


def test_plms_is_refused_noise_in_a_sentence(text_model):
    assert PLMSSampler is inference.SAMPLERS["plms"]
    with pytest.raises(ValueError, match="must be 0 for PLMS"):
        text_model.generate("a", 2, sampler="plms", eta=0.5)


def test_the_short_call_keeps_the_published_signature_and_explains_itself():
    published = inspect.signature(LatentSpace.sample)
    assert inspect.signature(LatentDiffusion.sample) == published
    assert "guidance_scale=7.5" in LatentDiffusion.sample.__doc__
    assert LatentDiffusion.sample.__qualname__ == "NotebookCalls.sample"


def test_the_negative_prompt_is_encoded_once_for_all_pictures(text_model, monkeypatch):
    asked, encode = [], text_model.cond_stage_model.encode
    monkeypatch.setattr(
        text_model.cond_stage_model, "encode", lambda texts: (asked.append(list(texts)), encode(texts))[1]
    )
    text_model.generate("a", num_steps=1, num_images=3, negative_prompt="b", progress=False)
    assert asked == [["a"], ["b"]]
