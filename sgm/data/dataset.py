"""Pictures with texts and meta data out of tar shards (webdataset), in the configuration format of the unpublished `sdata`."""

from __future__ import annotations

import io
import itertools
import json
import logging
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from sgm.data.mappers import STORED_SIZE, Sample, collate, from_config
from taming.data.images import BrokenImageError, open_rgb
from taming.util import check_parameters

logger = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tiff", "ppm", "jp2")
SPLITS = ("train", "validation", "test")
PARTS = ("datapipeline", "loader")


def _pictures(sample: Sample) -> Sample:
    for key in [k for k in sample if k.rpartition(".")[2].lower() in PICTURES]:
        try:
            sample[key] = open_rgb(io.BytesIO(sample[key]))
        except BrokenImageError as error:
            name = f"{sample.get('__url__', '')}: {sample.get('__key__', '')}.{key}"
            raise BrokenImageError(f"{name} cannot be read as an image", name) from error
        sample.setdefault(STORED_SIZE, (sample[key].height, sample[key].width))
    return sample


# by name, as configurations have them: each takes a sample of bytes
DECODERS: dict[str, Callable[[Sample], Sample]] = {"pil": _pictures}
PLAIN: dict[str, Callable[[bytes], Any]] = {
    "txt": bytes.decode, "text": bytes.decode, "caption": bytes.decode, "json": json.loads, "cls": int,
}  # fmt: skip


def _plain(sample: Sample) -> Sample:
    for key, value in sample.items():
        read = PLAIN.get(key.rpartition(".")[2].lower())
        if read is not None and isinstance(value, bytes):
            sample[key] = read(value)
    return sample


def shards(urls: str | Sequence[str]) -> list[str]:
    """Every shard that is meant: of a folder all .tar in it and below, and of braces, {000..127}, each.

    Raises:
        FileNotFoundError: a local path that does not exist, or a folder without shards.
        ImportError: webdataset is not installed.
    """
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        if "://" in url or url.startswith("pipe:"):
            found += _webdataset().shardlists.expand_urls(url)
        elif Path(url).is_dir():
            inside = sorted(map(str, Path(url).rglob("*.tar")))
            if not inside:
                raise FileNotFoundError(
                    f"the folder {url} holds no .tar; shards are tar files of pictures, texts, …"
                )
            found += inside
        else:
            named = _webdataset().shardlists.expand_urls(url)
            if missing := [n for n in named if not Path(n).is_file()]:
                raise FileNotFoundError(
                    f"there is no shard {missing[0]}; datapipeline.urls names .tar files or a folder of them"
                )
            found += named
    return found


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "tar shards are read with webdataset: python -m pip install 'latent-generative-models[webdataset]'"
        ) from error
    return webdataset


def _shuffled(items: Iterable[Any], size: int) -> Iterator[Any]:
    """Items in random order, as far as a buffer of so many allows; torch's seed decides, and each epoch differs."""
    rng = random.Random(int(torch.randint(2**62, ())))
    buffer: list[Any] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= max(size, 1):
            yield buffer.pop(rng.randrange(len(buffer)))
    rng.shuffle(buffer)
    yield from buffer


def _skip(error: Exception) -> bool:
    """What webdataset does about an error: it goes on past a broken shard or picture, and stops at anything else."""
    if not isinstance(error, BrokenImageError | tarfile.TarError | EOFError):
        raise error
    logger.warning("Left out: %s", error)
    return True


class ShardDataset(IterableDataset):
    """Samples of tar shards: files of one name in a shard are one sample, with its endings as keys.

    Pictures are read as RGB, txt as texts, json as dicts, cls as numbers. Processes and loader workers share the shards among
    them. A broken picture or shard is left out, with a warning.

    Args:
        urls: shards or folders, see `shards`.
        pipeline_config: shardshuffle and sample_shuffle: sizes of the buffers that shuffle shards and samples; None, the
            default, keeps their order.
        decoders: "pil" is known; without it pictures stay bytes.
        preprocessors, postprocessors: configurations of functions from sample to sample, before and after decoding.
        single: give the first sample for ever, to measure all but the reading.

    Raises:
        FileNotFoundError: see `shards`.
        ImportError: webdataset is not installed.
        ConfigError: an unknown option.
        ValueError: unknown decoder.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        pipeline_config: Mapping[str, Any] | None = None,
        decoders: str | Sequence[str] | None = ("pil",),
        preprocessors: Sequence[Any] | None = None,
        postprocessors: Sequence[Any] | None = None,
        single: bool = False,
    ) -> None:
        super().__init__()
        names = [decoders] if isinstance(decoders, str) else list(decoders or ())
        if unknown := set(names) - set(DECODERS):
            raise ValueError(f"decoders: {sorted(unknown)} are unknown; choose among {sorted(DECODERS)}")
        check_parameters(self._order, pipeline_config or {}, "datapipeline.pipeline_config")
        self._order(**(pipeline_config or {}))
        self.urls, self.single = shards(urls), single
        self.mappers = [
            *map(from_config, preprocessors or ()), *(DECODERS[n] for n in names), _plain, *map(from_config, postprocessors or ()),
        ]  # fmt: skip
        _webdataset()

    def _order(self, shardshuffle: int | None = None, sample_shuffle: int | None = None) -> None:
        self.shardshuffle, self.sample_shuffle = shardshuffle, sample_shuffle

    def __iter__(self) -> Iterator[dict[str, Any]]:
        wds = _webdataset()
        stages: list[Any] = [wds.SimpleShardList(self.urls)]
        if self.shardshuffle:
            stages.append(partial(_shuffled, size=self.shardshuffle))
        stages += [wds.split_by_node, wds.split_by_worker, wds.tarfile_to_samples(handler=_skip)]
        if self.sample_shuffle:
            stages.append(partial(_shuffled, size=self.sample_shuffle))
        stages += [wds.map(mapper, handler=_skip) for mapper in self.mappers]
        samples = iter(wds.DataPipeline(*stages))
        return itertools.repeat(next(samples)) if self.single else samples


class StableDataModuleFromConfig(pl.LightningDataModule):
    """Loaders over tar shards, from a configuration.

    Args:
        train, validation, test: of each `datapipeline`, the arguments of `ShardDataset`, and `loader`, those of torch's
            `DataLoader`.
        skip_val_loader: no validation; otherwise it is done on `train` where no `validation` is given.
        dummy: give the first sample for ever, to measure all but the reading.

    Raises:
        AssertionError: a part of a split is missing (the published error class).
        FileNotFoundError, ImportError, ValueError: see `ShardDataset`.
    """

    def __init__(
        self,
        train: Mapping[str, Any],
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        skip_val_loader: bool = False,
        dummy: bool = False,
    ) -> None:
        super().__init__()
        validation = None if skip_val_loader else train if validation is None else validation
        given = zip(SPLITS, (train, validation, test), strict=True)
        self.configs = {name: config for name, config in given if config is not None}
        for name, config in self.configs.items():
            if missing := [part for part in PARTS if part not in config]:
                raise AssertionError(
                    f"data.params.{name} needs `datapipeline` and `loader`; {missing} is missing"
                )
        self.skip_val_loader, self.dummy = skip_val_loader, dummy
        self.datasets: dict[str, ShardDataset] = {}
        # Lightning asks for exactly the loaders that exist
        for name, hook in zip(SPLITS, ("train", "val", "test"), strict=True):
            if name in self.configs:
                setattr(self, f"{hook}_dataloader", partial(self._loader, name))

    def setup(self, stage: str | None = None) -> None:
        """Find the shards."""
        for name, config in self.configs.items():
            if name not in self.datasets:
                self.datasets[name] = ShardDataset(**config["datapipeline"], single=self.dummy)

    def _loader(self, name: str) -> DataLoader:
        self.setup()
        return DataLoader(self.datasets[name], collate_fn=collate, **self.configs[name]["loader"])
