"""A checkpoint from a stranger whose pickle wants to run a command: every script that reads checkpoints refuses it, and says so."""

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
CKPT = "evil/model.ckpt"
RUN = ["--ckpt", CKPT, "--device", "cpu"]
SEEN = ["--init-img", "photo.png", "--prompt", "red heart"]
TABLE = ["-r", "evil", "--device", "cpu"]
VIDEO = ["--input_path", "photo.png", "--ckpt", CKPT, "--device", "cpu", "--config"]
# what to call, and with which arguments; {root} is the checkout
CALLS = {
    "txt2img": [*RUN, "--prompt", "red heart"],
    "img2img": [*RUN, *SEEN],
    "depth2img": [*RUN, *SEEN],
    "inpaint": [*RUN, "--indir", "pairs", "--outdir", "out"],
    "superresolution": [*RUN, "--init-img", "photo.png"],
    "knn2img": [*RUN, "--prompt", "red heart"],
    "sample": [*RUN],
    "sample_diffusion": [*TABLE, "-n", "1", "-l", "out"],
    "sample_fast": [*TABLE, "-n", "1"],
    "make_samples": ["-r", "evil", "--outdir", "out"],
    "evaluate_samplers": TABLE,
    "evaluate_conditioned": TABLE,
    "evaluate_tokens": TABLE,
    "animate": TABLE,
    "convert": [CKPT, "out.safetensors"],
    "extract_submodel": [CKPT, "out.ckpt"],
    "optimize.optimize_sd": [CKPT, "out", "--device", "cpu"],
    "sampling.simple_video_sample": [*VIDEO, "{root}/tests/scripts/video/svd.yaml"],
}  # fmt: skip


class Runs:
    """Pickled as a call."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def evil(tiny, tmp_path, monkeypatch):
    """The working directory: a published-looking folder whose checkpoint runs a command, and pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "pairs").mkdir()
    OmegaConf.save({"model": tiny.latent_diffusion(first_stage_config=tiny.kl)}, "evil/config.yaml")
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": Runs()}, CKPT)
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("photo.png", "pairs/one.png", "pairs/one_mask.png"):
        Image.fromarray(pixels).save(name)
    return tmp_path


def test_the_file_is_what_it_says(evil):
    """Whoever unpickles it runs its command."""
    torch.load(CKPT, weights_only=False)
    assert (evil / "executed").exists()


@pytest.mark.parametrize("name", CALLS)
def test_a_script_refuses_a_pickle_that_runs_code(script, evil, name, capsys, caplog):
    argv = [str(a).format(root=ROOT) for a in CALLS[name]]
    assert script(name).main(argv) == 2
    said = capsys.readouterr().err + caplog.text
    assert "is refused: its pickle wants to call" in said and "system" in said
    assert not (evil / "executed").exists()


@pytest.mark.parametrize("task", ["depth2img", "inpainting", "superresolution"])
def test_a_demo_refuses_a_pickle_that_runs_code(script, evil, task, capsys):
    page = script("pages")
    assert page.main(task, "gradio", None, ["evil/config.yaml", CKPT, "--device", "cpu"]) == 2
    assert "is refused: its pickle wants to call" in capsys.readouterr().err
    assert not (evil / "executed").exists()


def test_the_page_of_variations_refuses_it_too(script, evil, monkeypatch):
    state = type("State", (dict,), {"__setattr__": dict.__setitem__})()
    monkeypatch.setitem(sys.modules, "streamlit", types.SimpleNamespace(session_state=state))
    page = script("streamlit.stableunclip")
    monkeypatch.setitem(page.VERSIONS, "ours", ("evil/config.yaml", CKPT))
    with pytest.raises(CheckpointError, match="is refused: its pickle wants to call"):
        page.load("ours", "cpu")
    assert not (evil / "executed").exists()


def test_a_video_page_refuses_it_too(script, evil, monkeypatch):
    backend = script("demo.backend")
    name = next(iter(backend.TURBO))
    _, _, *rest = backend.TURBO[name]
    monkeypatch.setitem(backend.TURBO, name, (str(evil / "evil/config.yaml"), CKPT, *rest))
    monkeypatch.setattr(backend, "find_config", lambda _, path: path)
    with pytest.raises(CheckpointError, match="is refused: its pickle wants to call"):
        backend.load_turbo.__wrapped__(name, "cpu")
    assert not (evil / "executed").exists()


class Pictures(list):
    """A data set of n grey pictures."""

    def __init__(self, n):
        super().__init__({"image": torch.zeros(16, 16, 3)} for _ in range(n))


def test_a_training_that_is_to_go_on_refuses_it_too(evil, tiny, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    import main

    monkeypatch.setitem(sys.modules, "grey", types.SimpleNamespace(Pictures=Pictures))
    run = evil / "logs" / "run"
    for part in ("checkpoints", "configs"):
        (run / part).mkdir(parents=True)
    (evil / CKPT).rename(run / "checkpoints" / "last.ckpt")
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": {"target": "grey.Pictures", "params": {"n": 4}},
        },
    }
    OmegaConf.save(
        {"model": {"base_learning_rate": 1e-4, **tiny.kl}, "data": data}, run / "configs" / "x-project.yaml"
    )
    argv = ["-r", str(run), "-t", "--no-test", "--accelerator", "cpu", "--max_epochs", "1"]
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert "is refused: its pickle wants to call" in error and "Traceback" not in error
    assert not (evil / "executed").exists()
