"""The models under short names, loaded when first asked for: `from taming.models import VQModel, Transformer`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.cond_transformer import Net2NetTransformer as Transformer
    from taming.models.vqgan import VQModel

HOMES = {
    "VQModel": ("taming.models.vqgan", "VQModel"),
    "Net2NetTransformer": ("taming.models.cond_transformer", "Net2NetTransformer"),
    "Transformer": ("taming.models.cond_transformer", "Net2NetTransformer"),
}

__all__ = ["Net2NetTransformer", "Transformer", "VQModel"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, attribute = HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
