"""Checkpoints, read safely and written whole: the one place of the library that opens weight files.

Files from strangers are untrusted. `.safetensors` cannot carry code; a pickle (`.ckpt`, `.pt`, `.pth`, `.bin`) goes
through `torch.load(weights_only=True)`, with inert stand-ins for the harmless classes that old trainers left inside
(callback classes, configuration objects). A pickle that names anything else is refused.
"""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taming.util import atomic_path, instantiate_from_config, nearest

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]

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


# ------------------------------------------------------------------------------------------------------------ reading


def load_data(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> Any:
    """Read whatever a file of weights or other tensors holds, without running any code in it.

    Args:
        path: `.safetensors`, or a pickle written by torch or by Lightning 1 or 2; a relative path is looked up in the
            working directory, then in the checkout that holds this package.
        map_location: where the tensors go.

    Returns:
        What was saved. A safetensors file comes as `{"state_dict": …, "metadata": …}`.

    Raises:
        FileNotFoundError: no such file; neighbours with a similar name are suggested.
        CheckpointError: truncated, not a checkpoint, or it names something that would run code.
    """
    path = Path(path)
    if not path.is_file() and (CHECKOUT / path).is_file():
        path = CHECKOUT / path
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        hint = f"{path.parent} {'holds: ' + ', '.join(sorted(beside)[:8]) if beside else 'does not exist or is empty'}."
        raise FileNotFoundError(f"There is no checkpoint {path}. {hint}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, str(map_location))
    try:
        stand_ins = _stand_ins(_unsafe_globals(path), path)
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch has a dozen exceptions for a damaged archive
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: truncated, damaged or of another "
            f"kind ({type(error).__name__}: {first[:160]})"
        ) from error


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """As `load_data`, for a file that holds a dict.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: see `load_data`, or it holds something else.
    """
    loaded = load_data(path, map_location)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dict of weights")
    return dict(loaded)


def load_state_dict(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The weights of a checkpoint: its `state_dict` entry if it has one, else the tensors of the file itself."""
    return tensors_of(load_checkpoint(path, map_location), path)


def tensors_of(loaded: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint that was read from `path`."""
    state = loaded.get("state_dict", loaded)
    tensors = (
        {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its entries are {sorted(map(str, loaded))[:8]}")
    return tensors


def _load_safetensors(path: Path, device: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {
                "state_dict": {k: file.get_tensor(k) for k in file.keys()},  # noqa: SIM118 - it is no dict
                "metadata": file.metadata() or {},
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable safetensors file: {error}"
        ) from error


def _unsafe_globals(path: Path) -> set[str]:
    """The dotted names in a checkpoint's pickles that torch would refuse."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # torch's older format: several pickles in a row, then raw storages
    names: set[str] = set()
    with open(path, "rb") as file:
        try:
            for _ in range(5):
                for opcode, argument, _position in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
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
            raise CheckpointError(
                f"{path} is refused: its pickle wants to call {name!r}, which weights do not need and which could run "
                "code on this machine. If you trust its author, ask for a .safetensors file."
            )
    return allowed


def _numpy_object(module: str, attribute: str) -> Any:
    if module == "numpy.dtypes":
        return getattr(np.dtypes, attribute)
    if attribute in ("dtype", "ndarray"):
        return getattr(np, attribute)
    from numpy._core import multiarray  # numpy 1 files say numpy.core; the object is the same

    return getattr(multiarray, attribute)


# ------------------------------------------------------------------------------------------------------------ loading


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    ignore_keys: Sequence[str] = (),
    source: str | os.PathLike[str] = "the checkpoint",
    strict: bool = False,
) -> tuple[list[str], list[str]]:
    """Load weights into a module and say what did not match.

    Args:
        module: receives the weights.
        state_dict: names and tensors.
        ignore_keys: entries whose names begin with one of these are left out.
        source: the file's name, for messages.
        strict: raise on missing or unexpected names, too.

    Returns:
        Missing and unexpected names.

    Raises:
        CheckpointError: shapes differ, or not one name fits, or (`strict`) any name is missing or left over.
    """
    ignored = {k for k in state_dict if k.startswith(tuple(ignore_keys))} if ignore_keys else set()
    if ignored:
        logger.info(
            "%s: left out %d entries that begin with %s.", source, len(ignored), ", ".join(ignore_keys)
        )
    weights = {k: v for k, v in state_dict.items() if k not in ignored}
    own = module.state_dict()
    wrong = [
        f"{k} is {tuple(v.shape)} there and {tuple(own[k].shape)} here"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(wrong[:4])}{more}. "
            "Is it a checkpoint of another configuration? Entries can be left out with ignore_keys."
        )
    fitting = own.keys() & weights.keys()
    if weights and own and not fitting:
        raise CheckpointError(
            f"No entry of {source} belongs to {type(module).__name__}: it holds {', '.join(sorted(weights)[:3])}, … "
            f"while {', '.join(sorted(own)[:3])}, … are wanted."
        )
    missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [k for k in missing if k not in ignored]
    report = "; ".join(
        f"{len(names)} {what} ({_by_submodule(names)})"
        for what, names in (("missing", missing), ("left over", unexpected))
        if names
    )
    if report and strict:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {report}")
    logger.info("%s: restored %d entries%s.", source, len(fitting), f"; {report}" if report else "")
    return missing, list(unexpected)


def _by_submodule(names: Iterable[str]) -> str:
    """`first_stage_model 3, cond_stage_model 120`: which part of a model a list of names belongs to."""
    counts: dict[str, int] = {}
    for name in names:
        top = name.split(".")[0]
        counts[top] = counts.get(top, 0) + 1
    return ", ".join(f"{k} {v}" for k, v in counts.items())


def load_model_from_config(
    config: Any,
    ckpt: str | os.PathLike[str] | None,
    device: str | torch.device = "cpu",
    verbose: bool = False,
) -> nn.Module:
    """Build the model a configuration describes, put a checkpoint's weights into it, and set it to eval.

    Args:
        config: a configuration with a `model` section, or that section itself.
        ckpt: the weights; None keeps the fresh ones.
        device: where the model goes.
        verbose: list the names that are missing or left over.

    Raises:
        CheckpointError: see `load_checkpoint` and `load_into`.
    """
    model = instantiate_from_config(config.get("model", config))
    if ckpt is not None:
        missing, unexpected = load_into(model, load_state_dict(ckpt), source=ckpt)
        # weights that stay random give noise for pictures: never silently
        for name in missing if verbose else ():
            logger.warning("missing in %s: %s", ckpt, name)
        for name in unexpected if verbose else ():
            logger.warning("left over in %s: %s", ckpt, name)
        trained = [
            k
            for k in missing
            if not k.startswith(("model_ema.", "loss."))
            and k.split(".")[-1] not in ("position_ids", "attn_mask")
        ]
        if trained:
            logger.warning(
                "%s has no weights for %d entries (%s); they keep their initial values.",
                ckpt,
                len(trained),
                _by_submodule(trained),
            )
    return model.to(device).eval()


def averaged_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with the moving averages (`model_ema.…`) in the place of the live ones, and without them.

    Raises:
        CheckpointError: there are no averages.
    """
    shadows = {k.removeprefix("model_ema."): v for k, v in state_dict.items() if k.startswith("model_ema.")}
    averages = {k: v for k, v in shadows.items() if k not in ("decay", "num_updates")}
    if not averages:
        raise CheckpointError("the checkpoint holds no moving averages (model_ema.…)")
    merged = {}
    for name, value in state_dict.items():
        if not name.startswith("model_ema."):
            # of a diffusion model the network alone is averaged, under its name within `model`; of a first stage everything
            keys = (name.removeprefix("model.").replace(".", ""), name.replace(".", ""))
            merged[name] = next((averages[k] for k in keys if k in averages), value)
    return merged


# ------------------------------------------------------------------------------------------------------------ writing


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`torch.save` that replaces an older file only when the new one is complete."""
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        state_dict: names and tensors; tensors that share memory are written out separately.
        path: the file.
        metadata: strings to store beside them.
    """
    tensors = {
        k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in state_dict.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


# ------------------------------------------------------------------------------------------------------- run folders


def find_run(path: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """The checkpoint and configuration files of a training run or a published model folder.

    Args:
        path: a log folder (`logs/<run>`), a checkpoint inside one, or a published folder with `config.yaml` and
            `model.ckpt`.

    Returns:
        The checkpoint's path and the configurations to merge, in order (may be empty for a lone checkpoint).

    Raises:
        FileNotFoundError: nothing there to load.
    """
    path = Path(path)
    if path.is_dir():
        candidates = ["checkpoints/last.ckpt", "last.ckpt", "model.ckpt", "model.safetensors"]
        folder, ckpt = path, next((path / c for c in candidates if (path / c).is_file()), None)
        if ckpt is None:
            raise FileNotFoundError(
                f"{path} holds none of {', '.join(candidates)}. Has the run saved a checkpoint yet?"
            )
    elif path.is_file():
        ckpt, folder = path, path.parent.parent if path.parent.name == "checkpoints" else path.parent
    else:
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no folder or file {str(path)!r}. {nearest(path.name, around)}")
    configs = sorted(folder.glob("configs/*-project.yaml")) or [
        c for c in (folder / "config.yaml", ckpt.with_suffix(".yaml")) if c.is_file()
    ]
    return ckpt, configs[-1:] if configs and configs[0].name.endswith("-project.yaml") else configs[:1]
