"""scripts/txt2img.py, end to end with a tiny model."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.lora import inject
from scripts import flags
from taming.modules.ema import LitEma
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def txt2img():
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("scripts.txt2img")


@pytest.fixture
def run_folder(tmp_path, tiny):
    """The log folder of a (fresh) text-conditional model over a KL first stage of factor 2."""
    config = {
        "model": tiny.latent_diffusion(
            first_stage_config=tiny.kl,
            cond_stage_config=tiny.text,
            cond_stage_key="caption",
            cond_stage_trainable=True,
            use_ema=True,
        )
    }
    folder = tmp_path / "logs" / "2026_tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "configs").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "configs" / "2026-project.yaml")
    model = instantiate_from_config(OmegaConf.create(config).model)
    for parameter in model.model.parameters():
        if (
            parameter.ndim > 1 and not parameter.any()
        ):  # an untrained network ends in zeros, and so does its attention
            torch.nn.init.normal_(parameter, std=0.1)
    model.model_ema = LitEma(model.model)
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


BASE = ["--steps", "2", "--device", "cpu", "--outdir", "out", "--n_samples", "2", "--n_iter", "1"]


def test_a_log_folder_is_enough_and_pictures_say_how_they_were_made(txt2img, run_folder, capsys):
    assert txt2img.main(["--ckpt", str(run_folder), "--prompt", "red heart", "--seed", "7", *BASE]) == 0
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.png"))
    assert files == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    picture = Image.open("out/samples/00001.png")
    assert picture.size == (16, 16)  # the model's 8 latents × the first stage's factor 2
    assert (
        picture.text["prompt"] == "red heart"
        and picture.text["seed"] == "7"
        and picture.text["sampler"] == "ddim"
    )
    assert picture.text["index"] == "1" and re.fullmatch(r"[0-9a-f]{10}", picture.text["checkpoint_sha256"])
    assert Image.open("out/grid-0000.png").size == (2 * 18 + 2, 20)
    assert "3 files in out" in capsys.readouterr().out


def test_a_folder_of_runs_means_the_newest(txt2img, run_folder, caplog):
    with caplog.at_level("INFO"):
        assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE]) == 0
    assert "The newest run in logs is 2026_tiny" in caplog.text


def test_nothing_is_overwritten(txt2img, run_folder):
    for _ in range(2):
        assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE]) == 0
    Path("out/samples/00001.png").unlink()  # a gap must not lead back onto existing numbers
    assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE]) == 0
    assert sorted(p.name for p in Path("out/samples").iterdir()) == [f"{i:05}.png" for i in (0, 2, 3, 4, 5)]
    assert sorted(p.name for p in Path("out").glob("grid*")) == [f"grid-{i:04}.png" for i in range(3)]


@pytest.mark.parametrize(
    "sampler",
    [
        [],
        ["--plms"],
        ["--dpm"],
        ["--dpm_solver"],
        ["--sampler", "unipc"],
        ["--sampler", "deis"],
        ["--ddim_eta", "0.5"],
        ["--time_spacing", "trailing", "--guidance_rescale", "0.7"],
    ],
)
def test_the_same_seed_gives_the_same_pictures(txt2img, run_folder, sampler):
    pictures = []
    for out in ("a", "b", "c"):
        seed = "1" if out != "c" else "2"
        assert (
            txt2img.main(
                ["--ckpt", "logs", "--prompt", "x", *BASE, "--outdir", out, "--seed", seed, *sampler]
            )
            == 0
        )
        pictures.append(Image.open(f"{out}/samples/00000.png").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_each_picture_can_have_a_seed_of_its_own_whatever_the_batch(txt2img, run_folder):
    Path("prompts.txt").write_text("a\na\na\n")
    for out, size in (("ones", "1"), ("twos", "2")):
        flags = [
            "--ckpt",
            "logs",
            "--from-file",
            "prompts.txt",
            *BASE,
            "--ddim_eta",
            "1",
            "--seed",
            "7",
            "--seed_per_image",
        ]
        assert txt2img.main([*flags, "--n_samples", size, "--outdir", out]) == 0
    assert (
        txt2img.main(
            [
                "--ckpt",
                "logs",
                "--prompt",
                "a",
                *BASE,
                "--ddim_eta",
                "1",
                "--seed",
                "9",
                "--seed_per_image",
                "--outdir",
                "last",
            ]
        )
        == 0
    )
    ones, twos = (
        [Image.open(p).tobytes() for p in sorted(Path(out, "samples").iterdir())] for out in ("ones", "twos")
    )
    assert ones == twos and len(set(ones)) == 3
    # the third picture's seed, 7 + 2, alone gives it again
    third = Image.open("ones/samples/00002.png")
    assert third.text["seed"] == "9" and third.tobytes() == Image.open("last/samples/00000.png").tobytes()


@pytest.mark.parametrize("flags", [["--time_spacing", "trailing"], ["--guidance_rescale", "0.7"]])
def test_spacing_and_rescaled_guidance_change_the_picture_and_are_noted(txt2img, run_folder, flags):
    for out, more in (("plain", []), ("other", flags)):
        assert (
            txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE, "--steps", "3", "--outdir", out, *more])
            == 0
        )
    plain, other = (Image.open(f"{out}/samples/00000.png") for out in ("plain", "other"))
    assert plain.tobytes() != other.tobytes()
    assert plain.text[flags[0][2:]] != other.text[flags[0][2:]] == flags[1]


def test_weights_and_long_prompts_reach_encoders_that_read_them(txt2img, tmp_path, tiny):
    sizes = {
        "vocab_size": 600, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    clip = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": sizes}}
    config = tiny.latent_diffusion(cond_stage_config=clip, cond_stage_key="txt")
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "config.yaml")
    model = instantiate_from_config(OmegaConf.create(config))
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")

    def drawn(prompt, out, *flags):
        command = ["--ckpt", str(tmp_path), "--prompt", prompt, *BASE, "--outdir", out, *flags]
        assert txt2img.main(command) == 0
        return Image.open(f"{out}/samples/00000.png").tobytes()

    assert drawn("a (cat:1.9)", "a") != drawn("a (cat:1.9)", "b", "--prompt_weights")
    short, long = "cat " * 100, "cat " * 100 + "dog"
    assert drawn(short, "c", "--windows", "3") != drawn(long, "d", "--windows", "3")


def test_prompts_from_a_file_in_uneven_batches(txt2img, run_folder):
    Path("prompts.txt").write_text("a\n\nb\nc\n")
    assert (
        txt2img.main(
            ["--ckpt", "logs", "--from-file", "prompts.txt", *BASE, "--n_iter", "2", "--n_rows", "3"]
        )
        == 0
    )
    prompts = [Image.open(p).text["prompt"] for p in sorted(Path("out/samples").iterdir())]
    assert prompts == ["a", "b", "c", "a", "b", "c"]
    assert Image.open("out/grid-0000.png").size == (3 * 18 + 2, 2 * 18 + 2)


def test_other_sizes_and_skipped_outputs(txt2img, run_folder):
    assert (
        txt2img.main(
            [
                "--ckpt",
                "logs",
                "--prompt",
                "x",
                *BASE,
                "--W",
                "24",
                "--H",
                "32",
                "--skip_grid",
                "--fixed_code",
            ]
        )
        == 0
    )
    assert [p.name for p in Path("out").iterdir()] == ["samples"]
    assert Image.open("out/samples/00000.png").size == (24, 32)
    assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE, "--outdir", "grid", "--skip_save"]) == 0
    assert not list(Path("grid/samples").iterdir()) and Path("grid/grid-0000.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "nowhere"], "there is no folder or file 'nowhere'"),
        (["--H", "17"], "must be multiples of 2"),
        (["--W", "18"], "multiple of 2"),
        (["--from-file", "absent.txt"], "there is no such file"),
        (["--config", "absent.yaml", "--ckpt", "{run}"], "--config absent.yaml"),
        (["--device", "tpu"], "this machine has"),
        (["--windows", "2"], "no parameter 'windows'"),
        (["--seed_per_image", "--fixed_code"], "choose one"),
        (["--steps", "5000"], "choose from 1 to 1000"),
    ],
)
def test_bad_input_is_one_clear_sentence(txt2img, run_folder, capsys, argv, message):
    given = [a.format(run=run_folder) for a in argv]
    status = txt2img.main(["--ckpt", "logs", *BASE, "--prompt", "x", *given])
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


def test_a_checkpoint_without_a_configuration_asks_for_one(txt2img, run_folder, capsys, tmp_path):
    lone = tmp_path / "lone.ckpt"
    lone.write_bytes((run_folder / "checkpoints" / "last.ckpt").read_bytes())
    assert txt2img.main(["--ckpt", str(lone), "--prompt", "x", *BASE]) == 2
    assert "--config configs/" in capsys.readouterr().err
    config = next((run_folder / "configs").iterdir())
    assert txt2img.main(["--ckpt", str(lone), "--config", str(config), "--prompt", "x", *BASE]) == 0


def test_a_model_without_text_is_refused_and_no_model_at_all_too(txt2img, tmp_path, tiny, capsys):
    assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE]) == 2
    assert "there is no folder or file 'logs'" in capsys.readouterr().err
    assert txt2img.main(["--config", "some.yaml", "--prompt", "x", *BASE]) == 2
    assert "name the checkpoint of --config some.yaml" in capsys.readouterr().err
    config = tiny.latent_diffusion(cond_stage_key="class_label")
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "config.yaml")
    torch.save({"state_dict": instantiate_from_config(config).state_dict()}, tmp_path / "model.ckpt")
    assert txt2img.main(["--ckpt", str(tmp_path), "--prompt", "x", *BASE]) == 2
    assert "not conditioned on text (cond_stage_key='class_label')" in capsys.readouterr().err


def test_latents_that_are_no_numbers_are_reported(txt2img, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        inference.DDIMSampler, "sample", lambda self, **k: (torch.full((2, 3, 8, 8), float("nan")), None)
    )
    monkeypatch.setitem(inference.SAMPLERS, "ddim", inference.DDIMSampler)
    assert txt2img.main(["--ckpt", "logs", "--prompt", "x", *BASE]) == 2
    assert "infinite or undefined; try --precision full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/stable-diffusion/v1-inference.yaml", (50, 2, 3, 7.5)),
        ("configs/stable-diffusion/v2-inference-v.yaml", (50, 3, 3, 9.0)),
        ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", (200, 1, 4, 5.0)),
        (None, (50, 1, 4, 3.0)),
    ],
)
def test_defaults_follow_the_configuration(txt2img, config, expected):
    opt = txt2img.get_parser().parse_args(["--ckpt", "x", *(["--config", config] if config else [])])
    flags.fill_defaults(opt)
    assert (opt.steps, opt.n_iter, opt.n_samples, opt.scale) == expected


def test_the_laion_switch_names_its_own_model(txt2img):
    opt = txt2img.get_parser().parse_args(["--laion400m"])
    flags.fill_defaults(opt)
    assert opt.config.endswith("txt2img-1p4B-eval.yaml") and opt.outdir.endswith("laion400m")


def test_the_script_runs_as_a_program_from_any_folder(run_folder, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "txt2img.py"),
        "--prompt",
        "x",
        "--ckpt",
        str(run_folder),
        *BASE,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 files in out" in done.stdout


def test_adapters_change_the_pictures_by_their_weight(txt2img, run_folder, tmp_path, capsys):
    """Weight 0 draws what no file draws; two halves of a file add up to the whole."""
    model, *_ = inference.load_model(str(run_folder), None, torch.device("cpu"))
    lora = inject(model, rank=2, text_encoder=True)
    for p in lora.parameters():
        torch.nn.init.normal_(p)
    lora.save("style.safetensors")
    drawn = {}
    for name, given in {
        "none": [], "zero": ["style.safetensors:0"], "one": ["style.safetensors"],
        "halves": ["style.safetensors:0.5", "style.safetensors:0.5"],
    }.items():  # fmt: skip
        loras = [part for flag in given for part in ("--lora", flag)]
        assert (
            txt2img.main(["--ckpt", str(run_folder), "--prompt", "x", *BASE, "--outdir", name, *loras]) == 0
        )
        picture = Image.open(f"{name}/samples/00000.png")
        assert picture.text.get("lora", "") == ", ".join(given)
        drawn[name] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
    assert torch.equal(drawn["none"], drawn["zero"]) and not torch.equal(drawn["none"], drawn["one"])
    assert (drawn["one"] - drawn["halves"]).abs().max() <= 1  # a rounding
    assert (
        txt2img.main(["--ckpt", str(run_folder), "--prompt", "x", *BASE, "--lora", "gone.safetensors:2"]) == 2
    )
    assert "There is no checkpoint gone.safetensors" in capsys.readouterr().err


def test_a_colon_in_a_path_is_no_weight(txt2img):
    split_weight = txt2img.flags.split_weight
    assert split_weight("C:/style.safetensors") == ("C:/style.safetensors", 1.0)
    assert split_weight("C:/style.safetensors:-0.5") == ("C:/style.safetensors", -0.5)
