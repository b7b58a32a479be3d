"""The model that comes with the repository: what it draws, and that everything takes it by default."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference
from ldm.models import LatentDiffusion
from scripts import img2img, inpaint, txt2img
from taming.data.emoji import load_emoji

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "emoji"


@pytest.fixture(scope="module")
def drawn():
    """Two red hearts (n, 64, 64, 3) in [0, 1] by the notebook's call, as any user would make them."""
    model = LatentDiffusion.from_pretrained(device="cpu")
    pictures = model.generate("red heart", num_steps=8, sampler="unipc", num_images=2, generator=0, progress=False)  # fmt: skip
    return np.stack([np.asarray(picture) for picture in pictures]) / 255


def test_a_red_heart_is_red_in_the_middle_and_white_in_the_corners(drawn):
    red, green, blue = drawn[:, 24:40, 24:40].mean(axis=(1, 2)).T
    assert drawn.shape == (2, 64, 64, 3)
    assert (red > 0.7).all() and (green < 0.35).all() and (blue < 0.4).all()
    assert (drawn[:, -8:, :8].mean(axis=(1, 2, 3)) > 0.95).all()


def test_nothing_of_it_is_missing_or_left_over(caplog):
    with caplog.at_level("INFO"):
        inference.load_model(inference.SHIPPED, None, torch.device("cpu"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert "missing" not in caplog.text and "left over" not in caplog.text


def test_it_is_small_half_precision_and_no_file_is_above_16_mib():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert max(file.stat().st_size for file in files) <= 16 * 2**20
    for weights in FOLDER.rglob("*.safetensors"):
        header = weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
        kinds = {entry["dtype"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        assert kinds <= {"F16", "F32", "I64"} and "F16" in kinds


def test_the_command_line_needs_nothing_but_a_prompt_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--prompt", "red heart", "--steps", "4", "--n_samples", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "outputs/txt2img-samples/samples/00000.png")
    assert (
        picture.size == (64, 64)
        and picture.text["prompt"] == "red heart"
        and picture.text["sampler"] == "unipc"
    )


def test_the_token_transformer_draws_red_hearts_too(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    argv = ["--ckpt", "models/emoji/tokens", "--prompt", "red heart", "--n_samples", "1"]
    assert txt2img.main([*argv, "--device", "cpu", "--outdir", "out", "--skip_grid"]) == 0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    heart = np.asarray(Image.open("out/samples/00000.png")) / 255
    red, green, blue = heart[24:40, 24:40].mean(axis=(0, 1))
    assert Image.open("out/samples/00000.png").text["scale"] == "1.0"
    assert red > 0.7 and green < 0.35 and blue < 0.4 and heart[-8:, :8].mean() > 0.95


def test_every_way_to_load_it_brings_the_guidance_that_suits_it():
    loaded, *_ = inference.load_model(inference.SHIPPED, None, torch.device("cpu"))
    assert loaded.text_guidance == LatentDiffusion.from_pretrained(device="cpu").text_guidance == 2.0
    assert LatentDiffusion.text_guidance == 7.5


def test_a_sampler_that_is_named_is_taken_with_its_own_default_of_steps():
    opt = txt2img.get_parser().parse_args(["--prompt", "x", "--plms"])
    txt2img.flags.fill_defaults(opt)
    assert opt.ckpt == inference.SHIPPED and opt.sampler is None and opt.plms and opt.scale == 2.0


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """A blue disc on white, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 26**2
    Image.fromarray(np.where(disc[..., None], (40, 80, 230), (255, 255, 255)).astype("uint8")).save(
        "disc.png"
    )
    return np.asarray(Image.open("disc.png")) / 255


def redrawn(strength):
    """What "green octopus" makes of the purple one, (64, 64, 3) in [0, 1]."""
    argv = ["--init-img", "octopus.png", "--prompt", "green octopus", "--strength", str(strength), "--n_samples", "1", "--steps", "20"]  # fmt: skip
    assert img2img.main([*argv, "--device", "cpu", "--outdir", f"out{strength}", "--skip_grid"]) == 0
    return np.asarray(Image.open(f"out{strength}/samples/00000.png")) / 255


def inked(pixels):
    """Where a picture on white is not white."""
    return pixels.min(axis=-1) < 0.7


def greenness(pixels):
    """How far green is above blue where there is something, on average."""
    return (pixels[..., 1] - pixels[..., 2])[inked(pixels)].mean()


def test_img2img_keeps_the_layout_at_low_strength_and_follows_the_prompt_at_high(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    octopus = next(e.pixels for e in load_emoji() if "octopus" in e.names)
    Image.fromarray(octopus).save("octopus.png")
    truth, low, high = octopus / 255, redrawn(0.4), redrawn(0.8)
    shared = (inked(low) & inked(truth)).sum() / (inked(low) | inked(truth)).sum()
    assert shared > 0.85
    assert greenness(truth) < -0.2 and greenness(low) > greenness(truth)
    assert greenness(high) > 0.05


def test_inpainting_draws_only_what_is_hidden(picture, tmp_path):
    (tmp_path / "in").mkdir()
    Path("disc.png").rename("in/disc.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("in/disc_mask.png")
    argv = [
        "--indir",
        "in",
        "--outdir",
        "filled",
        "--prompt",
        "blue circle",
        "--steps",
        "10",
        "--device",
        "cpu",
    ]
    assert inpaint.main(argv) == 0
    filled = np.asarray(Image.open("filled/disc.png")) / 255
    assert abs(filled[:, :32] - picture[:, :32]).max() <= 1 / 255
    assert filled[24:40, 34:44, 2].mean() > filled[24:40, 34:44, 0].mean() + 0.2, "the blue goes on"
