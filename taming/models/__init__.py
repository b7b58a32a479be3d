"""The models under short names, loaded when first asked for: `from taming.models import VQModel, Transformer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.cond_transformer import Net2NetTransformer as Transformer
    from taming.models.vqgan import VQModel

__all__ = ["Net2NetTransformer", "Transformer", "VQModel"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "VQModel": "taming.models.vqgan.VQModel",
        "Net2NetTransformer": "taming.models.cond_transformer.Net2NetTransformer",
        "Transformer": "taming.models.cond_transformer.Net2NetTransformer",
    },
)
