"""Chapter three: the modular engine in the σ view (SDXL, video); so far the parts it shares with the chapters below."""

from ldm import __version__
from taming import require_same_home
from taming.util import get_obj_from_str, instantiate_from_config

require_same_home(__file__, "ldm", "taming")

__all__ = ["__version__", "get_obj_from_str", "instantiate_from_config"]
