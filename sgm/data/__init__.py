"""Data sets; their names are loaded when first asked for, so that none needs the libraries of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from sgm.data.dataset import StableDataModuleFromConfig

__all__ = ["StableDataModuleFromConfig"]

__getattr__, __dir__ = lazy_names(
    __name__, {"StableDataModuleFromConfig": "sgm.data.dataset.StableDataModuleFromConfig"}
)
