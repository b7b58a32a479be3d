"""MNIST and CIFAR-10 from local files, and digits that come with a package."""

import pickle
import struct

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sgm.data.cifar10 import CIFAR10DataDictWrapper, CIFAR10Loader
from sgm.data.digits import Digits, load_digits
from sgm.data.mnist import MNISTDataDictWrapper, MNISTLoader
from taming.util import instantiate_from_config


def write_mnist(root, counts=(5, 3)):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in zip(("train", "t10k"), counts, strict=True):
        rng = np.random.RandomState(n)
        pixels, labels = rng.randint(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())


def test_digits_are_pictures_from_minus_one_to_one_with_their_labels(tmp_path):
    write_mnist(tmp_path)
    loader = MNISTLoader(batch_size=4, shuffle=False, root=str(tmp_path))
    first, second = list(loader.train_dataloader())
    stored = np.random.RandomState(5).randint(0, 256, (5, 28, 28), np.uint8)
    assert np.allclose(first["jpg"][:, 0].numpy(), stored[:4] / 127.5 - 1, atol=1e-6)
    assert first["cls"].tolist() == [0, 1, 2, 3] and len(second["cls"]) == 1
    assert (
        [len(b["cls"]) for b in loader.val_dataloader()]
        == [3]
        == [len(b["cls"]) for b in loader.test_dataloader()]
    )


def test_the_published_configuration_takes_local_files(tmp_path, monkeypatch):
    """Its one loader process has a prefetch factor, none has none: torch refuses a factor without processes."""
    write_mnist(tmp_path / ".data")
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(
        {"target": "sgm.data.mnist.MNISTLoader", "params": {"batch_size": 2, "num_workers": 0}}
    )
    loader = instantiate_from_config(config)
    loader.prepare_data()
    loader.setup()  # main.py names no stage
    assert loader.train_dataloader().prefetch_factor is None
    assert next(iter(loader.train_dataloader()))["jpg"].shape == (2, 1, 28, 28)


def test_photographs_come_in_three_channels(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3072), np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # sums of the real files
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    loader = CIFAR10Loader(batch_size=4, shuffle=False, root=str(tmp_path))
    batch = next(iter(loader.train_dataloader()))
    assert batch["jpg"].shape == (4, 3, 32, 32) and batch["cls"].tolist() == [3, 9, 3, 9]
    assert np.allclose(batch["jpg"][0].numpy(), pixels[0].reshape(3, 32, 32) / 127.5 - 1, atol=1e-6)
    assert len(loader.train_dataset) == 10 and len(loader.test_dataset) == 2


@pytest.mark.parametrize(
    ("kind", "file"), [(MNISTLoader, "train-labels-idx1-ubyte.gz"), (CIFAR10Loader, "cifar-10-python")]
)
def test_files_that_are_not_there_are_named(tmp_path, kind, file):
    with pytest.raises(FileNotFoundError, match=file) as error:
        kind(batch_size=2, root=str(tmp_path), download=False)
    assert str(tmp_path) in str(error.value)


def test_a_download_that_fails_says_where_to_put_the_files(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(MNIST, "download", no_network)
    with pytest.raises(FileNotFoundError, match=r"no network.*MNIST/raw/t10k-images"):
        MNISTLoader(batch_size=2, root=str(tmp_path))


def test_pairs_become_dictionaries():
    for wrapper in (MNISTDataDictWrapper, CIFAR10DataDictWrapper):
        assert wrapper([(1, 2), (3, 4)])[1] == {"jpg": 3, "cls": 4} and len(wrapper([(1, 2)])) == 1


# ------------------------------------------------------------------------------------------------- packaged digits


def test_packaged_digits_are_five_hundred_of_each():
    pictures, labels = load_digits()
    assert pictures.shape == (5000, 1, 28, 28) and labels.bincount().tolist() == [500] * 10
    assert float(pictures.min()) == -1.0 and float(pictures.max()) == 1.0
    # a one is a narrow stroke, a zero a ring: ink per picture, as in all of MNIST
    ink = torch.stack([(pictures[labels == n] + 1).mean() / 2 for n in range(10)])
    assert int(ink.argmin()) == 1 and int(ink.argmax()) == 0


def test_splits_of_the_digits_share_no_picture_and_are_balanced():
    train, held = Digits(size=8, repeats=2), Digits(size=8, split="validation")
    assert len(train) == 9000 and len(held) == 500 and held.labels.bincount().tolist() == [50] * 10
    assert torch.equal(train[0]["jpg"], train[4500]["jpg"]) and train[0]["jpg"].shape == (1, 8, 8)
    with pytest.raises(IndexError):
        train[9000]


def test_smaller_digits_keep_their_mean():
    small, large = load_digits(14)[0], load_digits()[0]
    assert float(small.mean()) == pytest.approx(float(large.mean()), abs=2e-3)


def test_wrong_sizes_splits_and_a_missing_package_are_explained(monkeypatch):
    with pytest.raises(ValueError, match="size=0"):
        Digits(size=0)
    with pytest.raises(ValueError, match="split='test'"):
        Digits(split="test")
    monkeypatch.setattr(
        "sgm.data.digits.resources.files", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name))
    )
    with pytest.raises(ImportError, match="pip install"):
        load_digits()
