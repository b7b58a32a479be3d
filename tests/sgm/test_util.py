"""The tools of chapter three, and names that load when asked for."""

import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from sgm import util
from taming.checkpoint import save_checkpoint


def test_axes_are_appended_and_too_many_are_an_error():
    x = torch.ones(3)
    assert (
        util.append_dims(x, 4).shape == util.expand_dims_like(x, torch.ones(2, 3, 4, 5)).shape == (3, 1, 1, 1)
    )
    with pytest.raises(ValueError, match="of 2 axes cannot be given 1"):
        util.append_dims(torch.ones(2, 2), 1)


def test_append_zero_keeps_the_type():
    out = util.append_zero(torch.ones(2, dtype=torch.float64))
    assert out.tolist() == [1.0, 1.0, 0.0] and out.dtype == torch.float64


@pytest.mark.parametrize(
    ("question", "yes", "no"),
    [
        (util.isheatmap, torch.zeros(2, 3), torch.zeros(1, 2, 3)),
        (util.isneighbors, torch.zeros(1, 5, 3, 2, 2), torch.zeros(1, 5, 4, 2, 2)),
        (util.isimage, torch.zeros(1, 1, 2, 2), torch.zeros(1, 4, 2, 2)),
        (util.ismap, torch.zeros(1, 4, 2, 2), "text"),
        (util.is_power_of_two, 64, 0),
    ],
)
def test_questions(question, yes, no):
    assert question(yes) is True and question(no) is False


def test_a_partial_class_is_a_class_with_arguments_filled_in():
    small = util.partialclass(torch.nn.Linear, 3, bias=False)
    assert issubclass(small, torch.nn.Linear) and small(4).weight.shape == (4, 3)
    assert small(4).bias is None


def test_a_partial_from_a_configuration_is_not_called_yet():
    make = util.load_partial_from_config({"target": "torch.nn.Linear", "params": {"in_features": 3}})
    assert make(out_features=2).weight.shape == (2, 3)
    assert isinstance(util.load_partial_from_config({"target": "torch.nn.ReLU"})(), torch.nn.ReLU)


def test_an_object_stands_for_itself_where_a_configuration_is_expected():
    relu = torch.nn.ReLU()
    assert util.object_from(relu) is relu
    assert isinstance(util.object_from(OmegaConf.create({"target": "torch.nn.ReLU"})), torch.nn.ReLU)


def test_attributes_by_path_go_through_modules_and_lists():
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    net.parts = [net[0], net]
    assert util.get_nested_attribute(net, "0.0.in_features") == 2
    assert util.get_nested_attribute(net, "parts.1.0.0.out_features") == 2
    assert util.get_nested_attribute(net, "0.0.weight", depth=2, return_key=True) == (net[0][0], "0.0")
    with pytest.raises(AttributeError) as error:
        util.get_nested_attribute(net, "0.nothing.weight")
    assert "'0.nothing.weight'" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("text", "first"), [("('a', 2)", "a"), ("plain", "plain"), ("(3", "(3"), ("()", "()"), ("(a b)", "(a b)")]
)
def test_the_first_entry_of_a_written_tuple(text, first):
    assert util.get_string_from_tuple(text) == first


def test_local_paths_become_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert util.make_path_absolute("a/b") == str(tmp_path / "a" / "b")
    assert util.make_path_absolute("s3://bucket/a") == "s3://bucket/a"


def test_the_configurations_are_found_beside_the_package_or_in_it(tmp_path, monkeypatch):
    (tmp_path / "sgm").mkdir()
    monkeypatch.setattr(util, "__file__", str(tmp_path / "sgm" / "util.py"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        util.get_configs_path()
    (tmp_path / "configs").mkdir()
    assert util.get_configs_path() == str(tmp_path / "configs")
    (tmp_path / "sgm" / "configs").mkdir()
    assert util.get_configs_path() == str(tmp_path / "sgm" / "configs")


@pytest.mark.parametrize("freeze", [True, False])
def test_a_model_from_a_configuration_has_the_weights_of_the_file(tmp_path, freeze):
    saved = torch.nn.Linear(3, 2)
    save_checkpoint({"state_dict": saved.state_dict()}, tmp_path / "model.ckpt")
    config = OmegaConf.create(
        {"model": {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}}}
    )
    model = util.load_model_from_config(config, tmp_path / "model.ckpt", freeze=freeze)
    assert torch.equal(model.weight, saved.weight) and not model.training
    assert model.weight.requires_grad is not freeze
    with pytest.raises(KeyError, match="`model` section"):
        util.load_model_from_config(config.model, tmp_path / "model.ckpt")


def test_a_decorated_function_runs_with_or_without_autocast():
    def double(x):
        return 2 * x

    assert util.autocast(double)(3) == util.autocast(double, enabled=False)(3) == 6


def test_names_load_when_asked_for_and_unknown_ones_are_named():
    import sgm.models
    import sgm.modules

    assert sgm.instantiate_from_config is util.instantiate_from_config
    assert "DiffusionEngine" in dir(sgm.models) and "GeneralConditioner" in dir(sgm.modules)
    with pytest.raises(
        AttributeError, match=r"module 'sgm' has no attribute 'Engine'; it offers .*DiffusionEngine"
    ):
        sgm.Engine  # noqa: B018


def test_samplers_import_without_hub_libraries_lightning_and_torchvision():
    code = (
        "import sys, sgm.modules.diffusionmodules.sampling, sgm.modules.diffusionmodules.wrappers, sgm.modules.diffusionmodules.loss;"
        "print([m for m in ('transformers', 'open_clip', 'pytorch_lightning', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
