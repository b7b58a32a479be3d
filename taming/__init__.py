"""Chapter one: images into tokens and back, and the ground that `ldm` and `sgm` stand on.

`taming` holds the VQGAN and its token transformer, and with them what every later chapter needs: building objects
from YAML (`taming.util`), reading and writing checkpoints (`taming.checkpoint`), the first-stage networks and
losses, the data module and the training loop (`taming.training`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package whose names are imported when first asked for (PEP 562).

    Args:
        package: its `__name__`.
        homes: name → dotted path of the object.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it offers {', '.join(homes)}"
            )
        module, _, attribute = homes[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    return look_up, lambda: sorted({*vars(sys.modules[package]), *homes})


def require_same_home(package_file: str, *names: str) -> None:
    """Refuse to run when another distribution's package of the same name would be imported beside ours.

    Several old distributions own a top-level `ldm` or `taming`; whichever comes first on `sys.path` wins, and a mix
    of two fails in ways that are hard to read.

    Args:
        package_file: `__file__` of the package that needs the others.
        names: the packages which must lie beside it.

    Raises:
        ImportError: names the intruding file and what to uninstall.
    """
    home = Path(package_file).resolve().parents[1]
    for name in names:
        spec = importlib.util.find_spec(name)
        places = (
            [spec.origin] if spec and spec.origin else list((spec and spec.submodule_search_locations) or [])
        )
        found = [Path(p).resolve() for p in places]
        if not any(home in p.parents for p in found):
            where = f"is imported from {found[0]}" if found else "is not installed"
            raise ImportError(
                f"The package {name!r} {where}, but latent-generative-models lies in {home}. Another distribution "
                f"shadows it: see which with `python -m pip list` (taming-transformers, latent-diffusion, ldm, …), "
                f"uninstall that one, or put {home} first on PYTHONPATH."
            )
