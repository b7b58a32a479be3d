"""Data loaders from a configuration, as every training YAML describes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from taming.data.utils import custom_collate
from taming.util import instantiate_from_config

# Lightning's name for each split's loader
HOOKS = {
    "train": "train_dataloader",
    "validation": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class WrappedDataset(Dataset):
    """Anything with a length and items, as a torch dataset."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Any:
        return self.data[idx]


def worker_init_fn(_: int) -> None:
    """Give each worker its own numpy seed, and its own contiguous share of an iterable data set's `valid_ids`."""
    info = get_worker_info()
    assert info is not None
    state: Any = np.random.get_state()
    seed = int(state[1][0]) + info.id
    dataset: Any = info.dataset
    if hasattr(dataset, "valid_ids"):
        share = dataset.num_records // info.num_workers
        dataset.sample_ids = dataset.valid_ids[info.id * share : (info.id + 1) * share]
    np.random.seed(seed % 2**32)


class DataModuleFromConfig(pl.LightningDataModule):
    """One loader for each data set that the configuration names.

    Args:
        batch_size: of every loader.
        train, validation, test, predict: configurations of the data sets; a split that is None gets no loader.
        wrap: put each data set into `WrappedDataset`.
        num_workers: loader processes; if None, twice the batch size (the published default), though never more than
            the machine has cores.
        shuffle_test_loader, shuffle_val_dataloader: shuffle those splits, too. Training data is always shuffled,
            unless it is iterable.
        use_worker_init_fn: see `worker_init_fn`; iterable data with `valid_ids` always gets it.
    """

    collate: Callable[..., Any] = staticmethod(custom_collate)  # what makes a batch of items

    def __init__(
        self,
        batch_size: int,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = batch_size * 2 if num_workers is None else num_workers
        self._processes = (
            self.num_workers if num_workers is not None else min(self.num_workers, os.cpu_count() or 1)
        )
        self.use_worker_init_fn = use_worker_init_fn
        self.wrap = wrap
        splits = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in splits.items() if config is not None}
        self.datasets: dict[str, Any] = {}
        # Lightning asks for exactly the loaders that exist, so absent splits must not define them
        shuffled = {
            "train": True,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        for split, hook in HOOKS.items():
            if split in self.dataset_configs:
                setattr(self, hook, partial(self._loader, split, shuffle=shuffled[split]))

    def prepare_data(self) -> None:
        """Build every data set once, so that those which download or unpack do so in one process."""
        if not self.datasets:
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, into `datasets`."""
        if self.datasets:
            return
        self.datasets = {
            name: instantiate_from_config(config) for name, config in self.dataset_configs.items()
        }
        if self.wrap:
            self.datasets = {name: WrappedDataset(dataset) for name, dataset in self.datasets.items()}

    def _loader(self, split: str, shuffle: bool) -> DataLoader:
        dataset = self.datasets[split]
        iterable = isinstance(dataset, IterableDataset)
        own_seeds = self.use_worker_init_fn or (iterable and hasattr(dataset, "valid_ids"))
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self._processes,
            collate_fn=self.collate,
            shuffle=shuffle and not iterable,
            worker_init_fn=worker_init_fn if own_seeds else None,
            persistent_workers=self._processes > 0,
            pin_memory=torch.cuda.is_available(),
        )
