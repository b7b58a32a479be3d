"""ImageNet (ILSVRC 2012) as it is distributed: its archives, and which index is which class."""

from __future__ import annotations

import logging
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from tqdm import tqdm

from taming.data.utils import download_url
from taming.util import atomic_path

logger = logging.getLogger(__name__)

N_CLASSES = 1000


def str_to_indices(string: str) -> list[int]:
    """`"30-32, 5"` → [5, 30, 31]: sorted, and ranges lack their end.

    Raises:
        ValueError: something that is neither a number nor a range.
    """
    indices: list[int] = []
    for part in string.split(","):
        first, _, end = part.strip().partition("-")
        try:
            indices += range(int(first), int(end)) if end else [int(first)]
        except ValueError as error:
            raise ValueError(
                f"{part.strip()!r} in {string!r} is no index and no range such as 30-32"
            ) from error
    return sorted(indices)


def give_synsets_from_indices(
    indices: Iterable[int], path_to_yaml: str | Path = "data/imagenet_idx_to_synset.yaml"
) -> list[str]:
    """Synsets (`n01440764`) of class indices, from a file `index: synset`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lacks an index.
    """
    if not Path(path_to_yaml).is_file():
        raise FileNotFoundError(
            f"there is no {path_to_yaml}; write a line `index: synset` for each class into it (0: n01440764, …: the "
            f"{N_CLASSES} synsets in sorted order)"
        )
    synsets = yaml.safe_load(Path(path_to_yaml).read_text(encoding="utf-8"))
    indices = list(indices)
    if absent := [index for index in indices if index not in synsets]:
        raise ValueError(f"{path_to_yaml} has {len(synsets)} classes and no index {absent[0]}")
    return [synsets[index] for index in indices]


def correct_index(synsets: set[str], path_to_yaml: str | Path) -> None:
    """Make a file `index: synset` say what class indices are by definition: ranks of the sorted synsets.

    The file once published beside the data set had other synsets for 71 of them. Without all 1000 synsets nothing
    is changed.
    """
    path = Path(path_to_yaml)
    if len(synsets) != N_CLASSES:
        return
    index = dict(enumerate(sorted(synsets)))
    if path.is_file():
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = found if isinstance(found, dict) else {}
        wrong = sum(found.get(i) != synset for i, synset in index.items())
        if not wrong:
            return
        logger.warning("%s was wrong for %d classes and is replaced.", path, wrong)
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(index), encoding="utf-8")


def fetch_checked(name: str, url: str, size: int, root: str | Path) -> Path:
    """Path of `root/name`, fetched unless a file of that many bytes is there.

    Raises:
        OSError: the address cannot be reached; the message says where the file may be put by hand.
        ValueError: it gave a file of another size.
    """
    path = Path(root) / name
    if not path.is_file() or path.stat().st_size != size:
        download_url(name, url, root)
        if (found := path.stat().st_size) != size:
            path.unlink()
            raise ValueError(
                f"{url} gave {found:,} bytes instead of the {size:,} of {name}; put that file at {path}"
            )
    return path


def unpack_classes(archive: Path, folder: Path) -> None:
    """Unpack the training archive, a tar of one tar a class, as `folder/<synset>/`; `folder` appears when complete.

    An interrupted run continues after the last complete class.

    Raises:
        ValueError: the archive is damaged; the message names it.
    """
    part = folder.with_name(folder.name + ".part")
    with _opened(archive) as outer:
        members = [member for member in outer.getmembers() if member.isfile()]
        for member in tqdm(members, desc=f"unpacking {archive.name}", unit="class"):
            target = part / Path(member.name).stem
            if target.is_dir():
                continue
            unfinished = target.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    inner.extractall(unfinished, filter="data")
            except tarfile.TarError as error:
                raise ValueError(
                    f"{member.name} in {archive} cannot be unpacked ({error}): fetch it again"
                ) from error
            unfinished.rename(target)
    part.rename(folder)


def unpack_sorted(archive: Path, folder: Path, synsets: Mapping[str, str]) -> None:
    """Unpack the validation archive as `folder/<synset>/<file>`; `folder` appears when complete.

    Raises:
        ValueError: the archive is damaged, or holds a file that `synsets` does not name.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with _opened(archive) as outer:
        members = [member for member in outer.getmembers() if member.isfile()]
        for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file"):
            name = Path(member.name).name
            if name not in synsets:
                raise ValueError(f"{archive} holds {name}, which validation_synset.txt gives no class")
            outer.extract(member.replace(name=f"{synsets[name]}/{name}"), part, filter="data")
    part.rename(folder)


def _opened(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive)
    except tarfile.ReadError as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}): fetch it again") from error
