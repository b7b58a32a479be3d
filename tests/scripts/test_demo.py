"""scripts/demo: turbo sampling, watermark detection, the content filter, and the pages."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.demo import backend, detect, gradio_app, gradio_app_sv4d
from scripts.util.detection import nsfw_and_watermark_dectection as detection
from sgm.inference.helpers import embed_watermark
from sgm.modules.diffusionmodules.discretizer import LegacyDDPMDiscretization

ROOT = Path(__file__).resolve().parents[2]
LEGACY = {"target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"}


# ---------------------------------------------------------------------------------------------------------------- turbo


@pytest.mark.parametrize(("steps", "indices"), [(1, [0]), (2, [0, 100]), (4, [0, 100, 200, 300])])
def test_turbo_visits_some_of_a_thousand_noise_levels(steps, indices):
    seen = []

    def denoiser(x, sigma, cond):
        seen.append(float(sigma[0]))
        return torch.zeros_like(x)

    x = backend.SubstepSampler(steps, discretization_config=LEGACY)(denoiser, torch.randn(2, 4, 3, 3), {})
    assert seen == LegacyDDPMDiscretization()(1000)[indices].tolist() and x.abs().max() < 1e-5
    with pytest.raises(ValueError, match="5 steps asked for; choose from 1 to 4"):
        backend.SubstepSampler(5, discretization_config=LEGACY)


def test_turbos_noise_comes_from_numpy_with_a_seed_for_each_step():
    noise, x = backend.SeededNoise(7), torch.zeros(1, 2, 3)
    for seed in (8, 9):
        assert torch.equal(noise(x), torch.from_numpy(np.random.RandomState(seed).randn(1, 2, 3)).float())


def test_a_turbo_image_depends_on_its_seed_alone():
    class Model:
        device = torch.device("cpu")
        conditioner = SimpleNamespace(embedders=[], get_unconditional_conditioning=lambda *a, **k: ({}, {}))
        model = None

        def ema_scope(self):
            return torch.no_grad()

        def denoiser(self, network, x, sigma, c):
            return torch.tanh(x / 10)

        def decode_first_stage(self, z):
            return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(made))
        made.append(backend.draw_turbo(Model(), "a cat", seed, steps=4, side=16))
    assert (
        made[0].shape == (1, 3, 16, 16)
        and torch.equal(made[0], made[1])
        and not torch.equal(made[0], made[2])
    )


def test_unknown_and_missing_models_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(backend.InferenceError, match="no model 'SDXL'"):
        backend.load_pipeline("SDXL")
    with pytest.raises(backend.InferenceError, match="no model 'turbo'"):
        backend.load_turbo("turbo")
    with pytest.raises(backend.InferenceError, match=r"no weights checkpoints/sd_turbo.safetensors"):
        backend.load_turbo("SD-Turbo")


def test_sizes_of_sdxl_have_about_a_megapixel_in_steps_of_64():
    assert len(backend.RATIOS) == 26
    for name, (height, width) in backend.RATIOS.items():
        assert height % 64 == width % 64 == 0 and 0.9e6 < height * width < 1.06e6
        assert height / width == pytest.approx(float(name), abs=0.01)


# ------------------------------------------------------------------------------------------------------------- watermark


@pytest.mark.parametrize(
    ("matches", "words"),
    [
        (27, "no watermark"),
        (28, "a part"),
        (33, "a part"),
        (34, "probably"),
        (35, "probably"),
        (36, "almost"),
        (48, "almost"),
    ],
)
def test_verdicts_change_where_published(matches, words):
    assert detect.verdict(matches).startswith(words)


def test_marked_files_are_told_from_others(tmp_path, capsys):
    patches = 0.3 + 0.4 * torch.rand(1, 3, 33, 40).repeat_interleave(8, 2).repeat_interleave(8, 3)
    patches = patches + 0.05 * torch.randn_like(patches)
    for name, images in (("plain", patches), ("marked", embed_watermark(patches))):
        Image.fromarray((255 * images[0].permute(1, 2, 0)).byte().numpy()).save(tmp_path / f"{name}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    names = [str(tmp_path / f"{name}.png") for name in ("plain", "marked", "small", "absent")]
    assert detect.main(names[:2]) == 0
    plain, marked = capsys.readouterr().out.splitlines()
    assert "almost certainly watermarked" in marked and "almost certainly" not in plain
    assert detect.main(names) == 2
    errors = capsys.readouterr().err
    assert "20x20 pixels has no room" in errors and "there is no such file" in errors


# ---------------------------------------------------------------------------------------------------------------- filter


def test_probabilities_are_those_of_a_logistic_regression_also_far_out():
    weights, biases = np.array([[1.0, -2.0]]), np.array([0.5])
    found = detection.predict_proba(np.array([[0.0, 0.0], [0.5, 0.5], [1e4, 0], [-1e4, 0]]), weights, biases)
    assert found[:, 0] == pytest.approx([1 / (1 + np.exp(-0.5)), 0.5, 1.0, 0.0])


def test_suspect_images_are_blurred_and_others_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection, "RESOURCES_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"p_head_v1.npz; get it from the original repository"):
        detection.DeepFloydDataFiltering()
    for name in detection.HEADS:  # suspect is what is bright
        np.savez(tmp_path / name, weights=np.ones((1, 1)), biases=np.zeros(1))

    class Clip(torch.nn.Module):
        def encode_image(self, x):
            assert x.shape[1:] == (3, 224, 224)
            return x.mean(dim=(1, 2, 3))[:, None]

    images = torch.rand(2, 3, 120, 120)
    images[0] *= 0.2
    images[1] = 0.8 + 0.2 * images[1]
    out = detection.DeepFloydDataFiltering(verbose=True, clip=Clip())(images)
    assert torch.equal(out[0], images[0]) and out[1].std() < 0.2 * images[1].std()
    assert "1 of 2 images are blurred" in capsys.readouterr().out


def test_without_the_filters_weights_there_is_none_and_a_notice(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(detection, "RESOURCES_ROOT", tmp_path)
    backend.content_filter.cache_clear()
    assert backend.content_filter("cpu") is None and backend.content_filter("cpu") is None
    assert [r.message.startswith("Images are not filtered") for r in caplog.records] == [True]
    backend.content_filter.cache_clear()


# ----------------------------------------------------------------------------------------------------------------- pages


class FakePipeline:
    """Draws white pictures."""

    specs = SimpleNamespace(width=64)

    def text_to_image(self, params, prompt, negative, samples, filter=None):
        return torch.ones(samples, 3, params.height, params.width)


def test_the_page_draws_and_saves(tmp_path, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "load_pipeline", lambda name: FakePipeline())
    monkeypatch.setattr(backend, "content_filter", lambda: None)
    page = AppTest.from_file(str(ROOT / "scripts/demo/sampling.py"), default_timeout=60).run()
    page.sidebar.selectbox[0].set_value("SD-2.1").run()
    page.button[0].click().run()
    assert not page.exception and not page.error
    assert len(list(Path("outputs/demo/txt2img/SD-2.1/samples").glob("*.png"))) == 2


@pytest.mark.parametrize("page", ["sampling", "turbo"])
def test_a_page_says_in_a_sentence_which_weights_are_missing(page, tmp_path, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.chdir(tmp_path)
    run = AppTest.from_file(str(ROOT / f"scripts/demo/{page}.py"), default_timeout=60).run()
    assert not run.exception and "checkpoints/" in run.error[0].value


def test_the_video_page_waits_for_a_picture(tmp_path, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.chdir(tmp_path)
    run = AppTest.from_file(str(ROOT / "scripts/demo/video_sampling.py"), default_timeout=60).run()
    assert not run.exception and run.sidebar.number_input[0].value == 14
    run.sidebar.selectbox[0].set_value("sv3d_p").run()
    assert run.sidebar.number_input[0].value == 21 and run.sidebar.number_input[-1].value == 10.0


class FakeGradio:
    """Records the page, and calls it once instead of showing it."""

    class Error(Exception):
        pass

    def __init__(self, *given):
        self.given, self.said = given, None
        for part in ("Image", "Number", "Slider", "Video", "Checkbox"):
            setattr(self, part, lambda *a, **k: (a, k))

    def Interface(self, work, inputs, outputs, title):
        assert len(inputs) == len(self.given)

        def launch(share):
            try:
                self.said = work(*self.given)
            except self.Error as error:
                self.said = str(error)

        return SimpleNamespace(launch=launch)


@pytest.mark.parametrize(
    ("page", "given"),
    [(gradio_app, ("absent.png", 23, 127, 6, 3)), (gradio_app_sv4d, ("absent.mp4", 23, 20, 8, 4, False))],
)
def test_gradio_pages_tell_a_users_errors_and_ask_for_gradio_where_it_is_missing(
    page, given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "content_filter", lambda: None)
    fake = FakeGradio(*given)
    monkeypatch.setitem(sys.modules, "gradio", fake)
    assert page.main([]) == 0 and fake.said == f"--input_path {given[0]}: there is no such file or folder"
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert page.main([]) == 2 and "python -m pip install gradio" in capsys.readouterr().err
