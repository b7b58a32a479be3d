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
