"""scripts/superresolution.py, end to end with tiny models of both kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference, inference_conditioned
from scripts import pages

BASE = ["--steps", "3", "--device", "cpu", "--outdir", "out"]


@pytest.fixture
def superresolution(script):
    return script("superresolution").main


def test_the_upscaler_enlarges_under_a_prompt_and_says_how(superresolution, run_folder, picture):
    argv = ["--ckpt", str(run_folder("enlarge")), "--init-img", "init.png", "--prompt", "a cat", "--n_samples", "2", *BASE]  # fmt: skip
    assert superresolution(argv) == 0
    assert sorted(str(p) for p in Path("out").rglob("*.png")) == [
        "out/grid-0000.png", "out/samples/00000.png", "out/samples/00001.png",
    ]  # fmt: skip
    large = Image.open("out/samples/00001.png")
    assert large.size == (36, 22)  # this first stage has factor 2
    said = {k: large.text[k] for k in ("prompt", "noise_level", "scale", "eta", "init_img", "steps")}
    assert said == {
        "prompt": "a cat", "noise_level": "20", "scale": "10.0", "eta": "0.0", "init_img": "init.png", "steps": "3",
    }  # fmt: skip


def test_the_model_without_a_prompt_takes_a_folder_and_four_times_the_side(
    superresolution, run_folder, picture
):
    Path("small").mkdir()
    for name, size in (("a.png", (16, 16)), ("b.png", (48, 20))):
        picture.resize(size).save(Path("small", name))
    assert superresolution(["--ckpt", str(run_folder("restore")), "--init-img", "small", *BASE]) == 0
    made = [Image.open(f"out/samples/{i:05}.png") for i in range(2)]
    assert [(p.size, p.text["init_img"], p.text["eta"]) for p in made] == [
        ((64, 64), "a.png", "1.0"), ((192, 64), "b.png", "1.0"),  # 20 becomes 16, the multiple below
    ]  # fmt: skip
    assert not list(Path("out").glob("grid*"))  # pictures differ in size


def test_noise_of_a_seed_is_numpys_and_decides_the_picture(build, picture):
    shape = (2, 3, 4, 5)
    noise = pages.start_of(7)(shape)
    assert torch.equal(noise, torch.from_numpy(np.random.RandomState(7).standard_normal(shape)).float())
    model = build("enlarge")
    _, sampler = inference.make_sampler(model)

    def draw(seed, level=0):
        return inference_conditioned.enlarge(
            model, sampler, picture, "a", steps=2, noise_level=level, start=pages.start_of(seed), verbose=False
        )  # fmt: skip

    # level 0 still noises a little, so torch's generator is set for both
    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(0)
    assert torch.equal(first, draw(1))
    torch.manual_seed(0)
    assert not torch.allclose(first, draw(2), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        ("enlarge", ["--noise_level", "61"], "noise level 61 must lie between 0 (none) and 60"),
        ("enlarge", ["--init-img", "absent.png"], "--init-img absent.png: there is no such file"),
        ("enlarge", ["--init-img", "empty"], "--init-img empty holds no pictures"),
        ("enlarge", ["--init-img", ""], "name the small picture"),
        ("enlarge", ["--ckpt", ""], "name the model"),
        ("restore", ["--prompt", "a"], "this model reads no prompt"),
        ("restore", ["--noise_level", "20"], "--noise_level is for Stable Diffusion's upscaler"),
        ("restore", ["--n_samples", "2"], "--n_samples is for Stable Diffusion's upscaler"),
        ("restore", ["--init-img", "absent.png"], "--init-img absent.png: there is no such file"),
        ("text", [], "a model that enlarges pictures is a LatentUpscaleDiffusion"),
    ],
)
def test_bad_input_is_one_clear_sentence(superresolution, run_folder, picture, capsys, kind, argv, message):
    Path("empty").mkdir()
    assert superresolution(["--ckpt", str(run_folder(kind)), "--init-img", "init.png", *BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_when_stopped_the_finished_pictures_are_kept(superresolution, run_folder, picture, monkeypatch):
    enlarge, calls = inference_conditioned.enlarge, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return enlarge(*args, **kwargs)

    monkeypatch.setattr(inference_conditioned, "enlarge", once)
    argv = ["--ckpt", str(run_folder("enlarge")), "--init-img", "init.png", "--n_iter", "3", *BASE]
    assert superresolution(argv) == 130
    assert len(list(Path("out/samples").iterdir())) == 1 and Path("out/grid-0000.png").exists()
