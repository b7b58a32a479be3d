"""The conditioner, loaded when first asked for, and the configuration of one without conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from sgm.modules.encoders.modules import GeneralConditioner

__all__ = ["UNCONDITIONAL_CONFIG", "GeneralConditioner"]

UNCONDITIONAL_CONFIG = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": []}}

__getattr__, __dir__ = lazy_names(
    __name__, {"GeneralConditioner": "sgm.modules.encoders.modules.GeneralConditioner"}
)
