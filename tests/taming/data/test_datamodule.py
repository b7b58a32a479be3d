import sys

import numpy as np
import pytest
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import IterableDataset

from taming.data.datamodule import DataModuleFromConfig, WrappedDataset


class Numbers:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


class Shards(IterableDataset):
    def __init__(self):
        self.valid_ids = list(range(8))
        self.num_records = 8
        self.sample_ids = self.valid_ids

    def __iter__(self):
        return iter(self.sample_ids)


class Draws(Numbers):
    def __getitem__(self, i):
        return np.random.randint(1 << 30)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "cases_of_datamodule", sys.modules[__name__])


def config(name, **params):
    return {"target": f"cases_of_datamodule.{name}", "params": params}


def test_only_named_splits_have_loaders_and_training_data_is_shuffled():
    data = DataModuleFromConfig(
        batch_size=4, train=config("Numbers", n=32), validation=config("Numbers", n=8), num_workers=0
    )
    data.prepare_data()
    data.setup()
    assert is_overridden("train_dataloader", data) and is_overridden("val_dataloader", data)
    assert not is_overridden("test_dataloader", data) and not is_overridden("predict_dataloader", data)
    assert [b.tolist() for b in data.val_dataloader()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    seen = [i for b in data.train_dataloader() for i in b.tolist()]
    assert sorted(seen) == list(range(32)) != seen


def test_sets_are_built_once():
    data = DataModuleFromConfig(batch_size=2, train=config("Numbers", n=4), num_workers=0)
    data.prepare_data()
    built = data.datasets["train"]
    data.setup("fit")
    assert data.datasets["train"] is built


def test_wrapping_and_default_workers():
    data = DataModuleFromConfig(batch_size=3, train=config("Numbers", n=5), wrap=True)
    assert data.num_workers == 6  # the published default, though no more processes run than there are cores
    data.setup()
    assert isinstance(data.datasets["train"], WrappedDataset) and len(data.datasets["train"]) == 5


def test_iterable_data_is_shared_out_among_workers_in_contiguous_parts():
    data = DataModuleFromConfig(batch_size=4, train=config("Shards"), num_workers=2)
    data.setup()
    assert sorted(b.tolist() for b in data.train_dataloader()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_workers_draw_different_numpy_numbers_when_asked():
    data = DataModuleFromConfig(
        batch_size=2, train=config("Draws", n=8), num_workers=2, use_worker_init_fn=True
    )
    data.setup()
    drawn = [i for b in data.train_dataloader() for i in b.tolist()]
    assert len(set(drawn)) == 8
