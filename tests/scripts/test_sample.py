"""scripts/sample.py, end to end with tiny models of every family; and train.py."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from sgm.models.notebook import default_parameters
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--steps", "2", "--device", "cpu", "--outdir", "out", "--n_samples", "2"]
PLAIN = {"use_spatial_transformer": False, "context_dim": None}


@pytest.fixture
def sample(script):
    return script("sample").main


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Write a configuration and fresh weights as a run's folder."""
    monkeypatch.chdir(tmp_path)

    def made(config, name="run"):
        folder = tmp_path / name
        folder.mkdir()
        OmegaConf.save(OmegaConf.create({"model": config}), folder / "config.yaml")
        model = instantiate_from_config(OmegaConf.create(config))
        network = getattr(model, "model", None)
        if network is not None:
            torch.nn.init.normal_(network.diffusion_model.out[2].weight, std=0.1)
        torch.save({"state_dict": model.state_dict()}, folder / "model.ckpt")
        return str(folder)

    return made


@pytest.fixture
def tokens():
    """Configurations of token transformers over 4×4 codes: of classes and of nothing."""
    ddconfig = {
        "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    stage = {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 8,
            "n_embed": 16,
            "ddconfig": ddconfig,
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    gpt = {"vocab_size": 16, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    transformer = {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt}
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}}

    def config(cond, key):
        params = {
            "transformer_config": transformer,
            "first_stage_config": stage,
            "cond_stage_config": cond,
            "cond_stage_key": key,
        }
        return {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}

    return {
        "class": config(labels, "class_label"),
        "nothing": config("__is_unconditional__", "image"),
        "depth": config({**stage}, "depth"),
    }  # fmt: skip


def shown(folder="out"):
    return [Image.open(p) for p in sorted(Path(folder, "samples").iterdir())]


def test_a_text_model_draws_its_prompt_and_each_picture_has_its_own_seed(sample, run_folder, picture):
    argv = ["--ckpt", str(run_folder("text")), "--prompt", "red heart", *BASE]
    assert sample([*argv, "--n_iter", "2", "--seed", "5"]) == 0
    made = shown()
    assert [(p.text["prompt"], p.text["seed"]) for p in made] == [("red heart", str(5 + i)) for i in range(4)]
    assert {p.size for p in made} == {(16, 16)} and Path("out/grid-0000.png").is_file()
    assert sample([*argv, "--seed", "8", "--outdir", "again"]) == 0
    assert shown("again")[0].tobytes() == made[3].tobytes()  # whatever is drawn beside it


def test_a_class_model_draws_its_classes_in_turn(sample, save, tiny):
    encoder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 6, "key": "class_label"}}  # fmt: skip
    folder = save(tiny.latent_diffusion(cond_stage_config=encoder, cond_stage_key="class_label"))
    assert sample(["--ckpt", folder, "--class", "1", "--class", "4", "--n_iter", "2", *BASE]) == 0
    assert [p.text["prompt"] for p in shown()] == ["class 1", "class 4"] * 2


def test_a_map_of_labels_becomes_the_condition_label_by_label(sample, save, tiny):
    rescaler = {
        "target": "ldm.modules.encoders.modules.SpatialRescaler",
        "params": {"n_stages": 0, "in_channels": 4, "out_channels": 3},
    }
    folder = save(
        tiny.latent_diffusion(
            cond_stage_config=rescaler, cond_stage_key="segmentation", conditioning_key=None, concat_mode=True,
            unet={"in_channels": 6, **PLAIN},
        )
    )  # fmt: skip
    labels = Image.new("L", (4, 4), 1)
    labels.paste(3, (0, 0, 2, 4))
    labels.save("labels.png")
    Image.new("L", (4, 4), 1).save("flat.png")
    assert sample(["--ckpt", folder, "--cond", "labels.png", *BASE]) == 0
    assert (
        sample(["--ckpt", folder, "--cond", "flat.png", "--outdir", "flat", *BASE[:4], "--n_samples", "2"])
        == 0
    )
    assert shown()[0].size == (8, 8) and shown()[0].tobytes() != shown("flat")[0].tobytes()


def test_an_unconditional_model_needs_nothing_and_overrides_reach_it(sample, save, tiny):
    config = tiny.latent_diffusion(
        cond_stage_config="__is_unconditional__", conditioning_key=None, unet=PLAIN
    )
    assert sample(["--ckpt", save(config), *BASE, "model.params.image_size=4"]) == 0
    assert [p.size for p in shown()] == [(4, 4)] * 2


@pytest.mark.parametrize(("kind", "flags"), [("class", ["--class", "3"]), ("nothing", [])])
def test_token_transformers_draw_code_by_code(sample, save, tokens, kind, flags):
    argv = ["--ckpt", save(tokens[kind]), *flags, *BASE[2:]]
    assert sample(argv) == 0 and sample([*argv, "--outdir", "again"]) == 0
    assert [p.size for p in shown()] == [(16, 16)] * 2
    assert shown()[0].text["sampler"] == "tokens"
    assert [p.tobytes() for p in shown()] == [p.tobytes() for p in shown("again")]


def test_an_engine_of_sgm_draws_prompts_and_classes_with_any_sampler(sample, save):
    engine = {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": default_parameters(model_channels=32, num_heads=4),
    }
    # pictures of four channels are none: three
    engine["params"]["network_config"]["params"].update(in_channels=3, out_channels=3, channel_mult=[1, 2])
    folder = save(engine)
    argv = ["--ckpt", folder, "--prompt", "a cat", "--H", "8", "--W", "16", *BASE]
    assert sample(argv) == 0
    assert (
        sample([*argv, "--sampler", "heun", "--scale", "1", "--negative_prompt", "grey", "--outdir", "heun"])
        == 0
    )
    made = shown()
    assert [p.size for p in made] == [(16, 8)] * 2 and made[0].text["prompt"] == "a cat"
    assert made[0].tobytes() != shown("heun")[0].tobytes()
    assert sample(["--ckpt", folder, "--prompt", "a cat", *BASE]) == 2  # which size?


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        ("text", [], "this model reads a text: give it with --prompt"),
        ("text", ["--prompt", "a", "--sampler", "dimm"], "there is no sampler 'dimm'. Did you mean 'ddim'"),
        ("text", ["--prompt", "a", "--n_samples", "0"], "both must be at least 1"),
        ("text", ["--prompt", "a", "--H", "7"], "multiples of 2"),
        ("restore", [], "reads 'LR_image'; see scripts/ for inpaint.py, depth2img.py and superresolution.py"),
        ("text", ["--ckpt", "nowhere"], "there is no folder or file 'nowhere'"),
    ],
)
def test_bad_input_is_one_clear_sentence(sample, run_folder, picture, capsys, kind, argv, message):
    assert sample(["--ckpt", str(run_folder(kind)), *BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        ("class", [], "name one or more with --class NUMBER"),
        (
            "class",
            ["--class", "3", "--eta", "1"],
            "--eta is for diffusion models; this is a token transformer",
        ),
        ("class", ["--class", "3", "--negative_prompt", "a"], "--negative_prompt is for diffusion models"),
        ("depth", [], "this transformer reads 'depth'"),
    ],
)
def test_what_a_token_transformer_lacks_is_one_clear_sentence(sample, save, tokens, capsys, kind, argv, message):  # fmt: skip
    assert sample(["--ckpt", save(tokens[kind]), *BASE[2:], *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_first_stage_draws_nothing_of_its_own(sample, save, tiny, capsys):
    assert sample(["--ckpt", save({**tiny.kl}), *BASE]) == 2
    assert "this is a AutoencoderKL: it encodes pictures" in capsys.readouterr().err


def test_train_is_main_under_another_name():
    train, main = (importlib.import_module(name) for name in ("train", "main"))
    assert train.main is main.main


SCRIPTS = sorted(
    str(p.relative_to(ROOT))
    for pattern in ("*.py", "optimize/*.py", "gradio/*.py", "streamlit/*.py")
    for p in (ROOT / "scripts").glob(pattern)
    if p.stem not in ("__init__", "flags", "pages")
)


@pytest.mark.parametrize("name", [*SCRIPTS, "main.py", "train.py"])
def test_every_script_explains_itself(name, monkeypatch, capsys):
    """The help begins with the usage and names the script's own file."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert shown.startswith("usage:") and len(shown) > 300
    assert Path(name).name in shown or name == "train.py"
