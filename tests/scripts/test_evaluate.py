"""scripts/evaluate_samplers.py and scripts/evaluate_conditioned.py, on tiny models from their log folders."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.checkpoint import save_checkpoint
from taming.util import instantiate_from_config

pytestmark = pytest.mark.usefixtures("emoji_opened_once")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
samplers = importlib.import_module("scripts.evaluate_samplers")
conditioned = importlib.import_module("scripts.evaluate_conditioned")

EMOJI = {
    "target": "taming.data.emoji.EmojiImages",
    "params": {"size": 16, "split": "validation", "categories": ["Smileys & Emotion"]},
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_of(tmp_path):
    """Makes the log folder of a (fresh) model: configuration → path."""

    def make(model, data=EMOJI, section="validation"):
        config = OmegaConf.create({"model": model, "data": {"params": {section: data}}})
        folder = tmp_path / "logs" / "tiny"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "configs").mkdir()
        OmegaConf.save(config, folder / "configs" / "tiny-project.yaml")
        built = instantiate_from_config(config.model)
        torch.nn.init.normal_(built.model.diffusion_model.out[2].weight, std=0.1)
        save_checkpoint(
            {"state_dict": built.state_dict(), "global_step": 7}, folder / "checkpoints" / "last.ckpt"
        )
        return str(folder)

    return make


def over_kl(tiny, **params):
    return tiny.latent_diffusion(**{"first_stage_config": tiny.kl, "parameterization": "v", **params})


@pytest.fixture
def text_run(run_of, tiny):
    model = over_kl(tiny, cond_stage_config=tiny.text, cond_stage_key="caption", cond_stage_trainable=True)
    return run_of(model, section="train")


# ----------------------------------------------------------------------------------------------------------- samplers


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    a = torch.randn(200_000, 2) * torch.tensor([1.0, 2.0])
    b = torch.randn(200_000, 2) * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.5])
    # for diagonal covariances: |difference of means|² + Σ (difference of standard deviations)²
    assert samplers.frechet(a, b) == pytest.approx(1.5**2 + 2.0**2, rel=0.02)
    assert samplers.frechet(a, a) == pytest.approx(0, abs=1e-6)
    turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])
    assert samplers.frechet(a @ turn, b @ turn) == pytest.approx(samplers.frechet(a, b), rel=1e-4)
    with pytest.raises(ValueError, match="1 and 200000 samples have no covariance"):
        samplers.frechet(a[:1], b)


def test_texture_sees_a_blur_that_layout_does_not():
    z = torch.randn(64, 4, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(z, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert samplers.layout(z).shape == (64, 64) and samplers.texture(z).shape == (64 * 14 * 14, 36)
    assert samplers.frechet(samplers.layout(z), samplers.layout(blurred)) == pytest.approx(0, abs=1e-4)
    # the variance falls from 1 to 1/16, and patches lie in 1, 2 or 4 squares of equal values
    assert samplers.frechet(samplers.texture(z), samplers.texture(blurred)) > 5


def test_distances_are_those_of_pairs():
    a, b = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 3 * torch.ones(1, 2, 2)])
    assert samplers.rms(a, b) == pytest.approx(2.0)


def test_samplers_are_compared_from_the_same_noise_and_calls_are_counted(text_run, capsys):
    flags = f"-r {text_run} --device cpu -n 3 --batch_size 2 --outfile strip.png --columns 2".split()
    flags += ["--samplers", "ddim", "plms", "dpm", "--steps", "2", "6", "--reference_steps", "12"]
    assert samplers.main(flags) == 0
    out = capsys.readouterr().out
    assert "step 7, 3 captions, guidance 3, uniform steps, seed 42" in out
    assert "reference (dpm, 12 steps): Fréchet distance layout" in out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("|")]
    assert [t[0].split(" | ")[0] for t in tables] == [
        "| network calls", "| distance to the reference", "| Fréchet distance, layout", "| Fréchet distance, texture",
    ]  # fmt: skip
    # as published, 6 uniform steps of 1000 are 7, and PLMS looks ahead once
    assert tables[0][2:] == ["| ddim | 2 | 7 |", "| plms | 3 | 8 |", "| dpm | 2 | 6 |"]
    near = [float(cell) for cell in tables[1][-1].strip("| ").split(" | ")[1:]]
    assert 0 < near[1] < near[0]  # dpm: six steps end nearer to its twelve than two
    # 1 + 2 numbers of steps × 2 captions columns, 1 + 3 rows, of 16 pixels and a frame of 2
    assert Image.open("strip.png").size == (5 * 18 + 2, 4 * 18 + 2)


def test_the_same_seed_gives_the_same_report(text_run, capsys):
    flags = f"-r {text_run} --device cpu -n 2 --samplers unipc --steps 2 --reference_steps 3".split()
    assert samplers.main(flags) == samplers.main(flags) == 0
    first, second = (part.split("seed 42")[1] for part in capsys.readouterr().out.split("step 7")[1:])
    assert first.strip() == second.strip() and "unipc" in first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "validation"], "no section 'validation'; choose it with --split"),
        (["--steps", "0"], "0 steps"),
        (["--samplers", "flow", "--steps", "2", "--reference_steps", "2"], "FlowSampler needs a model with parameterization 'flow'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(text_run, capsys, flags, message):
    assert samplers.main(["-r", text_run, "--device", "cpu", "-n", "2", *flags]) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- conditioned


def test_a_class_model_gives_a_row_for_each_class(run_of, tiny, capsys):
    encoder = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 3, "key": "class_label", "ucg_rate": 1.0},
    }
    model = over_kl(tiny, cond_stage_config=encoder, cond_stage_key="class_label")
    data = {**EMOJI, "params": {**EMOJI["params"], "classes": {"heart": ["heart"], "cat": ["cat face"]}}}
    folder = run_of(model, data)
    assert conditioned.main(["-r", folder, "--device", "cpu", "--steps", "2", "--columns", "3"]) == 0
    assert "step 7, ddim, 2 steps: grid.png" in capsys.readouterr().out
    assert Image.open("grid.png").size == (4 * 18 + 2, 2 * 18 + 2)


def test_labels_are_never_dropped_when_drawing(run_of, tiny):
    encoder = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 3, "key": "class_label", "ucg_rate": 1.0},
    }
    model = instantiate_from_config(
        OmegaConf.create(over_kl(tiny, cond_stage_config=encoder, cond_stage_key="class_label"))
    ).eval()
    seen = []
    model.get_learned_conditioning = lambda c: seen.append(c["class_label"]) or model.cond_stage_model(c)
    opt = conditioned.get_parser().parse_args(["-r", "-", "--columns", "2", "--steps", "1", "--scale", "1"])
    with torch.no_grad():
        picture = conditioned.draw_classes(model, object(), opt)
    assert [labels.tolist() for labels in seen] == [[0, 0], [1, 1]]  # the third is "no class"
    assert model.cond_stage_model.ucg_rate == 0 and len(picture.cells) == 6


WITHOUT_TEXT = {"use_spatial_transformer": False, "context_dim": None}


def test_inpainting_shows_masked_result_and_truth_and_measures_the_hidden_part(run_of, tiny, capsys):
    data = {"target": "ldm.data.conditions.MaskedImages", "params": {"dataset": EMOJI, "seed": 0}}
    model = over_kl(
        tiny, unet=WITHOUT_TEXT | {"in_channels": 7}, conditioning_key="concat", cond_stage_config="__is_unconditional__",
        force_null_conditioning=True, finetune_keys=None,
    )  # fmt: skip
    folder = run_of({**model, "target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"}, data)
    flags = f"-r {folder} --device cpu --steps 2 --columns 4 --rows 2 --outfile holes.png".split()
    assert conditioned.main(flags) == 0
    out = capsys.readouterr().out
    assert "PSNR of the hidden part" in out and "mean colour" in out and "nan" not in out
    assert Image.open("holes.png").size == (4 * 18 + 2, 6 * 18 + 2)


def test_the_hidden_part_alone_is_measured():
    truth, image = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    image[:, :, :2] = 0.2
    assert conditioned.hidden_psnr(truth, image, mask) == pytest.approx(10 * math.log10(4 / 0.04), rel=1e-5)
    with pytest.raises(ValueError, match="hide nothing"):
        conditioned.hidden_psnr(truth, image, torch.zeros_like(mask))


def test_enlarging_shows_four_kinds_of_pictures_and_their_figures(run_of, tiny, capsys):
    params = {"dataset": EMOJI, "enlarge": "nearest"}
    data = {"target": "ldm.data.conditions.SmallTwins", "params": params}
    model = over_kl(
        tiny, unet=WITHOUT_TEXT | {"in_channels": 6}, conditioning_key="concat", cond_stage_config="__is_first_stage__",
        cond_stage_key="LR_enlarged",
    )  # fmt: skip
    folder = run_of(model, data)
    flags = f"-r {folder} --device cpu --steps 2 --columns 3 --rows 1".split()
    assert conditioned.main(flags) == 0
    figures = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [f[:2] for f in figures] == [
        ["this", "model"], ["bicubic", figures[1][1]], ["repeated", "pixels,"], ["truth,", "through"],
    ]  # fmt: skip
    assert float(figures[1][1]) > float(figures[0][2])  # a fresh model is worse than bicubic
    assert Image.open("grid.png").size == (3 * 18 + 2, 4 * 18 + 2)


def test_a_text_model_is_sent_to_its_own_script(text_run, capsys):
    assert conditioned.main(["-r", text_run, "--device", "cpu"]) == 2
    assert "scripts/txt2img.py draws from texts" in capsys.readouterr().err
