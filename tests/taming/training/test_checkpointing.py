"""When `last.ckpt` is written, what is in it, and where it lies."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from taming.training.assembly import _last_checkpoint
from taming.training.checkpointing import LastCheckpoint
from taming.util import instantiate_from_config


class Trainer:
    """As much of a trainer as the callback looks at; notes at which step and how it is saved."""

    fast_dev_run, global_step, current_epoch = False, 0, 0

    def __init__(self):
        self.saved = []

    def save_checkpoint(self, path, weights_only=None):
        self.saved.append((path, self.global_step, weights_only))

    def steps(self):
        return [step for _, step, _ in self.saved]


def train(callback, epochs=3, batches=4, accumulate=1):
    trainer, seen = Trainer(), 0
    for trainer.current_epoch in range(epochs):
        for _ in range(batches):
            seen += 1
            trainer.global_step = seen // accumulate
            callback.on_train_batch_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    return trainer


@pytest.mark.parametrize(
    "rhythm, steps",
    [
        ({}, [4, 8, 12]),
        ({"every_n_epochs": 2}, [8, 12]),
        ({"every_n_train_steps": 5}, [5, 10, 12]),
        ({"every_n_train_steps": 5, "every_n_epochs": 0}, [5, 10, 12]),
        ({"every_n_epochs": 0}, [12]),
        ({"every_n_train_steps": 0}, [12]),
    ],
)
def test_saves_follow_the_rhythm_and_the_end_is_always_kept(rhythm, steps):
    assert train(LastCheckpoint("last.ckpt", **rhythm)).steps() == steps


def test_gathering_gradients_of_several_batches_saves_no_untrained_weights_and_each_step_once():
    callback = LastCheckpoint("last.ckpt", every_n_train_steps=2)
    assert train(callback, epochs=1, batches=16, accumulate=4).steps() == [2, 4]


def last_of(**params):
    section = {"save_last": True, "dirpath": "runs/checkpoints", **params}
    config = OmegaConf.create({"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": section})
    return _last_checkpoint(config, SimpleNamespace(ckptdir="logs/checkpoints")), config


def test_the_section_of_ranked_checkpoints_holds_for_the_last_one_too():
    section, ranked = last_of(save_weights_only=True, every_n_epochs=0)
    callback = instantiate_from_config(section)
    assert train(callback).saved == [("runs/checkpoints/last.ckpt", 12, True)]
    assert ranked.params.save_last is False  # Lightning does not write it a second time


def test_without_a_folder_of_its_own_it_lies_where_runs_are_resumed_from():
    section, _ = last_of(dirpath=None)
    assert train(instantiate_from_config(section)).saved[-1] == ("logs/checkpoints/last.ckpt", 12, False)


@pytest.mark.parametrize("params", [{"save_last": False}, {"train_time_interval": {"minutes": 5}}])
def test_who_asks_for_none_or_by_the_clock_is_left_to_lightning(params):
    assert last_of(**params)[0] is None
