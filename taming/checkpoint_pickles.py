"""Pickled checkpoints, read without running what they contain.

A pickle (`.ckpt`, `.pt`, `.pth`, `.bin`) goes through `torch.load(weights_only=True)`, with inert stand-ins for the harmless
classes that old trainers left inside (callback classes, configuration objects). A pickle that names anything else is
refused, and an archive whose checksums are wrong, too.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Modules whose classes published training checkpoints are known to mention. Nothing of them is imported or called:
# each name becomes an empty class, so that the tensors around it can be read.
INERT_MODULES = (
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "test_tube", "omegaconf", "antlr4",
    "main", "__main__", "taming", "ldm", "sgm", "argparse", "pathlib", "typing", "collections", "enum", "_codecs",
)  # fmt: skip
# plain types, which configuration objects mention by name
INERT_BUILTINS = {
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "object",
    "range",
    "set",
    "slice",
    "str",
    "tuple",
}
# numpy scalars and arrays are data: these four are enough to rebuild them
NUMPY_NAMES = ("scalar", "_reconstruct", "dtype", "ndarray")


class CheckpointError(ValueError):
    """A file that is no readable checkpoint, or whose weights do not fit; the message says which and why."""


class Inert:
    """Stands for any class that a checkpoint mentions and that reading weights does not need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stands for dict types such as `collections.defaultdict`: makes a plain dict of the same entries."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        """An empty dict, for the unpickler to fill."""
        return {}


def read_pickle(
    path: Path, map_location: str | torch.device = "cpu", mapped: bool = False, check: bool = True
) -> Any:
    """What a pickle of torch holds.

    Args:
        path: the file.
        map_location: where its tensors go.
        mapped: leave the tensors in the file, from where they come when they are touched; files of torch's older
            format are read at once all the same.
        check: compare an archive with its checksums.

    Raises:
        CheckpointError: truncated, damaged, not of torch, or it names something that would run code.
    """
    archive = zipfile.is_zipfile(path)
    try:
        if archive and check:
            _check_sums(path)
        stand_ins = _stand_ins(_unsafe_globals(path, archive), path)
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped and archive)
    except CheckpointError:
        raise
    except Exception as error:  # torch has a dozen exceptions for a damaged archive
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise refusal(path, named[1]) from error
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: truncated, damaged or of another "
            f"kind ({type(error).__name__}: {first[:160]})"
        ) from error


def refusal(path: Path, name: str) -> CheckpointError:
    """The error for a pickle that would call something."""
    return CheckpointError(
        f"{path} is refused: its pickle wants to call {name!r}, which weights do not need and which could run "
        "code on this machine. If you trust its author, ask for a .safetensors file."
    )


def _check_sums(path: Path) -> None:
    """Compare an archive with its checksums, which torch does not.

    Raises:
        CheckpointError: an entry differs.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zlib.error, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            damaged = str(error)
    if damaged:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: it is damaged ({damaged} differs from its "
            "checksum). Copy or fetch it again."
        )


def _unsafe_globals(path: Path, archive: bool) -> set[str]:
    """The dotted names in a checkpoint's pickles that torch would refuse."""
    if archive:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # torch's older format: several pickles in a row, then raw storages
    names: set[str] = set()
    with open(path, "rb") as file:
        try:
            for _ in range(5):
                for opcode, argument, _position in pickletools.genops(file):
                    if opcode.name in ("GLOBAL", "INST"):
                        names.add(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL":
                        raise CheckpointError(
                            f"{path} is a pickle of a newer protocol than torch.save writes; refused"
                        )
        except (ValueError, pickle.UnpicklingError, EOFError):
            pass  # the storages begin, or the file ends: torch.load will say if something is wrong
    return {n for n in names if not n.startswith(("torch.", "collections.OrderedDict"))}


def _stand_ins(names: Iterable[str], path: Path) -> list[Any]:
    allowed: list[Any] = []
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        top = module.split(".")[0]
        if name == "collections.defaultdict":
            allowed.append((InertDict, name))
        elif top == "numpy" and (attribute in NUMPY_NAMES or module == "numpy.dtypes"):
            allowed.append((_numpy_object(module, attribute), name))
            allowed += [
                getattr(np.dtypes, n) for n in dir(np.dtypes) if n.endswith("DType") and n != "ObjectDType"
            ]
        elif top in INERT_MODULES or (module == "builtins" and attribute in INERT_BUILTINS):
            allowed.append((type(attribute, (Inert,), {}), name))
        else:
            raise refusal(path, name)
    return allowed


def _numpy_object(module: str, attribute: str) -> Any:
    if module == "numpy.dtypes":
        return getattr(np.dtypes, attribute)
    if attribute in ("dtype", "ndarray"):
        return getattr(np, attribute)
    from numpy._core import multiarray  # numpy 1 files say numpy.core; the object is the same

    return getattr(multiarray, attribute)
