import logging
import os

import pytest
import torch
from omegaconf import OmegaConf

from taming import require_same_home, util
from taming.util import ConfigError, get_obj_from_str, instantiate_from_config


class Base:
    def __init__(self, width, depth=2):
        self.width, self.depth = width, depth


class Forwarding(Base):
    def __init__(self, *args, extra=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class Swallowing:
    def __init__(self, width=1, **ignored):
        self.width = width


class Nested:
    def __init__(self, inner_config):
        self.inner = instantiate_from_config(inner_config)


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cases_of_test_util", sys.modules[HERE])


def target(name):
    return f"cases_of_test_util.{name}"


def test_builds_a_target_with_its_params_from_dicts_and_omegaconf():
    for config in (
        {"target": target("Base"), "params": {"width": 3}},
        OmegaConf.create({"target": target("Base"), "params": {"width": 3}}),
    ):
        made = instantiate_from_config(config)
        assert (made.width, made.depth) == (3, 2)


def test_the_two_special_strings_build_nothing():
    assert instantiate_from_config("__is_first_stage__") is None
    assert instantiate_from_config("__is_unconditional__") is None


def test_a_missing_target_is_a_key_error_that_shows_what_there_was():
    with pytest.raises(KeyError, match=r"Expected key `target`.*params"):
        instantiate_from_config({"params": {}})


def test_a_misspelt_parameter_is_named_with_its_path_and_the_nearest_spelling():
    config = OmegaConf.create(
        {"model": {"params": {"inner_config": {"target": target("Base"), "params": {"widht": 3}}}}}
    )
    with pytest.raises(
        ConfigError, match=r"at model\.params\.inner_config has no parameter 'widht'. Did you mean 'width'"
    ):
        instantiate_from_config(config.model.params.inner_config)


def test_a_nested_error_keeps_its_kind_and_notes_where_it_happened():
    config = OmegaConf.create(
        {
            "model": {
                "target": target("Nested"),
                "params": {
                    "inner_config": {
                        "target": "torch.nn.Linear",
                        "params": {"in_features": -1, "out_features": 2},
                    }
                },
            }
        }
    )
    with pytest.raises(RuntimeError) as caught:
        instantiate_from_config(config.model)
    assert any("model.params.inner_config" in note for note in caught.value.__notes__)


def test_a_missing_parameter_is_named():
    with pytest.raises(ConfigError, match="lacks the required parameter width"):
        instantiate_from_config({"target": target("Base")})


def test_parameters_of_the_base_class_pass_through_kwargs_and_misspelt_ones_do_not():
    assert (
        instantiate_from_config({"target": target("Forwarding"), "params": {"width": 1, "depth": 5}}).depth
        == 5
    )
    with pytest.raises(ConfigError, match="Did you mean 'depth'"):
        instantiate_from_config({"target": target("Forwarding"), "params": {"width": 1, "dpeth": 5}})


def test_a_constructor_that_swallows_names_gets_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        instantiate_from_config({"target": target("Swallowing"), "params": {"wdth": 3}})
    assert "ignores the parameter 'wdth'. Did you mean 'width'?" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.nn.Linaer", "Did you mean 'Linear'"),
        ("no_such_package.Thing", "there is no module 'no_such_package'"),
        ("nodots", "must be a dotted path"),
    ],
)
def test_a_wrong_target_says_what_is_wrong(path, message):
    with pytest.raises(ConfigError, match=message):
        get_obj_from_str(path)


def test_targets_in_main_are_found_without_a_main_module(monkeypatch, tmp_path):
    import sys

    from taming.training import ImageLogger

    monkeypatch.setitem(sys.modules, "main", None)  # as in a pip installation: importing it fails
    monkeypatch.delitem(sys.modules, "main")
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if not os.path.exists(os.path.join(p or ".", "main.py"))]
    )
    assert get_obj_from_str("main.ImageLogger") is ImageLogger


def test_freeze_stays_in_eval_mode_whatever_the_model_around_it_does():
    model = torch.nn.Sequential(util.freeze(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    model.train()
    assert not model[0].training and model[1].training
    assert not any(p.requires_grad for p in model[0].parameters())


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), util.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("the disk is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_download_takes_a_file_whole_and_says_where_to_put_it_when_it_cannot(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 5000)
    util.download(source.as_uri(), tmp_path / "sub" / "copy.bin")
    assert (tmp_path / "sub" / "copy.bin").read_bytes() == source.read_bytes()
    with pytest.raises(OSError, match=r"put it at .*other\.bin"):
        util.download((tmp_path / "absent.bin").as_uri(), tmp_path / "other.bin")
    assert not (tmp_path / "other.bin").exists()


def test_get_ckpt_path_refuses_a_wrong_checksum_and_keeps_nothing(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"not the file")
    monkeypatch.setitem(util.URL_MAP, "vgg_lpips", wrong.as_uri())
    with pytest.raises(ValueError, match="md5"):
        util.get_ckpt_path("vgg_lpips", tmp_path / "cache")
    assert not (tmp_path / "cache" / "vgg.pth").exists()
    with pytest.raises(KeyError, match="Did you mean 'vgg_lpips'"):
        util.get_ckpt_path("vgg_lpipz", tmp_path)


def test_retrieve_walks_dicts_lists_and_callables():
    config = {"a": {"b": [10, {"c": 3}]}, "f": lambda: {"g": 5}}
    assert util.retrieve(config, "a/b/1/c") == 3
    assert util.retrieve(config, "f/g") == 5 and config["f"] == {"g": 5}
    assert util.retrieve(config, "a/x", default=7, pass_success=True) == (7, False)
    with pytest.raises(util.KeyNotFoundError) as caught:
        util.retrieve(config, "a/x/y")
    assert caught.value.keys == ["a", "x", "y"] and caught.value.visited == ["a"]


def test_a_package_of_another_distribution_is_refused_with_what_to_do(tmp_path, monkeypatch):
    intruder = tmp_path / "shadowed_ldm"
    intruder.mkdir()
    (intruder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"shadowed_ldm.*Another distribution"):
        require_same_home(util.__file__, "shadowed_ldm")
    with pytest.raises(ImportError, match="is not installed"):
        require_same_home(util.__file__, "no_such_package_at_all")
    require_same_home(util.__file__, "ldm", "sgm")


def test_ldm_says_so_when_an_old_taming_shadows_ours(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    (tmp_path / "taming").mkdir()
    (tmp_path / "taming" / "__init__.py").write_text("")
    root = Path(util.__file__).parents[1]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", "import ldm"],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "pip uninstall taming-transformers" in done.stderr
