import argparse
import logging

import pytest
import torch
from omegaconf import OmegaConf

from taming.training import arguments
from taming.training.arguments import device_count, split_overrides, trainer_options, translate
from taming.training.cli import get_parser, parse
from taming.training.folders import UsageError
from taming.util import ConfigError


def options(*argv):
    return parse(argv)[0]


def test_trainer_flags_of_today_pass_and_values_are_read_as_yaml():
    kwargs, devices = trainer_options(
        OmegaConf.create({"max_steps": 5}),
        options("--max_steps", "7", "--deterministic", "--val_check_interval", "0.5"),
    )
    assert kwargs == {"max_steps": 7, "deterministic": True, "val_check_interval": 0.5}
    assert devices == max(1, torch.cuda.device_count())


def test_every_flag_of_the_published_scripts_is_understood():
    argv = "-n x -b a.yaml b.yaml -t True --no-test -p q -d no -s 5 -f _x -l out --scale_lr False --no_date --enable_tf32 --wandb --projectname w"
    opt, overrides = parse(
        [*argv.split(), "model.params.a=1", "--legacy_naming", "--no_base_name", "data.params.batch_size=3"]
    )
    assert (opt.name, opt.base, opt.train, opt.no_test, opt.seed, opt.scale_lr) == (
        "x",
        ["a.yaml", "b.yaml"],
        True,
        True,
        5,
        False,
    )
    assert overrides == ["model.params.a=1", "data.params.batch_size=3"]


def test_an_override_after_a_bare_switch_is_no_value_of_it():
    opt, overrides = parse(["-b", "c.yaml", "-t", "lightning.trainer.max_steps=3"])
    assert opt.train is True and overrides == ["lightning.trainer.max_steps=3"] and opt.base == ["c.yaml"]
    assert split_overrides(["--ckpt", "a=b", "x.y=1"]) == (["x.y=1"], ["--ckpt", "a=b"])


def test_an_unknown_flag_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="'--max_epoch'. Did you mean '--max_epochs'"):
        parse(["--max_epoch", "3"])


def test_old_arguments_get_their_new_names(caplog):
    with caplog.at_level(logging.WARNING):
        new = translate(
            {
                "weights_summary": None,
                "checkpoint_callback": True,
                "progress_bar_refresh_rate": 0,
                "precision": 16,
                "amp_backend": "apex",
                "max_epochs": 2,
            }
        )
    assert new == {
        "enable_model_summary": False,
        "enable_checkpointing": True,
        "enable_progress_bar": False,
        "precision": "16-mixed",
        "max_epochs": 2,
    }
    assert "amp_backend=apex is gone" in caplog.text


def test_an_argument_that_never_was_is_an_error_with_its_path():
    with pytest.raises(ConfigError, match=r"lightning\.trainer\.max_step: .*Did you mean 'max_steps'"):
        translate({"max_step": 3})


@pytest.mark.parametrize(
    ("gpus", "expected", "count"),
    [("0,", [0], 1), ("0,1", [0, 1], 2), ("2", 2, 2), (3, 3, 3), ([1, 3], [1, 3], 2)],
)
def test_gpus_become_devices(monkeypatch, gpus, expected, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kwargs = translate({"gpus": gpus})
    assert kwargs["accelerator"] == "gpu" and kwargs["devices"] == expected
    assert ("strategy" in kwargs) is (count > 1)
    assert device_count(kwargs) == count


def test_the_comma_survives_the_command_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trainer_options(OmegaConf.create(), options("--gpus", "0,"))[0]["devices"] == [0]


def test_gpus_on_a_machine_without_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        translate({"gpus": "0,"})
    assert translate({"gpus": 0}) == {} and translate({"gpus": None}) == {}


def test_ddp_as_an_accelerator_becomes_a_strategy():
    assert translate({"accelerator": "ddp", "num_nodes": 2}) == {"strategy": "ddp", "num_nodes": 2}
    assert translate({"distributed_backend": "ddp"}) == {"strategy": "ddp"}
    assert translate({"accelerator": "cpu", "devices": 2}) == {"accelerator": "cpu", "devices": 2}
    assert device_count({"accelerator": "cpu", "devices": 2, "num_nodes": 3}) == 6


def test_automatic_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_bf16, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(arguments, "cpu_computes_bf16", lambda has=has_bf16: has)
        assert (
            trainer_options(OmegaConf.create({"precision": "auto"}), argparse.Namespace())[0]["precision"]
            == expected
        )


def test_help_lists_todays_trainer_arguments():
    text = get_parser().format_help()
    assert "--accumulate_grad_batches" in text and "--gpus" not in text
