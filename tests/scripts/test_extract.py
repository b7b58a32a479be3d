import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from taming.checkpoint import load_checkpoint, load_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def submodel():
    return importlib.import_module("scripts.extract_submodel")


@pytest.fixture
def depth():
    return importlib.import_module("scripts.extract_depth")


@pytest.fixture
def segmentation():
    return importlib.import_module("scripts.extract_segmentation")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_part_is_cut_out_under_its_own_names(submodel, tmp_path, suffix):
    state = {"cond_stage_model.w": torch.ones(2), "first_stage_model.encoder.w": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "in.ckpt")
    out = tmp_path / f"out{suffix}"
    assert submodel.main([str(tmp_path / "in.ckpt"), str(out)]) == 0  # the published default part
    assert list(load_state_dict(out)) == ["w"]
    assert submodel.main([str(tmp_path / "in.ckpt"), str(out), "first_stage_model"]) == 0
    assert list(load_state_dict(out)) == ["encoder.w"]
    assert "state_dict" in load_checkpoint(out)


def test_an_absent_part_is_answered_with_the_nearest(submodel, tmp_path, capsys):
    torch.save({"state_dict": {"first_stage_model.w": torch.ones(1)}}, tmp_path / "in.ckpt")
    assert submodel.main([str(tmp_path / "in.ckpt"), "out.ckpt", "first_stage"]) == 2
    assert "Did you mean 'first_stage_model'?" in capsys.readouterr().err
    assert submodel.main(["absent.ckpt", "out.ckpt"]) == 2
    assert "there is no folder or file" in capsys.readouterr().err


class Pictures:
    """Two pictures of different sizes, as the data sets give them."""

    def __init__(self, key):
        self.key, self.opened = key, 0

    def __len__(self):
        return 2

    def __getitem__(self, i):
        self.opened += 1
        image = np.full((4 + i, 6, 3), -1.0, np.float32)
        image[:, 3:] = 1.0
        return {"image": image, self.key: f"n01/{i}.JPEG"}


def test_depth_is_stored_without_loss_and_an_interrupted_run_goes_on(depth, tmp_path):
    def predict(image):
        assert image.min() == 0.0 and image.max() == 255.0
        return (image.mean(axis=2) * np.float32(1.2345678)).astype(np.float32)

    data = Pictures("relpath")
    assert depth.extract(data, predict, tmp_path / "val") == (2, 0)
    stored = np.asarray(Image.open(tmp_path / "val" / "n01" / "1.png"))
    assert stored.shape == (5, 6, 4) and stored.dtype == np.uint8
    values = stored.view(np.float32)[..., 0]
    assert np.array_equal(values, predict((data[1]["image"] + 1.0) * 127.5))
    (tmp_path / "val" / "n01" / "0.png").unlink()
    assert depth.extract(data, predict, tmp_path / "val") == (1, 1)


def test_a_depth_network_is_called_as_its_hub_asks_and_enlarged(depth, monkeypatch):
    asked = []

    class Transforms:
        default_transform = dpt_transform = small_transform = staticmethod(
            lambda image: torch.tensor(image).float().mean(2)[None, ::2, ::2]
        )

    def load(repository, name, **kwargs):
        asked.append((repository, name))
        return Transforms if name == "transforms" else torch.nn.Identity()

    monkeypatch.setattr(torch.hub, "load", load)
    predict = depth.load_midas("MiDaS", torch.device("cpu"))
    out = predict(np.full((8, 6, 3), 60.0, np.float32))
    assert out.shape == (8, 6) and out.dtype == np.float32 and np.allclose(out, 60.0)
    assert asked == [("intel-isl/MiDaS", "MiDaS"), ("intel-isl/MiDaS", "transforms")]


def test_without_a_connection_the_scripts_say_what_to_fetch(depth, segmentation, monkeypatch):
    def load(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(
        depth.InferenceError, match=r"--model MiDaS could not be loaded .*no route to host.*copy its cache"
    ):
        depth.load_midas("MiDaS", torch.device("cpu"))
    with pytest.raises(segmentation.InferenceError, match=r"deeplab-pytorch could not be loaded"):
        segmentation.load_deeplab(None, torch.device("cpu"))


def test_segmentation_networks_get_bgr_without_the_mean_and_give_labels(segmentation, tmp_path):
    seen = []

    def network(x):
        seen.append(x)
        bright = (x[:, :1] > 0).float()
        return F.avg_pool2d(torch.cat([1 - bright, torch.zeros_like(bright), bright], dim=1), 1)

    data = Pictures("relative_file_path_")
    assert segmentation.extract(data, network, tmp_path, torch.device("cpu")) == (2, 0)
    assert torch.allclose(seen[0][0, :, 0, 0], -torch.tensor(segmentation.MEAN_BGR))
    assert torch.allclose(seen[0][0, :, 0, 5], 255.0 - torch.tensor(segmentation.MEAN_BGR), atol=1e-4)
    labels = np.asarray(Image.open(tmp_path / "n01" / "0.png"))
    assert labels.shape == (4, 6) and labels[0].tolist() == [0, 0, 0, 2, 2, 2]
    assert segmentation.extract(data, network, tmp_path, torch.device("cpu")) == (0, 2)
    rgb = np.zeros((1, 1, 3), np.float32)
    rgb[..., 0] = 1.0  # red is the last of BGR
    channels = segmentation.to_network(rgb)[0, :, 0, 0] + torch.tensor(segmentation.MEAN_BGR)
    assert channels.tolist() == pytest.approx([127.5, 127.5, 255.0])


def test_labels_are_of_the_images_size(segmentation):
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, :, 1] = 1.0
    assert segmentation.labels_of(logits, (4, 4))[0].tolist()[::3] == [0, 1]


def test_weights_of_another_network_are_refused(segmentation, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: torch.nn.Linear(2, 2))
    torch.save({"other": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="No entry of"):
        segmentation.load_deeplab(str(tmp_path / "x.pth"), torch.device("cpu"))
