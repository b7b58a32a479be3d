"""Downloads and `ActNorm`; implemented in `taming.util` and `taming.modules.util`, importable here for existing code."""

from taming.modules.util import ActNorm
from taming.util import CKPT_MAP, MD5_MAP, URL_MAP, download, get_ckpt_path, md5_hash

__all__ = ["CKPT_MAP", "MD5_MAP", "URL_MAP", "ActNorm", "download", "get_ckpt_path", "md5_hash"]
