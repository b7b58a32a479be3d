"""scripts/sample_diffusion.py, end to end with a tiny unconditional model."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("scripts.sample_diffusion")


def save_model(folder, config):
    folder.mkdir()
    OmegaConf.save(OmegaConf.create({"model": config}), folder / "config.yaml")
    model = instantiate_from_config(OmegaConf.create(config))
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    torch.save({"state_dict": model.state_dict(), "global_step": 77}, folder / "model.ckpt")
    return folder


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_model(
        tmp_path / "tiny",
        tiny.latent_diffusion(
            cond_stage_config="__is_unconditional__", conditioning_key=None, timesteps=12,
            unet={"use_spatial_transformer": False, "context_dim": None},
        ),
    )  # fmt: skip


BASE = ["--device", "cpu", "-n", "4", "--batch_size", "2", "-c", "3", "-l", "out"]


def pictures():
    return sorted(Path("out").rglob("*.png"))


def test_pictures_an_array_of_them_and_the_settings_are_written(script, folder):
    assert script.main(["-r", str(folder), "--seed", "3", *BASE]) == 0
    files = [
        re.sub(r"\d{4}(-\d\d){5}", "TIME", str(p)) for p in sorted(Path("out").rglob("*")) if p.is_file()
    ]
    home = "out/tiny/samples/00000077/TIME"
    assert files == [
        *(f"{home}/img/sample_{i:06}.png" for i in range(4)), f"{home}/numpy/4x8x8x3-samples.npz", f"{home}/sampling_config.yaml",
    ]  # fmt: skip
    [archive] = Path("out").rglob("*.npz")
    with np.load(archive) as stored:
        assert stored["arr_0"].dtype == np.uint8
        assert all(np.array_equal(a, Image.open(p)) for a, p in zip(stored["arr_0"], pictures(), strict=True))
    said = Image.open(pictures()[1]).text
    assert said["seed"] == "3" and said["index"] == "1" and said["sampler"] == "ddim" and said["eta"] == "1.0"
    assert re.fullmatch(r"[0-9a-f]{10}", said["checkpoint_sha256"])
    assert OmegaConf.load(next(Path("out").rglob("*.yaml"))).custom_steps == 3


def test_the_same_seed_gives_the_same_pictures_and_no_call_overwrites_another(script, folder):
    for seed in ("1", "1", "2"):
        assert script.main(["-r", str(folder / "model.ckpt"), "--seed", seed, *BASE, "-v"]) == 0
    assert len(pictures()) == 12
    firsts = [Image.open(p).tobytes() for p in pictures() if p.name == "sample_000000.png"]
    assert len(set(firsts)) == 2
    assert Image.open(pictures()[0]).text["sampler"] == "ancestral"


def test_only_whole_batches_are_drawn_but_never_none(script, folder, caplog):
    with caplog.at_level("WARNING"):
        assert script.main(["-r", str(folder), *BASE, "-n", "3"]) == 0
    assert len(pictures()) == 2 and "2 pictures instead of 3" in caplog.text
    assert script.main(["-r", str(folder), *BASE, "-n", "1"]) == 0
    assert len(pictures()) == 3


def test_values_of_the_configuration_can_be_overridden(script, folder):
    size = "model.params.unet_config.params.image_size=16"
    assert script.main(["-r", str(folder), *BASE, "-n", "1", size]) == 0
    assert Image.open(pictures()[0]).size == (16, 16)


def test_when_stopped_the_finished_pictures_are_kept_and_packed(script, folder, monkeypatch):
    made = []

    def draw(opt, *rest, **options):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return torch.zeros(2, 3, 8, 8), None

    monkeypatch.setattr(script.inference.DDIMSampler, "sample", lambda self, *a, **k: draw(*a, **k))
    assert script.main(["-r", str(folder), *BASE]) == 130
    assert len(pictures()) == 2 and len(list(Path("out").rglob("2x8x8x3-samples.npz"))) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a model: -r"),
        (["-r", "nowhere"], "--resume nowhere"),
        (["-r", "{folder}", "-n", "0"], "must be at least 1"),
        (["-r", "{folder}", "-c", "50"], "choose from 1 to 12"),
        (["-r", "{folder}", "--device", "tpu"], "this machine has"),
    ],
)
def test_bad_input_is_one_clear_sentence(script, folder, capsys, argv, message):
    assert script.main([*BASE, *(a.format(folder=folder) for a in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_conditional_model_is_refused(script, tmp_path, tiny, capsys):
    folder = save_model(tmp_path / "text", tiny.latent_diffusion(cond_stage_key="class_label"))
    assert script.main(["-r", str(folder), *BASE]) == 2
    assert "cond_stage_key='class_label'" in capsys.readouterr().err
