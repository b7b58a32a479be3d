"""Checkpoints in several files, folders of networks, damaged files, and tensors that are read one at a time."""

import json
import os

import pytest
import torch

from taming import checkpoint, checkpoint_files
from taming.checkpoint import CheckpointError, Weights


def in_shards(folder, suffix):
    """Six weights in two files with an index, as the hub stores large networks."""
    state = {f"layer{i}.weight": torch.randn(4, 4) for i in range(6)}
    stem = "diffusion_pytorch_model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number in (1, 2):
        part = dict(list(state.items())[3 * number - 3 : 3 * number])
        name = f"{stem}-0000{number}-of-00002{suffix}"
        save = checkpoint.save_safetensors if suffix == ".safetensors" else torch.save
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 384}, "weight_map": weight_map}))
    return index, state


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_checkpoint_in_several_files_is_one(tmp_path, suffix):
    index, state = in_shards(tmp_path, suffix)
    for path in (index, tmp_path):  # by its index, or by the network's folder
        whole, lazily = checkpoint.load_state_dict(path), Weights(path)
        assert whole.keys() == lazily.keys() == state.keys()
        assert all(torch.equal(whole[k], v) and torch.equal(lazily[k], v) for k, v in state.items())
        assert lazily.shapes["layer3.weight"] == (4, 4)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_lost_part_is_named(tmp_path, suffix):
    index, _ = in_shards(tmp_path, suffix)
    next(tmp_path.glob(f"*-00002-of-00002{suffix}")).unlink()
    for read in (checkpoint.load_state_dict, Weights):
        with pytest.raises(FileNotFoundError, match="names 2 files, and 1 are not there: .*00002-of-00002"):
            read(index)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd"])
def test_an_index_cannot_name_files_outside_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which is not in its own folder"):
        checkpoint.load_state_dict(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"metadata": {}}', '{"weight_map": 3}', "{broken"])
def test_a_broken_index_gets_a_sentence(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is no index of weights"):
        checkpoint.load_state_dict(path)


def test_an_index_that_promises_too_much_is_named(tmp_path):
    checkpoint.save_safetensors({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="one.safetensors lacks 'b'"):
        Weights(path)


def test_a_folder_without_weights_says_what_it_would_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="would hold diffusion_pytorch_model.safetensors"):
        checkpoint.load_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_are_opened_anew_so_that_their_pages_are_given_back(tmp_path, suffix, monkeypatch):
    state = {f"w{i}": torch.randn(8, 8) for i in range(6)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        checkpoint.save_safetensors(state, path, {"global_step": "3"})
    monkeypatch.setattr(checkpoint_files, "WINDOW", 500)  # bytes: two tensors
    weights = Weights(path)
    assert all(torch.equal(weights[k], v) for k, v in state.items())
    assert str(weights.metadata["global_step"]) == "3"


def test_one_flipped_bit_in_a_pickled_checkpoint_is_found(tmp_path):
    """Archives carry checksums, which torch.load does not look at."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(4096)}}, path)
    contents = bytearray(path.read_bytes())
    where = bytes(contents).index(b"\0" * 4096) + 2048
    contents[where] ^= 16
    path.write_bytes(contents)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].count_nonzero() == 1
    for read in (checkpoint.load_checkpoint, Weights):
        with pytest.raises(CheckpointError, match="is damaged .* differs from its checksum.*fetch it again"):
            read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_every_flipped_byte_of_a_files_head_gives_an_error_or_the_same_numbers(tmp_path, suffix):
    path, state = tmp_path / f"model{suffix}", {"weight": torch.arange(64.0)}
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        checkpoint.save_safetensors(state, path)
    whole = path.read_bytes()
    start = whole.index(state["weight"].numpy().tobytes()) if suffix == ".safetensors" else 200
    for where in range(0, start, 23):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 0x55]) + whole[where + 1 :])
        try:
            loaded = checkpoint.load_state_dict(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:  # a name or an unused field: the numbers are right
            assert all(torch.equal(v, state["weight"]) for v in loaded.values() if v.shape == (64,))


class Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(kind, mark, folder):
    """Files that would make `mark`; what they want to call."""
    path = folder / "evil.bin"
    call = Runs(os.system, f"touch {mark}")
    if kind == "a storage of torch that is a pickle":
        torch.save(call, path)
        contents = path.read_bytes()
        torch.save({"state_dict": Runs(torch.storage._load_from_bytes, contents)}, path)
        return path, "torch.storage._load_from_bytes"
    if kind == "a function of torch that is no type":
        torch.save(
            {"w": torch.ones(1), "x": Runs(torch.hub.load, "x", "y")},
            path,
            _use_new_zipfile_serialization=False,
        )
        return path, "torch.hub.load"
    if kind == "the oldest way to name a function":
        path.write_bytes(f"(S'touch {mark}'\nios\nsystem\n.".encode())
        return path, "os.system"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": call}, path)
    return path, "system"


@pytest.mark.parametrize(
    "kind",
    [
        "a storage of torch that is a pickle", "a function of torch that is no type", "the oldest way to name a function",
        "beside the weights",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["a file", "an index"])
def test_no_way_of_reading_runs_what_a_pickle_holds(tmp_path, kind, where):
    mark = tmp_path / "executed"
    path, name = evil(kind, mark, tmp_path)
    if where == "an index":
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": {"w": path.name}}))
        path = index
    for read in (checkpoint.load_data, checkpoint.load_state_dict, Weights):
        with pytest.raises(CheckpointError, match=rf"wants to call '.*{name}'"):
            read(path)
    config = {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}
    with pytest.raises(CheckpointError, match="wants to call"):
        checkpoint.load_model_from_config(config, path)
    assert not mark.exists()


def test_a_file_of_the_format_before_archives_is_read_once(tmp_path, monkeypatch):
    """It cannot be mapped, so that forgetting it would mean to unpickle all of it again."""
    state = {str(i): torch.full((100,), float(i)) for i in range(9)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(checkpoint_files, "WINDOW", 500)
    read, calls = checkpoint_files.read_pickle, []
    monkeypatch.setattr(
        checkpoint_files, "read_pickle", lambda *args, **options: calls.append(1) or read(*args, **options)
    )
    weights = checkpoint_files.Weights(tmp_path / "old.pth")
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    assert len(calls) == 1
