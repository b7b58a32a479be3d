"""Tar shards of pictures, texts and meta data, in the published configuration format."""

import io
import json
import logging
import sys
import tarfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from sgm.data import StableDataModuleFromConfig
from sgm.data.dataset import ShardDataset
from sgm.data.mappers import AddOriginalImageSizeAsTupleAndCropToSquare, Rescaler, collate
from taming.util import ConfigError, instantiate_from_config

# as configs/example_training/imagenet-f8_cond.yaml has it, at another size
POSTPROCESSORS = [
    {
        "target": "sdata.mappers.TorchVisionImageTransforms",
        "params": {
            "key": "jpg",
            "transforms": [
                {"target": "torchvision.transforms.Resize", "params": {"size": 8, "interpolation": 3}},
                {"target": "torchvision.transforms.ToTensor"},
            ],
        },
    },
    {"target": "sdata.mappers.Rescaler"},
    {
        "target": "sdata.mappers.AddOriginalImageSizeAsTupleAndCropToSquare",
        "params": {"h_key": "height", "w_key": "width"},
    },
]


def write_shard(path, names, broken=(), data=True):
    with tarfile.open(path, "w") as tar:
        for n, name in enumerate(names):
            picture = io.BytesIO()
            Image.fromarray(np.full((16, 20, 3), 10 * n, np.uint8)).save(picture, "PNG")
            files = {
                "jpg": b"no picture" if name in broken else picture.getvalue(),
                "txt": f"a {name}".encode(),
                "cls": str(n).encode(),
            }
            if data:
                files["json"] = json.dumps({"height": 160, "width": 200 + n}).encode()
            for ending, content in files.items():
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    write_shard(tmp_path / "0.tar", "abc")
    write_shard(tmp_path / "below" / "1.tar", "de")
    return tmp_path


def pipeline(folder, **options):
    return {"urls": [str(folder)], "decoders": ["pil"], "postprocessors": POSTPROCESSORS, **options}


def texts(dataset):
    return [sample["txt"] for sample in dataset]


def test_the_published_section_becomes_batches(folder):
    config = OmegaConf.create(
        {
            "target": "sgm.data.dataset.StableDataModuleFromConfig",
            "params": {
                "train": {
                    "datapipeline": pipeline(
                        folder, pipeline_config={"shardshuffle": 10000, "sample_shuffle": 10000}
                    ),
                    "loader": {"batch_size": 5, "num_workers": 0},
                }
            },
        }
    )
    (batch,) = list(instantiate_from_config(config).train_dataloader())
    assert batch["jpg"].shape == (5, 3, 8, 8) and batch["jpg"].dtype == torch.float32
    assert sorted(batch["txt"]) == ["a a", "a b", "a c", "a d", "a e"]
    order = [batch["txt"].index(f"a {name}") for name in "abcde"]
    assert batch["cls"][order].tolist() == [0, 1, 2, 0, 1]
    assert batch["original_size_as_tuple"][order].tolist() == [
        [160, 200],
        [160, 201],
        [160, 202],
        [160, 200],
        [160, 201],
    ]
    # 10 n of 255, from 0..1 to -1..1
    assert batch["jpg"][order].amax((1, 2, 3)).tolist() == pytest.approx(
        [20 * n / 255 - 1 for n in (0, 1, 2, 0, 1)], abs=1e-5
    )
    assert (batch["crop_coords_top_left"][:, 0] == 0).all() and (
        batch["crop_coords_top_left"][:, 1] <= 2
    ).all()


def test_validation_is_done_on_the_training_data_unless_it_is_skipped_or_given(folder):
    train = {"datapipeline": pipeline(folder), "loader": {"batch_size": 2}}
    other = {"datapipeline": {**pipeline(folder), "urls": str(folder / "0.tar")}, "loader": {"batch_size": 2}}
    both = StableDataModuleFromConfig(train)
    assert len(list(both.val_dataloader())) == 3
    assert len(list(StableDataModuleFromConfig(train, validation=other).val_dataloader())) == 2
    skipped = StableDataModuleFromConfig(train, skip_val_loader=True)
    skipped.setup()
    assert set(skipped.datasets) == {"train"}
    with pytest.raises(AssertionError, match="validation needs `datapipeline` and `loader`"):
        StableDataModuleFromConfig(train, validation={"loader": {}})


def test_a_dummy_gives_the_first_sample_for_ever(folder):
    module = StableDataModuleFromConfig(
        {"datapipeline": pipeline(folder), "loader": {"batch_size": 8}}, dummy=True
    )
    assert next(iter(module.train_dataloader()))["txt"] == ["a a"] * 8


def test_orders_follow_the_seed_and_differ_between_epochs(folder):
    write_shard(folder / "2.tar", "fghijklmnop")
    dataset = ShardDataset(str(folder), {"shardshuffle": 9, "sample_shuffle": 9})
    torch.manual_seed(3)
    first, second = texts(dataset), texts(dataset)
    torch.manual_seed(3)
    assert texts(dataset) == first != second and sorted(first) == sorted(second)
    assert texts(ShardDataset(str(folder)))[:3] == ["a a", "a b", "a c"]


def test_loader_processes_share_the_shards(folder):
    config = {"datapipeline": pipeline(folder), "loader": {"batch_size": 1, "num_workers": 2}}
    seen = [batch["txt"][0] for batch in StableDataModuleFromConfig(config).train_dataloader()]
    assert sorted(seen) == ["a a", "a b", "a c", "a d", "a e"]


def test_a_broken_picture_is_left_out_and_named(tmp_path, caplog):
    write_shard(tmp_path / "0.tar", "abc", broken="b")
    with caplog.at_level(logging.WARNING):
        assert texts(ShardDataset(**pipeline(tmp_path))) == ["a a", "a c"]
    assert "b.jpg" in caplog.text and "0.tar" in caplog.text


def test_a_mistake_in_the_configuration_ends_the_run(folder):
    wrong = [{"target": "sdata.mappers.Rescaler", "params": {"key": "png"}}]
    with pytest.raises(KeyError, match="png"):
        next(iter(ShardDataset(str(folder), postprocessors=wrong)))
    with pytest.raises(TypeError, match="ToTensor"):
        next(iter(ShardDataset(str(folder), postprocessors=[{"target": "sdata.mappers.Rescaler"}])))
    with pytest.raises(ConfigError, match="sample_shuffle"):
        ShardDataset(str(folder), pipeline_config={"sample_shufle": 5})
    with pytest.raises(ValueError, match="decoders"):
        ShardDataset(str(folder), decoders=["pill"])


def test_shards_that_are_not_there_are_named_and_braces_stand_for_many(folder):
    (folder / "empty").mkdir()
    assert texts(ShardDataset(str(folder / "{0..0}.tar"))) == ["a a", "a b", "a c"]
    for url, message in (
        ("DATA_PATH", "there is no shard DATA_PATH"),
        (str(folder / "empty"), "holds no .tar"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            ShardDataset(url)


def test_a_missing_library_is_named_with_its_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"pip install 'latent-generative-models\[webdataset\]'"):
        ShardDataset(str(folder / "0.tar"))


def test_a_truncated_shard_is_left_out(folder, caplog):
    (folder / "2.tar").write_bytes((folder / "0.tar").read_bytes()[: 4 * 1024 + 700])  # in the second sample
    with caplog.at_level(logging.WARNING):
        found = [sample["txt"] for sample in ShardDataset(str(folder)) if "txt" in sample]
    assert sorted(found) == ["a a", "a a", "a b", "a c", "a d", "a e"]
    assert "2.tar" in caplog.text


def test_without_meta_data_the_size_is_that_of_the_stored_picture(tmp_path):
    write_shard(tmp_path / "0.tar", "a", data=False)
    (sample,) = ShardDataset(**pipeline(tmp_path))
    assert sample["original_size_as_tuple"].tolist() == [16, 20]


def test_the_square_is_where_it_is_said_to_be():
    x = torch.arange(3 * 4 * 9).reshape(3, 4, 9)
    torch.manual_seed(0)
    crop = AddOriginalImageSizeAsTupleAndCropToSquare("h", "w", use_data_key=False)
    for _ in range(5):
        sample = crop({"jpg": x, "h": 40, "w": 90})
        top, left = sample["crop_coords_top_left"].tolist()
        assert torch.equal(sample["jpg"], x[:, top : top + 4, left : left + 4]) and top == 0
        assert sample["original_size_as_tuple"].tolist() == [40, 90]
    middle = AddOriginalImageSizeAsTupleAndCropToSquare(random_crop=False)
    assert middle({"jpg": x, "json": {"original_height": 1, "original_width": 2}})[
        "crop_coords_top_left"
    ].tolist() == [0, 2]
    with pytest.raises(KeyError, match="__size__"):
        crop({"jpg": x})


def test_whole_numbers_are_rescaled_from_255():
    assert Rescaler(isfloat=False)({"jpg": torch.tensor([0, 255])})["jpg"].tolist() == [-1.0, 1.0]
    assert Rescaler(strict=False)({"a": 1}) == {"a": 1}


def test_batches_hold_what_all_samples_have():
    made = collate([{"a": 1, "t": "x", "__key__": "k", "only": 1}, {"a": 2, "t": "y", "__key__": "l"}])
    assert made["a"].tolist() == [1, 2] and made["t"] == ["x", "y"] and set(made) == {"a", "t"}
    with pytest.raises(ValueError, match="'a'"):
        collate([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}])
