"""Weights that go straight from a file into a model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from taming import checkpoint
from taming.checkpoint import CheckpointError, Weights


class Net(nn.Module):
    """Layers, a buffer that is stored, one that is not, and a weight made by hand."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("schedule", torch.linspace(0, 1, 5))
        self.register_buffer("steps", torch.arange(5), persistent=False)


class Renaming(Net):
    """Reads an older name."""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *rest):
        if f"{prefix}old.weight" in state:
            state[f"{prefix}first.weight"] = state.pop(f"{prefix}old.weight")


class Fusing(Net):
    """Makes one weight of two."""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(self.fuse)

    @staticmethod
    def fuse(module, state, prefix, *rest):
        if "a" in state:
            state["first.weight"] = torch.cat([state.pop("a"), state.pop("b")])


class Peeking(nn.Linear):
    """Looks at its weights while it is built."""

    def __init__(self):
        super().__init__(3, 3)
        self.norm = float(self.weight.norm())


def config(name):
    sys.modules["streamed"] = sys.modules[__name__]
    return {"model": {"target": f"streamed.{name}"}}


def randomised(module):
    state = {
        k: torch.randn_like(v) if v.is_floating_point() else v + 3 for k, v in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_model_has_its_own_types_the_files_numbers_and_its_other_buffers(tmp_path, suffix, stored):
    state = randomised(Net()).state_dict()
    state = {k: v.to(stored) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / f"net{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        checkpoint.save_safetensors(state, path)
    model = checkpoint.load_model_from_config(config("Net"), path)
    own = model.state_dict()
    assert equal({k: v.to(own[k].dtype) for k, v in state.items()}, own)
    assert all(v.dtype == Net().state_dict()[k].dtype for k, v in own.items())
    assert torch.equal(model.steps, torch.arange(5)) and not model.scale.requires_grad
    assert model.first.weight.requires_grad and not model.training
    path.write_bytes(b"")  # nothing of it lies in the file any more
    assert equal({k: v.to(own[k].dtype) for k, v in state.items()}, model.state_dict())


def test_parameters_come_in_the_wanted_type_and_buffers_keep_theirs(tmp_path):
    state = randomised(Net()).state_dict()
    checkpoint.save_safetensors(state, tmp_path / "net.safetensors")
    model = checkpoint.load_model_from_config(
        config("Net"), tmp_path / "net.safetensors", dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.schedule.dtype == torch.float32 and torch.equal(model.schedule, state["schedule"])
    assert torch.equal(model.first.weight, state["first.weight"].bfloat16())


def test_weights_that_a_file_lacks_keep_their_initial_values(tmp_path, caplog):
    state = randomised(Net()).state_dict()
    del state["scale"], state["first.bias"]
    checkpoint.save_safetensors(state, tmp_path / "net.safetensors")
    model = checkpoint.load_model_from_config(config("Net"), tmp_path / "net.safetensors")
    assert torch.equal(model.scale, torch.ones(4)) and model.first.bias.abs().max() <= 0.5
    assert torch.equal(model.first.weight, state["first.weight"])
    assert "has no weights for 2 entries (scale 1, first 1)" in caplog.text


def test_a_modules_own_rules_for_older_names_hold(tmp_path):
    state = randomised(Net()).state_dict()
    old = {("old.weight" if k == "first.weight" else k): v for k, v in state.items()}
    checkpoint.save_safetensors(old, tmp_path / "net.safetensors")
    model = checkpoint.load_model_from_config(config("Renaming"), tmp_path / "net.safetensors")
    assert equal(model.state_dict(), state)
    parts = {k: v for k, v in state.items() if k != "first.weight"}
    parts |= {"a": state["first.weight"][:1], "b": state["first.weight"][1:]}
    checkpoint.save_safetensors(parts, tmp_path / "parts.safetensors")
    model = checkpoint.load_model_from_config(
        config("Fusing"), tmp_path / "parts.safetensors", dtype=torch.float16
    )
    assert torch.equal(model.first.weight, state["first.weight"].half()) and not model.scale.requires_grad
    assert torch.equal(model.schedule, state["schedule"])


def test_a_model_that_looks_at_its_weights_is_built_with_them(tmp_path):
    state = randomised(nn.Linear(3, 3)).state_dict()
    checkpoint.save_safetensors(state, tmp_path / "net.safetensors")
    model = checkpoint.load_model_from_config(config("Peeking"), tmp_path / "net.safetensors")
    assert equal(model.state_dict(), state) and model.norm > 0


def test_parts_on_the_meta_device_are_filled(tmp_path):
    state = randomised(Net()).state_dict()
    checkpoint.save_safetensors(state, tmp_path / "net.safetensors")
    with checkpoint.build_empty():
        model = Net()
    assert model.first.weight.is_meta and model.scale.is_meta and not model.schedule.is_meta
    report = checkpoint.stream_into(model, Weights(tmp_path / "net.safetensors"))
    assert report == ([], []) and equal(model.state_dict(), state)
    assert not nn.Linear(2, 2).weight.is_meta  # outside, all is as before


def test_what_does_not_match_is_reported_as_ever(tmp_path):
    checkpoint.save_safetensors(randomised(Net()).state_dict(), tmp_path / "net.safetensors")
    weights = Weights(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"first.weight is \(4, 4\) there and \(8, 8\) here"):
        checkpoint.stream_into(Net(8), weights)
    missing, unexpected = checkpoint.stream_into(nn.ModuleDict({"first": nn.Linear(4, 4)}), weights)
    assert not missing and "second.0.weight" in unexpected
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.stream_into(nn.ModuleDict({"first": nn.Linear(4, 4)}), weights, strict=True)


MEASURE = """
import sys, torch
sys.path.insert(0, {root!r})
from taming.checkpoint import load_model_from_config
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
config = {{"target": "measured.Stack"}}
import types, torch.nn as nn
class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
sys.modules["measured"] = types.SimpleNamespace(Stack=Stack)
load_model_from_config({{"target": "torch.nn.Linear", "params": {{"in_features": 1, "out_features": 1}}}}, {small!r})
before = peak()
model = load_model_from_config(config, {path!r}, dtype=getattr(torch, {dtype!r}))
size = sum(p.nbytes for p in model.parameters())
print((peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read off Linux's /proc")
@pytest.mark.parametrize("suffix, dtype", [(".safetensors", "float32"), (".ckpt", "float16")])
def test_the_peak_of_memory_is_little_more_than_the_weights(tmp_path, suffix, dtype):
    """192 MB of weights of 4 MB each, in a process of its own; the file's window is 16 MB here."""
    state = {f"{i}.weight": torch.full((1024, 1024), float(i)) for i in range(48)}
    small, path = tmp_path / "small.safetensors", tmp_path / f"model{suffix}"
    checkpoint.save_safetensors(nn.Linear(1, 1).state_dict(), small)
    torch.save(state, path) if suffix == ".ckpt" else checkpoint.save_safetensors(state, path)
    script = MEASURE.format(
        root=str(Path(__file__).resolve().parents[2]), small=str(small), path=str(path), dtype=dtype
    )
    script = script.replace(
        "def peak", "from taming import checkpoint_files; checkpoint_files.WINDOW = 1 << 24\ndef peak"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.25
