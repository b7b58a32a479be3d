"""Chapter three: the modular engine in the σ view (SDXL, video); its names are loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm import __version__
from taming import lazy_names, require_same_home

if TYPE_CHECKING:
    from sgm.models.autoencoder import AutoencodingEngine
    from sgm.models.diffusion import DiffusionEngine
    from sgm.util import get_configs_path, get_obj_from_str, instantiate_from_config

require_same_home(__file__, "ldm", "taming")

__all__ = [
    "AutoencodingEngine", "DiffusionEngine", "__version__", "get_configs_path", "get_obj_from_str", "instantiate_from_config",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoencodingEngine": "sgm.models.autoencoder.AutoencodingEngine",
        "DiffusionEngine": "sgm.models.diffusion.DiffusionEngine",
        "get_configs_path": "sgm.util.get_configs_path",
        "get_obj_from_str": "sgm.util.get_obj_from_str",
        "instantiate_from_config": "sgm.util.instantiate_from_config",
    },
)
