import importlib
import sys
from pathlib import Path

import pytest
import torch

from taming.checkpoint import averaged_weights, load_checkpoint
from taming.util import instantiate_from_config


@pytest.fixture(scope="module")
def convert():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("scripts.convert")


def test_averages_take_the_place_of_live_weights_in_diffusion_models_and_first_stages(tiny):
    kl = {**tiny.kl, "params": {**tiny.kl["params"], "ema_decay": 0.5}}
    for config, live in (
        (tiny.latent_diffusion(use_ema=True), "model.diffusion_model.out.2.bias"),
        (kl, "decoder.conv_out.bias"),
    ):
        model = instantiate_from_config(config)
        shadow = "model_ema." + live.removeprefix("model.").replace(".", "")
        state = model.state_dict()
        state[shadow] = torch.full_like(state[shadow], 5.0)
        merged = averaged_weights(state)
        assert torch.all(merged[live] == 5.0) and not any(k.startswith("model_ema.") for k in merged)
        assert set(merged) == {k for k in state if not k.startswith("model_ema.")}


def test_a_checkpoint_becomes_a_small_safetensors_file(convert, tmp_path, capsys):
    state = {
        "a.weight": torch.randn(4, 4),
        "steps": torch.tensor(3),
        "loss.net": torch.randn(9),
        "model_ema.aweight": torch.ones(4, 4),
    }
    torch.save({"state_dict": state, "optimizer_states": [1]}, tmp_path / "x.ckpt")
    out = tmp_path / "x.safetensors"
    argv = [
        str(tmp_path / "x.ckpt"),
        str(out),
        "--ema",
        "--dtype",
        "fp16",
        "--drop",
        "loss.",
        "--metadata",
        "psnr=30",
    ]
    assert convert.main(argv) == 0
    loaded = load_checkpoint(out)
    assert sorted(loaded["state_dict"]) == ["a.weight", "steps"] and loaded["metadata"]["psnr"] == "30"
    assert loaded["state_dict"]["a.weight"].dtype == torch.float16 and torch.all(
        loaded["state_dict"]["a.weight"] == 1
    )
    assert loaded["state_dict"]["steps"].dtype == torch.int64
    assert "2 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent.ckpt", "y.safetensors"], "there is no folder or file"),
        (["{ckpt}", "y.ckpt"], "must end in .safetensors"),
        (["{ckpt}", "y.safetensors", "--ema"], "holds no moving averages"),
        (["{ckpt}", "y.safetensors", "--metadata", "psnr"], "write KEY=VALUE"),
    ],
)
def test_bad_input_is_one_clear_sentence(convert, tmp_path, capsys, argv, message):
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "x.ckpt")
    assert convert.main([a.format(ckpt=tmp_path / "x.ckpt") for a in argv]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- layouts and pipelines


@pytest.fixture
def run_folder(tiny, tmp_path):
    """A text-to-image model as a run's folder, with averages and a training's leftovers in its checkpoint."""
    from omegaconf import OmegaConf

    text = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": {
            "vocab_size": 600, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        }},
    }  # fmt: skip
    unet = {
        "use_spatial_transformer": True, "context_dim": 8, "transformer_depth": 1, "num_heads": 2, "legacy": False,
        "attention_resolutions": [1], "channel_mult": [1, 2], "num_res_blocks": 1, "model_channels": 32,
    }  # fmt: skip
    config = tiny.latent_diffusion(
        unet=unet, cond_stage_config=text, cond_stage_key="txt", first_stage_config=tiny.kl, use_ema=True
    )
    model = instantiate_from_config(config)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    OmegaConf.save({"model": config}, run / "configs" / "x-project.yaml")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [1]}, run / "checkpoints" / "last.ckpt")
    return run, model


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_becomes_a_pipelines_folder_and_a_file_again(convert, run_folder, tmp_path, capsys):
    run, model = run_folder
    folder, file = tmp_path / "pipeline", tmp_path / "again.safetensors"
    assert convert.main([str(run), str(folder)]) == 0
    assert "unet, vae, text_encoder" in capsys.readouterr().out
    assert convert.main([str(folder), str(file), "--config", str(run / "configs" / "x-project.yaml")]) == 0
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("model_ema.")}
    assert same_bits(load_checkpoint(file)["state_dict"], expected)
    # and without the configuration: what the folder says of itself is enough
    assert convert.main([str(folder), str(file), "--dtype", "bf16"]) == 0
    half = load_checkpoint(file)["state_dict"]
    assert torch.equal(
        half["model.diffusion_model.out.2.bias"], expected["model.diffusion_model.out.2.bias"].bfloat16()
    )


def test_ldms_names_become_sgms_and_come_back(convert, run_folder, tmp_path):
    run, model = run_folder
    there, back = tmp_path / "sgm.safetensors", tmp_path / "ldm.safetensors"
    assert convert.main([str(run), str(there), "--to", "sgm"]) == 0
    assert "denoiser.sigmas" in load_checkpoint(there)["state_dict"]
    assert convert.main([str(there), str(back), "--to", "ldm"]) == 0
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("model_ema.") and "." in k}
    got = load_checkpoint(back)["state_dict"]
    assert same_bits({k: v for k, v in got.items() if "." in k}, expected)
    assert torch.equal(got["alphas_cumprod"], model.alphas_cumprod)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{ckpt}", "y.safetensors", "--to", "diffusers"], "writes a folder"),
        (["{ckpt}", "folder", "--to", "sgm"], "must end in .safetensors"),
        (["{ckpt}", "folder"], "are of no published model"),
        (["{ckpt}", "y.safetensors", "--to", "sgm"], "hold no schedule"),
        (["{empty}", "y.safetensors"], "holds none of"),
    ],
)
def test_conversions_that_cannot_be_are_one_clear_sentence(convert, tmp_path, capsys, argv, message):
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "x.ckpt")
    (tmp_path / "empty").mkdir()
    filled = [a.format(ckpt=tmp_path / "x.ckpt", empty=tmp_path / "empty") for a in argv]
    assert convert.main(filled) == 2
    assert message in capsys.readouterr().err


def test_half_precision_is_for_networks_and_not_for_noise_schedules(convert, run_folder, tmp_path):
    """Of ᾱ, 4.7e-3 at SD's last step, half precision keeps three digits, and of β, 8.5e-4, less."""
    run, model = run_folder
    for flags, file in (
        (["--to", "ldm"], "ldm.safetensors"),
        (["--to", "sgm"], "sgm.safetensors"),
        ([], "same.safetensors"),
    ):
        assert convert.main([str(run), str(tmp_path / file), "--dtype", "fp16", *flags]) == 0
        got = load_checkpoint(tmp_path / file)["state_dict"]
        for name, value in got.items():
            network = name.startswith(("model.", "first_stage_model.", "cond_stage_model.", "conditioner."))
            assert (value.dtype == torch.float16) == (network and value.is_floating_point()), name
    assert torch.equal(got["alphas_cumprod"], model.alphas_cumprod) and torch.equal(got["betas"], model.betas)


def test_schedules_inside_of_parts_keep_their_type_too():
    """As that of the upscaler's noise and of a denoiser's levels."""
    from ldm import conversion

    names = ["low_scale_model.alphas_cumprod", "denoiser.sigmas", "scale_factor", "noise_augmentor.betas"]
    weights = {name: torch.rand(3) for name in [*names, "model.diffusion_model.out.2.bias"]} | {
        "steps": torch.tensor(3)
    }
    cast = conversion.cast(weights, torch.bfloat16)
    assert [k for k, v in cast.items() if v.dtype == torch.bfloat16] == ["model.diffusion_model.out.2.bias"]
    assert all(cast[k] is weights[k] for k in names) and cast["steps"].dtype == torch.int64
    assert conversion.cast(weights, None) == weights


def test_a_file_that_may_predict_either_way_asks_for_its_configuration(convert, run_folder, tmp_path, monkeypatch, capsys):  # fmt: skip
    from ldm.recognition import Recognised

    run, _ = run_folder
    bare = tmp_path / "bare.safetensors"
    assert convert.main([str(run), str(bare)]) == 0
    found = Recognised("Stable Diffusion 2", "v2-inference.yaml", "v2-inference-v.yaml")
    monkeypatch.setattr(convert, "recognise", lambda weights: found)
    assert convert.main([str(bare), str(tmp_path / "folder")]) == 2
    assert "name --config v2-inference.yaml or --config v2-inference-v.yaml" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_large_weights_are_split_and_read_as_one(convert, tmp_path, capsys):
    from taming.checkpoint import load_state_dict

    state = {name: torch.randn(100, 100) for name in "abc"}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert (
        convert.main([str(tmp_path / "x.ckpt"), str(tmp_path / "m.safetensors"), "--max_size", "0.09"]) == 0
    )
    assert "3 tensors in 2 files" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("m*")) == [
        "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json",
    ]  # fmt: skip
    again = load_state_dict(tmp_path / "m.safetensors.index.json")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert convert.main([str(tmp_path / "x.ckpt"), str(tmp_path / "m.safetensors"), "--max_size", "0"]) == 2
    assert "must be above 0 MB" in capsys.readouterr().err
