"""Objects from configurations, nested look-ups, downloads: the small tools under all three packages."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import logging
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

URL_MAP = {"vgg_lpips": "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1"}
CKPT_MAP = {"vgg_lpips": "vgg.pth"}
MD5_MAP = {"vgg_lpips": "d507d7349b931f0638a25a48a722f98a"}

# configurations name `main.X`; the classes live in the package, so a pip installation without main.py finds them too
HOMES = {"main": "taming.training"}
SPECIAL_CONFIGS = ("__is_first_stage__", "__is_unconditional__")


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the key, what it held and what would fit."""


# ------------------------------------------------------------------------------------------------ small vocabulary


def exists(x: Any) -> bool:
    """Whether `x` is not None."""
    return x is not None


def default(value: Any, fallback: Any) -> Any:
    """`value` unless it is None, else `fallback` (called first if it is a Python function)."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Number of parameters of a module; `verbose` also logs it in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters.", type(model).__name__, total * 1e-6)
    return total


def freeze(module: nn.Module) -> nn.Module:
    """Put a module into eval mode for good: no gradients, and `train()` no longer changes it."""
    module.eval().requires_grad_(False)
    object.__setattr__(module, "train", disabled_train.__get__(module))
    return module


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """A `train` that does nothing, for networks that stay in eval mode inside a training model."""
    return self


def nearest(name: str, known: Iterable[str]) -> str:
    """A closing sentence for an error about `name`: its nearest known spelling, or all of them."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(known)}." if known else "None is known."


# ---------------------------------------------------------------------------------------------- objects from configs


def get_obj_from_str(string: str, reload: bool = False, invalidate_cache: bool = True) -> Any:
    """The object behind a dotted path such as `ldm.models.autoencoder.AutoencoderKL`.

    Args:
        string: module path and attribute, separated by dots.
        reload: import the module anew first.
        invalidate_cache: see modules that were written since Python last looked.

    Raises:
        ConfigError: the path has no dot, its module cannot be found, or the module lacks the name.
    """
    module_name, _, name = string.rpartition(".")
    if not module_name:
        raise ConfigError(f"target {string!r} must be a dotted path: package.module.Name")
    if invalidate_cache and module_name not in sys.modules:
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing_itself = error.name is not None and (
            module_name == error.name or module_name.startswith(error.name + ".")
        )
        if module_name in HOMES and missing_itself:
            module = importlib.import_module(HOMES[module_name])
        elif missing_itself:
            raise ConfigError(
                f"target {string!r}: there is no module {error.name!r} on the import path"
            ) from error
        else:
            raise  # a dependency of that module is missing: its own message says which
    if reload:
        module = importlib.reload(module)
    if not hasattr(module, name) and module_name in HOMES:
        module = importlib.import_module(HOMES[module_name])
    if not hasattr(module, name):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ConfigError(
            f"target {string!r}: module {module_name!r} has no {name!r}. {nearest(name, public)}"
        )
    return getattr(module, name)


def instantiate_from_config(config: Any) -> Any:
    """Build the object that a `{target: dotted.path, params: {…}}` configuration describes.

    Args:
        config: a mapping (dict or OmegaConf) with `target` and optionally `params`; the strings
            `"__is_first_stage__"` and `"__is_unconditional__"` stand for "nothing to build".

    Returns:
        The object, or None for the two special strings.

    Raises:
        KeyError: there is no `target` (the published error class).
        ConfigError: the target does not exist, or `params` holds a name that it does not take or lacks one that
            it needs; the message carries the key's path and the nearest valid name.
    """
    if isinstance(config, str) and config in SPECIAL_CONFIGS:
        return None
    where = config_path(config)
    if not isinstance(config, Mapping | DictConfig) or "target" not in config:
        shown = sorted(map(str, config)) if isinstance(config, Mapping | DictConfig) else repr(config)
        raise KeyError(f"Expected key `target` to instantiate{where}; got {shown}.")
    params = config.get("params") or {}
    try:
        builder = get_obj_from_str(config["target"])
        check_parameters(builder, params, f"{config['target']}{where}")
    except ConfigError as error:
        if where and where not in str(error):
            raise ConfigError(f"{error} (in the configuration{where})") from error.__cause__
        raise
    try:
        return builder(**params)
    except Exception as error:
        error.add_note(f"while building {config['target']}{where}")
        raise


def config_path(config: Any) -> str:
    """` at model.params.unet_config` where OmegaConf knows it, else nothing (plain dicts do not know their place)."""
    path = config._get_full_key(None) if isinstance(config, DictConfig) else ""
    return f" at {path}" if path else ""


def check_parameters(builder: Callable[..., Any], params: Mapping[str, Any], where: str) -> None:
    """Compare the names in `params` with what `builder` takes.

    A constructor that hands `**kwargs` to its base class takes the base's names too. One that swallows unknown names
    (its catch-all is called `ignored…`) gets a warning instead of an error, since published configurations rely on it.

    Raises:
        ConfigError: an unknown or a missing name.
    """
    named, required, catch_all = _accepted(builder)
    unknown = [str(name) for name in params if name not in named]
    if unknown and catch_all is None:
        raise ConfigError(
            "; ".join(f"{where} has no parameter {name!r}. {nearest(name, named)}" for name in unknown)
        )
    for name in unknown if catch_all == "ignored" else ():
        logger.warning("%s ignores the parameter %r. %s", where, name, nearest(name, named))
    missing = sorted(required - set(params))
    if missing:
        raise ConfigError(
            f"{where} lacks the required parameter{'s' * (len(missing) > 1)} {', '.join(missing)}."
        )


def _accepted(builder: Callable[..., Any]) -> tuple[set[str], set[str], str | None]:
    """Names that a callable takes, those it demands, and what becomes of others: None (error), "ignored", "open"."""
    if inspect.isclass(builder):
        layers = [
            c.__dict__["__init__"] for c in builder.__mro__ if "__init__" in c.__dict__ and c is not object
        ]
    else:
        layers = [builder]
    named: set[str] = set()
    required: set[str] = set()
    for depth, function in enumerate(layers):
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a builtin without a signature
            return named, required, "open"
        parameters = parameters[inspect.isclass(builder) :]  # without self
        own = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if depth == 0:
            # a base's required names may be filled in by the class above, so only the outermost ones are certain
            required = {name for name, p in own.items() if p.default is p.empty}
        named |= set(own)
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        if not rest:
            return named, required, None
        if rest[0].startswith("ignored"):
            return named, required, "ignored"
    return named, required, "open"


# --------------------------------------------------------------------------------------------------- nested look-ups


class KeyNotFoundError(Exception):
    """A path of keys that leads nowhere; `cause`, `keys` (the path) and `visited` (how far it led) say why."""

    def __init__(self, cause: Any, keys: list[Any] | None = None, visited: list[Any] | None = None) -> None:
        self.cause, self.keys, self.visited = cause, keys, visited
        lines = [f"Key not found: {'/'.join(map(str, keys))}" if keys is not None else "Key not found"]
        if visited is not None:
            lines.append(f"Visited: {'/'.join(map(str, visited))}")
        super().__init__("\n".join([*lines, f"Cause: {cause}"]))


def retrieve(
    list_or_dict: Any,
    key: str,
    splitval: str = "/",
    default: Any = None,
    expand: bool = True,
    pass_success: bool = False,
) -> Any:
    """Look up `a/b/0` in nested dicts and lists.

    Args:
        list_or_dict: where to look.
        key: keys and list indices, joined by `splitval`.
        splitval: the separator.
        default: returned when the path leads nowhere; None means raise.
        expand: call a callable met on the way and store what it returns in its place.
        pass_success: return `(value, found)` instead of the value.

    Raises:
        KeyNotFoundError: no such path and no default.
    """
    keys = key.split(splitval)
    node, parent, last = list_or_dict, None, None
    visited: list[Any] = []
    found = True
    try:
        for part in keys:
            if callable(node):
                if not expand:
                    raise KeyNotFoundError(
                        ValueError("a callable is in the way and expand is off"), keys, visited
                    )
                node = node()
                if parent is not None:
                    parent[last] = node
            last = part if isinstance(node, Mapping) else int(part)
            parent, node = node, node[last]
            visited.append(last)
        if callable(node) and expand:
            node = node()
            if parent is not None:
                parent[last] = node
    except KeyNotFoundError:
        if default is None:
            raise
        node, found = default, False
    except (KeyError, IndexError, ValueError, TypeError) as error:
        if default is None:
            raise KeyNotFoundError(error, keys, visited) from error
        node, found = default, False
    return (node, found) if pass_success else node


# ----------------------------------------------------------------------------------------------- files and downloads


def user_cache() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place only if the block ends well.

    A crash or a full disk leaves the old file untouched and no half-written one behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(
            0o666 & ~umask
        )  # mkstemp makes it private; a saved file should be as readable as any other
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def download(
    url: str,
    local_path: str | os.PathLike[str],
    chunk_size: int = 1024,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Fetch a file with a progress bar; it appears under its name only when it is complete and as it should be.

    What came before a broken connection stays beside it as `.<name>.download`, and the next call goes on from there.

    Args:
        url: the address.
        local_path: the file.
        chunk_size: least bytes to read at once.
        sha256: of the file; None to take it as it comes.
        headers: of the request to this address, not of those to where it redirects.

    Raises:
        OSError: the address cannot be reached, or the connection broke; the message says where the file may be put by hand.
        ValueError: the file has another SHA-256; what came is removed.
    """
    local_path = Path(local_path)
    local_path.parent.mkdir(parents=True, exist_ok=True)
    partial = local_path.with_name(f".{local_path.name}.download")
    try:
        _continue(url, partial, max(chunk_size, 1 << 16), headers or {})
    except OSError as error:
        raise OSError(
            f"Could not download {url} ({error}). Call again to go on, or fetch it elsewhere and put it at {local_path}."
        ) from error
    if sha256 is not None and (found := sha256_hash(partial)) != sha256:
        partial.unlink()
        raise ValueError(f"{url} gave a file with SHA-256 {found} instead of {sha256}; it was removed.")
    os.replace(partial, local_path)


def _continue(url: str, partial: Path, block_size: int, headers: Mapping[str, str]) -> None:
    """Bring a partial file to its full length."""
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    for key, value in headers.items():
        request.add_unredirected_header(key, value)
    try:
        response = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        return  # all of it is there
    with response:
        # a server that knows no ranges begins anew
        start = start if getattr(response, "status", None) == HTTPStatus.PARTIAL_CONTENT else 0
        left = response.headers.get("content-length")
        total = start + int(left) if left else None
        with (
            open(partial, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.name[1:]) as bar,
        ):
            while block := response.read(block_size):
                file.write(block)
                bar.update(len(block))
        if total is not None and (came := partial.stat().st_size) < total:
            raise OSError(f"the connection broke after {came:,} of {total:,} bytes")


def sha256_hash(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, as the Hugging Face hub says it of its large files."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_hash(path: str | os.PathLike[str]) -> str:
    """Hexadecimal md5 of a file, as published beside the originals' downloads."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def get_ckpt_path(name: str, root: str | os.PathLike[str], check: bool = False) -> str:
    """Path of a known auxiliary checkpoint below `root`, downloaded first where it is absent.

    Args:
        name: a key of `URL_MAP`.
        root: folder to look in and to download to.
        check: verify the md5 of a file that is already there, and fetch it again if it differs.

    Raises:
        KeyError: unknown name.
        ValueError: the downloaded file has the wrong md5.
    """
    if name not in URL_MAP:
        raise KeyError(f"Unknown checkpoint {name!r}. {nearest(name, URL_MAP)}")
    path = os.path.join(root, CKPT_MAP[name])
    if not os.path.exists(path) or (check and md5_hash(path) != MD5_MAP[name]):
        download(URL_MAP[name], path)
        if (found := md5_hash(path)) != MD5_MAP[name]:
            os.unlink(path)
            raise ValueError(
                f"{URL_MAP[name]} gave a file with md5 {found} instead of {MD5_MAP[name]}; it was removed."
            )
    return path
