"""Files of weights: which ones belong to a path, and their tensors one at a time."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from taming.checkpoint_pickles import CheckpointError, read_pickle

CHECKOUT = Path(__file__).resolve().parents[1]
WINDOW = 1 << 26  # bytes that are taken from a mapped file before its pages are given back

INDEX = ".index.json"
# what the folder of one network holds, of diffusers' or transformers' kind, the best first
FOLDER = tuple(
    f"{stem}{variant}{suffix}{index}"
    for suffix in (".safetensors", ".bin")
    for stem in ("diffusion_pytorch_model", "pytorch_model" if suffix == ".bin" else "model")
    for variant in ("", ".fp16")
    for index in ("", INDEX)
)


def in_checkout(path: str | os.PathLike[str]) -> Path:
    """A path; one that is not there from the working directory on, but is in the checkout, is taken there."""
    path, shipped = Path(path), CHECKOUT / path
    return shipped if shipped.exists() and not path.exists() else path


def locate(path: str | os.PathLike[str]) -> Path:
    """A file or folder of weights; a relative path is looked up in the working directory, then in the checkout.

    Raises:
        FileNotFoundError: no such file; neighbours are named.
    """
    path = in_checkout(path)
    found: Path | None = path if path.exists() else None
    if found is not None and found.is_dir():
        found = next((found / name for name in FOLDER if (found / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{path} is a folder without weights of one network; it would hold {', '.join(FOLDER[:4])} or the like"
            )
    if found is None:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        hint = f"{path.parent} {'holds: ' + ', '.join(sorted(beside)[:8]) if beside else 'does not exist or is empty'}."
        raise FileNotFoundError(f"There is no checkpoint {path}. {hint}")
    return found


def read_index(path: Path) -> dict[str, Path]:
    """The file of each weight, from the index of a checkpoint in several files (`….index.json`).

    Raises:
        CheckpointError: it is no index, or names files outside of its folder.
        FileNotFoundError: a file that it names is not there.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(names[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of weights: it has no weight_map ({error})") from error
    if outside := sorted({f for f in files.values() if Path(f).name != f}):
        raise CheckpointError(f"{path} is refused: it names {outside[0]!r}, which is not in its own folder")
    if missing := sorted({f for f in files.values() if not (path.parent / f).is_file()}):
        count = len(set(files.values()))
        raise FileNotFoundError(
            f"{path} names {count} files, and {len(missing)} are not there: {', '.join(missing[:4])}"
        )
    return {name: path.parent / file for name, file in files.items()}


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files that a checkpoint consists of: itself, or those that its index names, sorted."""
    path = locate(path)
    return sorted(set(read_index(path).values())) if path.name.endswith(INDEX) else [path]


def read_safetensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """`{"state_dict": …, "metadata": …}` of a safetensors file.

    Raises:
        CheckpointError: truncated, or of another kind.
    """
    with _readable(path), safe_open(path, framework="pt", device=device) as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - it is no dict
        return {"state_dict": tensors, "metadata": file.metadata() or {}}


class _readable:
    """Turns what goes wrong with a safetensors file into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError | OSError):
            raise CheckpointError(
                f"{self.path} ({self.path.stat().st_size:,} bytes) is not a readable safetensors file: {error}"
            ) from error


def tensors_of(loaded: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint that was read from `path`, with those of adapters that were trained on top.

    Raises:
        CheckpointError: there are none.
    """
    state = loaded.get("state_dict", loaded)
    if state is not loaded and isinstance(state, Mapping):
        state = {**state, **loaded.get("adapters", {})}
    tensors = (
        {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its entries are {sorted(map(str, loaded))[:8]}")
    return tensors


class Weights(Mapping[str, Tensor]):
    """The weights of a checkpoint, read from its files one by one, when they are asked for.

    A tensor may lie in the file's mapped pages; who keeps it makes a copy. Names are in the order of the files.

    Args:
        path: a checkpoint of any kind that `taming.checkpoint.load_checkpoint` reads.

    Attributes:
        shapes: of all tensors.
        metadata: of safetensors files, or what else a pickle holds beside the weights.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = locate(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, Any] = {}
        self._files: dict[str, _File] = {}
        places = read_index(self.path) if self.path.name.endswith(INDEX) else None
        for one in [self.path] if places is None else sorted(set(places.values())):
            file = _File(one)
            wanted = {n for n, place in places.items() if place == one} if places else file.shapes.keys()
            if lost := sorted(wanted - file.shapes.keys()):
                raise CheckpointError(f"{one} lacks {lost[0]!r}, which {self.path.name} says it holds")
            self.metadata |= file.metadata
            for name, shape in file.shapes.items():
                if name in wanted:
                    self.shapes[name], self._files[name] = shape, file

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _File:
    """One file, opened anew after every `WINDOW` bytes, since a mapped page counts as memory until the file is let go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, Any] = {}
        self._get: Callable[[str], Tensor] | None = None
        self._taken = 0
        # torch's format before archives cannot be mapped: opening it again reads all of it again
        mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        self._window = WINDOW if mapped else math.inf
        self._open()

    def _open(self) -> Callable[[str], Tensor]:
        if self.path.suffix == ".safetensors":
            with _readable(self.path):
                file = safe_open(self.path, framework="pt").__enter__()
                if not self.shapes:
                    names = file.offset_keys()
                    self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in names}
                    self.metadata = file.metadata() or {}
                self._get = file.get_tensor
        else:
            loaded = read_pickle(self.path, mapped=True, check=not self.shapes)
            tensors = tensors_of(loaded if isinstance(loaded, Mapping) else {}, self.path)
            self.shapes = {k: tuple(v.shape) for k, v in tensors.items()}
            self.metadata = {str(k): v for k, v in loaded.items() if isinstance(v, int | float | str)}
            self._get = tensors.__getitem__
        return self._get

    def read(self, name: str) -> Tensor:
        if self._taken > self._window:
            self._get, self._taken = None, 0
        get = self._get or self._open()
        with _readable(self.path):
            tensor = get(name)
        self._taken += tensor.nbytes
        return tensor
