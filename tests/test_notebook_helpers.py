"""The names that the latent-diffusion notebook imports, with a tiny super-resolution model."""

import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.inference import InferenceError
from taming.util import instantiate_from_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_helpers as helpers

FIRST_STAGE = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3, "n_embed": 16, "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
            "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        },
    },
}  # fmt: skip


@pytest.fixture
def config(tiny):
    """Of the published kind: a VQ first stage of factor 4, the small picture joined to the latents."""
    model = tiny.latent_diffusion(
        first_stage_config=FIRST_STAGE, conditioning_key=None, concat_mode=True, cond_stage_key="LR_image",
        unet={"in_channels": 6, "use_spatial_transformer": False, "context_dim": None},
    )  # fmt: skip
    return OmegaConf.create({"model": model})


@pytest.fixture
def model(config):
    built = instantiate_from_config(config.model).eval()
    torch.nn.init.normal_(built.model.diffusion_model.out[2].weight, std=0.05)
    return built


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture():
    pixels = np.random.RandomState(0).randint(0, 256, (16, 24, 3), dtype=np.uint8)
    folder = Path("data/example_conditioning/superresolution")
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    return folder / "a.png"


def test_a_picture_becomes_a_batch_of_small_and_large(picture):
    batch = helpers.get_cond("superresolution", picture)
    assert batch["LR_image"].shape == (1, 16, 24, 3) and batch["image"].shape == (1, 64, 96, 3)
    pixels = np.asarray(Image.open(picture))
    assert np.allclose(batch["LR_image"][0], pixels / 127.5 - 1, atol=1e-6)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    # interpolating keeps the mean, up to the borders
    assert batch["image"].mean().item() == pytest.approx(pixels.mean() / 255, abs=0.02)


def test_a_run_enlarges_four_times_and_logs_what_it_did(model, picture):
    log = helpers.run(model, picture, "superresolution", custom_steps=2)
    assert set(log) == {
        "input", "reconstruction", "LR_image", "sample", "sample_noquant", "sample_diff", "time"
    }  # fmt: skip
    assert log["sample"].shape == log["reconstruction"].shape == (1, 3, 64, 96)
    assert log["LR_image"].shape == (1, 3, 16, 24) and log["time"] > 0
    assert torch.equal(log["sample_diff"], (log["sample_noquant"] - log["sample"]).abs())
    assert not hasattr(model, "split_input_params")


def test_large_pictures_go_patch_by_patch_and_small_ones_after_them_do_not(model, picture):
    Image.open(picture).resize((32, 48)).save("large.png")
    assert helpers.run(model, "large.png", "superresolution", 2)["sample"].shape == (1, 3, 192, 128)
    assert model.split_input_params["ks"] == (128, 128) and model.split_input_params["stride"] == (64, 64)
    helpers.run(model, picture, "superresolution", 2)
    assert not hasattr(model, "split_input_params")


def test_sides_that_the_network_cannot_halve_are_made_to_fit_on_request(model, picture):
    Image.open(picture).resize((21, 33)).save("odd.png")
    with pytest.raises(ValueError, match="multiple of 2"):
        helpers.run(model, "odd.png", "superresolution", 2)
    log = helpers.run(model, "odd.png", "superresolution", 2, resize_enabled=True)
    assert log["sample"].shape == (1, 3, 128, 64)
    Image.open(picture).resize((32, 40)).save("odd.png")
    with pytest.raises(InferenceError, match=r"odd.png is 32x40; .* resize_enabled=True"):
        helpers.run(model, "odd.png", "superresolution", 2)
    log = helpers.run(model, "odd.png", "superresolution", 2, resize_enabled=True)
    assert log["sample"].shape == (1, 3, 128, 128)


def test_the_sample_is_that_of_the_sampler_under_the_batchs_condition(model, picture):
    batch = helpers.get_cond("superresolution", picture)
    start = torch.randn(1, 3, 16, 24)
    log = helpers.make_convolutional_sample(batch, model, custom_steps=3, eta=0.0, x_T=start)
    with torch.no_grad():
        c = batch["LR_image"].movedim(-1, 1)
        z, _ = helpers.convsample_ddim(model, c, 3, start.shape, eta=0.0, x_T=start, verbose=False)
        assert torch.equal(log["sample"], model.decode_first_stage(z))


def test_a_model_comes_with_the_step_of_its_checkpoint(config, model):
    torch.save({"state_dict": model.state_dict(), "global_step": 42}, "model.ckpt")
    loaded, step = helpers.load_model_from_config(config, "model.ckpt")
    assert step == 42 and not loaded["model"].training
    weights = loaded["model"].state_dict()
    assert all(torch.equal(weights[k].cpu(), v) for k, v in model.state_dict().items())


def test_a_published_model_is_fetched_once(config, model, monkeypatch):
    calls = []

    def fetch(url, target):
        calls.append(url)
        torch.save({"state_dict": model.state_dict()}, "weights")
        with zipfile.ZipFile(target, "w") as archive:
            archive.write("weights", "model.ckpt")

    monkeypatch.setattr(helpers, "download", fetch)
    folder = Path("models/ldm/bsr_sr")
    with pytest.raises(InferenceError, match=r"no config\.yaml"):
        helpers.get_model("superresolution")
    OmegaConf.save(config, folder / "config.yaml")
    assert type(helpers.get_model("superresolution")["model"]) is type(model)
    assert len(calls) == 1 and sorted(p.name for p in folder.iterdir()) == ["config.yaml", "model.ckpt"]


def test_examples_are_the_pictures_of_their_folder(picture):
    assert helpers.get_cond_options("superresolution") == (str(picture.parent), ["a.png"])
    with pytest.raises(InferenceError, match="there are no examples in"):
        helpers.get_cond_options("inpainting")


def test_a_choice_on_the_page_is_read_when_it_is_used(picture, monkeypatch):
    widgets, pages = types.ModuleType("ipywidgets"), types.ModuleType("IPython.display")
    shown = []

    class RadioButtons:
        def __init__(self, options, description):
            self.options, self.value = options, options[0][1]

    widgets.RadioButtons, pages.display = RadioButtons, shown.append
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", pages)
    choice = helpers.select_cond_path("superresolution")
    assert shown == [choice] and choice.options == [("a.png", str(picture))]
    assert helpers.get_cond("superresolution", choice)["LR_image"].shape == (1, 16, 24, 3)
    helpers.visualize_cond_img(choice)
    assert shown[1].size == (24, 16)


def test_an_upload_in_colab_lands_among_the_examples(picture, monkeypatch):
    files = types.SimpleNamespace(upload=lambda: {"b.png": picture.read_bytes()})
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    path = helpers.get_custom_cond("superresolution")
    assert helpers.get_cond_options("superresolution")[1] == ["a.png", "custom_b.png"]
    assert helpers.get_cond("superresolution", path)["image"].shape == (1, 64, 96, 3)


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        ("ipywidgets", "select_cond_path", "pip install ipywidgets"),
        ("google.colab", "get_custom_cond", "uploading works in Colab alone"),
    ],
)
def test_what_needs_a_page_says_so(missing, call, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        getattr(helpers, call)("superresolution")


def test_unknown_tasks_are_named(picture):
    with pytest.raises(InferenceError, match="no task 'colouring'; choose one of superresolution"):
        helpers.get_cond("colouring", picture)
