"""scripts/img2img.py, end to end with a tiny model."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference, inference_images
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def img2img():
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("scripts.img2img")


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    """A text-conditional model over a KL first stage of factor 2, whose network halves once more: sizes are multiples of 4."""
    monkeypatch.chdir(tmp_path)
    config = tiny.latent_diffusion(
        first_stage_config=tiny.kl,
        cond_stage_config=tiny.text,
        cond_stage_key="caption",
        cond_stage_trainable=True,
    )
    folder = tmp_path / "logs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"model": config}), folder / "config.yaml")
    model = instantiate_from_config(OmegaConf.create(config))
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    noise = np.random.RandomState(0).randint(0, 256, (18, 23, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "init.png")
    return folder


BASE = [
    "--init-img",
    "init.png",
    "--prompt",
    "red heart",
    "--steps",
    "4",
    "--device",
    "cpu",
    "--outdir",
    "out",
    "--ckpt",
    "logs",
]


def test_a_picture_is_redrawn_at_the_next_size_below_and_says_how(img2img, folder, capsys):
    assert img2img.main(["--ckpt", str(folder), "--seed", "7", "--strength", "0.5", *BASE]) == 0
    files = sorted(str(p) for p in Path("out").rglob("*.png"))
    assert files == ["out/grid-0000.png", "out/samples/00000.png", "out/samples/00001.png"]
    picture = Image.open("out/samples/00001.png")
    assert picture.size == (20, 16)
    said = {
        k: picture.text[k]
        for k in ("prompt", "seed", "sampler", "steps", "strength", "scale", "init_img", "index")
    }
    assert said == {
        "prompt": "red heart", "seed": "7", "sampler": "ddim", "steps": "4", "strength": "0.5", "scale": "3.0", "init_img": "init.png",
        "index": "1",
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{10}", picture.text["checkpoint_sha256"])
    assert "3 files in out" in capsys.readouterr().out


def test_the_seed_decides_and_nothing_is_overwritten(img2img, folder):
    for seed in ("1", "1", "2"):
        assert img2img.main(["--seed", seed, "--n_samples", "1", *BASE]) == 0
    first, again, other = (Image.open(f"out/samples/{i:05}.png").tobytes() for i in range(3))
    assert first == again != other
    assert len(list(Path("out").glob("grid-*.png"))) == 3


def test_prompts_from_a_file_in_uneven_batches_without_extras(img2img, folder):
    Path("prompts.txt").write_text("a\nb\nc\n")
    assert img2img.main(["--from-file", "prompts.txt", "--skip_grid", *BASE, "--scale", "1"]) == 0
    assert [Image.open(p).text["prompt"] for p in sorted(Path("out/samples").iterdir())] == ["a", "b", "c"]
    assert img2img.main([*BASE, "--outdir", "grid", "--skip_save", "--n_iter", "2", "--n_rows", "4"]) == 0
    assert [str(p) for p in Path("grid").rglob("*.png")] == ["grid/grid-0000.png"]
    assert Image.open("grid/grid-0000.png").size == (4 * 22 + 2, 20)


def test_when_stopped_the_finished_pictures_are_kept(img2img, folder, monkeypatch):
    redraw, calls = inference_images.redraw, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return redraw(*args, **kwargs)

    monkeypatch.setattr(inference_images, "redraw", once)
    assert img2img.main([*BASE, "--n_iter", "3"]) == 130
    assert len(list(Path("out/samples").iterdir())) == 2 and Path("out/grid-0000.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init-img", "absent.png"], "--init-img absent.png: there is no such file"),
        (["--init-img", "prompts.txt"], "cannot be read as an image"),
        (["--init-img", "small.png"], "3x9 pixels is too small: this model takes multiples of 4"),
        (["--strength", "1.5"], "strength 1.5 must lie between 0"),
        (["--plms"], "redrawn by DDIM"),
        (["--steps", "5000"], "choose from 1 to 1000"),
        (["--ckpt", "nowhere"], "there is no folder or file 'nowhere'"),
        (["--from-file", "absent.txt"], "there is no such file"),
    ],
)
def test_bad_input_is_one_clear_sentence(img2img, folder, capsys, argv, message):
    Path("prompts.txt").write_text("a\n")
    Image.new("RGB", (3, 9)).save("small.png")
    assert img2img.main([*BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_picture_and_latents_that_are_no_numbers_are_reported(img2img, folder, capsys, monkeypatch):
    assert img2img.main(BASE[2:]) == 2
    assert "--init-img FILE" in capsys.readouterr().err
    monkeypatch.setattr(inference.DDIMSampler, "decode", lambda self, x, *a, **k: x * float("nan"))
    assert img2img.main(BASE) == 2
    assert "infinite or undefined; try --precision full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/stable-diffusion/v1-inference.yaml", ("v1", 5.0)),
        ("configs/stable-diffusion/v2-inference-v.yaml", ("v2", 9.0)),
        (None, ("own", 3.0)),
    ],
)
def test_defaults_follow_the_configuration(img2img, config, expected):
    opt = img2img.get_parser().parse_args(["--ckpt", "x", *(["--config", config] if config else [])])
    assert (img2img.name_model(opt), opt.scale) == expected
    assert (opt.steps, opt.n_iter, opt.n_samples) == (50, 1, 2)


def test_redrawing_follows_the_equations_of_the_deterministic_sampler(gaussian_denoiser):
    """For Gaussian data the probability flow is known: half the way there and back lands where the noised latents belong."""
    model = gaussian_denoiser(timesteps=1000)
    model.decode_first_stage = lambda z: z
    z = model.mean + 0.1 * torch.randn(4, 3, 2, 2)
    seeds = [1, 2, 3, 4]
    made = inference_images.redraw(model, z, None, strength=0.5, steps=500, generator=seeds, verbose=False)
    sampler = inference.DDIMSampler(model)
    sampler.make_schedule(500, verbose=False)
    noise = torch.cat([torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in seeds])
    bar = torch.as_tensor(sampler.ddim_alphas[250], dtype=torch.float64)
    noised = bar.sqrt() * z + (1 - bar).sqrt() * noise
    expected = (model.exact(noised, bar, torch.tensor(1.0)) + 1) / 2
    assert torch.allclose(made, expected.clamp(0, 1), atol=0.02)
    kept = inference_images.redraw(model, z, None, strength=0.0, steps=5, verbose=False)
    assert torch.allclose(kept, ((z + 1) / 2).clamp(0, 1))
