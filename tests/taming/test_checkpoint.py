import argparse
import builtins
import collections
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming import checkpoint
from taming.checkpoint import CheckpointError


class Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_weights_of_old_training_runs_are_read_around_their_pickled_classes(tmp_path):
    """Lightning 1 checkpoints carry callback classes as keys, configuration objects and numpy scalars."""
    callbacks = types.ModuleType("pytorch_lightning.callbacks.old_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    sys.modules[callbacks.__name__] = callbacks
    try:
        contents = {
            "state_dict": {"weight": torch.arange(3.0)},
            "callbacks": {callbacks.ModelCheckpoint: {"best": np.float64(0.5)}},
            "hyper_parameters": OmegaConf.create({"a": {"b": [1, 2]}}),
            "options": argparse.Namespace(x=1),
            "stats": collections.defaultdict(int, {"n": 3}),
            "global_step": 7,
        }
        torch.save(contents, tmp_path / "old.ckpt")
    finally:
        del sys.modules[callbacks.__name__]
    loaded = checkpoint.load_checkpoint(tmp_path / "old.ckpt")
    assert loaded["global_step"] == 7
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(3.0))
    assert isinstance(loaded["options"], checkpoint.Inert)  # a stand-in, not the class


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {mark}",), "system"),
        (builtins.eval, ("open('{mark}', 'w')",), "eval"),
        (subprocess.call, (["touch", "{mark}"],), "call"),
    ],
    ids=["os.system", "eval", "subprocess"],
)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(
    tmp_path, function, arguments, name, zipped
):
    mark = tmp_path / "executed"
    filled = tuple(
        [a.format(mark=mark) for a in arg] if isinstance(arg, list) else arg.format(mark=mark)
        for arg in arguments
    )
    path = tmp_path / "evil.ckpt"
    torch.save(
        {"state_dict": {"w": torch.ones(1)}, "x": Runs(function, *filled)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load_checkpoint(path)
    assert not mark.exists()


def test_a_checkpoint_inside_a_checkpoint_stays_bytes(tmp_path):
    inner = tmp_path / "inner.ckpt"
    torch.save({"x": Runs(os.system, f"touch {tmp_path / 'executed'}")}, inner)
    torch.save({"state_dict": {"w": torch.ones(1)}, "blob": inner.read_bytes()}, tmp_path / "outer.ckpt")
    assert isinstance(checkpoint.load_checkpoint(tmp_path / "outer.ckpt")["blob"], bytes)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_damaged_file_gives_one_clear_sentence(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    weights = {"weight": torch.randn(100, 100)}
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        checkpoint.save_safetensors(weights, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.*bytes\) is not a readable"):
            checkpoint.load_checkpoint(path)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"lost\.ckpt.*last\.ckpt"):
        checkpoint.load_checkpoint(tmp_path / "lost.ckpt")


def test_safetensors_round_trip_with_metadata(tmp_path):
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4).half(), "a_transposed": torch.randn(3, 2).t()}
    checkpoint.save_safetensors(weights, tmp_path / "w.safetensors", {"psnr": "30.1"})
    loaded = checkpoint.load_checkpoint(tmp_path / "w.safetensors")
    assert loaded["metadata"]["psnr"] == "30.1"
    assert all(
        torch.equal(loaded["state_dict"][k], v) and loaded["state_dict"][k].dtype == v.dtype
        for k, v in weights.items()
    )


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoint.save_checkpoint({"step": 1}, path)

    def full_disk(contents, target):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_loading_reports_what_is_missing_and_left_over_by_sub_model(caplog):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    state = {
        **{f"encoder.{k}": v for k, v in nn.Linear(2, 2).state_dict().items()},
        "loss.weight": torch.ones(1),
    }
    with caplog.at_level("INFO"):
        missing, unexpected = checkpoint.load_into(model, state, source="x.ckpt")
    assert missing == ["decoder.weight", "decoder.bias"] and unexpected == ["loss.weight"]
    assert "2 missing (decoder 2); 1 left over (loss 1)" in caplog.text
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load_into(model, state, strict=True)


def test_shapes_that_differ_are_refused_with_both_sizes():
    with pytest.raises(CheckpointError, match=r"weight is \(3, 2\) there and \(2, 2\) here.*ignore_keys"):
        checkpoint.load_into(nn.Linear(2, 2), nn.Linear(2, 3).state_dict(), source="other.ckpt")
    checkpoint.load_into(nn.Linear(2, 2), nn.Linear(2, 3).state_dict(), ignore_keys=["weight", "bias"])


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="No entry of other.ckpt belongs to Linear"):
        checkpoint.load_into(nn.Linear(2, 2), {"blocks.0.attn": torch.ones(1)}, source="other.ckpt")


def test_load_model_from_config_warns_about_weights_that_stay_random(tmp_path, caplog):
    torch.save({"state_dict": {"weight": torch.ones(2, 2)}}, tmp_path / "half.ckpt")
    config = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 2}}}
    model = checkpoint.load_model_from_config(config, tmp_path / "half.ckpt")
    assert not model.training and torch.equal(model.weight, torch.ones(2, 2))
    assert "has no weights for 1 entries" in caplog.text


def test_find_run_understands_log_folders_published_folders_and_single_files(tmp_path):
    run = tmp_path / "logs" / "2026_run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        checkpoint.find_run(run)
    (run / "checkpoints" / "last.ckpt").touch()
    for stamp in ("2026-01-01", "2026-02-02"):
        (run / "configs" / f"{stamp}-project.yaml").touch()
    newest = [run / "configs" / "2026-02-02-project.yaml"]
    assert checkpoint.find_run(run) == (run / "checkpoints" / "last.ckpt", newest)
    assert checkpoint.find_run(run / "checkpoints" / "last.ckpt")[1] == newest
    published = tmp_path / "models"
    published.mkdir()
    (published / "model.ckpt").touch()
    (published / "config.yaml").touch()
    assert checkpoint.find_run(published) == (published / "model.ckpt", [published / "config.yaml"])
    with pytest.raises(
        FileNotFoundError, match="there is no folder or file .*2026_rum.*Did you mean '2026_run'"
    ):
        checkpoint.find_run(tmp_path / "logs" / "2026_rum")
