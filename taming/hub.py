"""Published weights of whole models: where they are, and one way to fetch them, which nothing else of the library calls.

Parts of a model that no checkpoint has filled fetch their own: LPIPS when it is built, encoders, tokenizers and MiDaS at latest
when they are first used.

fetch("sdxl-base")        # the path of the file, in the cache folder; fetched if it is not there, or only half of it is
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from taming.util import download, nearest, sha256_hash, user_cache

HUB = "https://huggingface.co"
CACHE = "LGM_CACHE"  # environment variable with the cache folder
REDIRECTS = 5


class Published(NamedTuple):
    """A file of weights on the Hugging Face hub."""

    repository: str
    file: str
    about: str


PUBLISHED = {
    "sd-v1-4": Published("CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.ckpt", "Stable Diffusion 1.4"),
    "sd-v1-5": Published("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", "Stable Diffusion 1.5"),
    "sd-v1-5-inpainting": Published("stable-diffusion-v1-5/stable-diffusion-inpainting", "sd-v1-5-inpainting.ckpt", "Stable Diffusion 1.5, inpainting"),
    "sd-v2-1-base": Published("stabilityai/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors", "Stable Diffusion 2.1, 512²"),
    "sd-v2-1": Published("stabilityai/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", "Stable Diffusion 2.1, 768², v"),
    "sd-v2-inpainting": Published("stabilityai/stable-diffusion-2-inpainting", "512-inpainting-ema.safetensors", "Stable Diffusion 2, inpainting"),
    "sd-v2-depth": Published("stabilityai/stable-diffusion-2-depth", "512-depth-ema.safetensors", "Stable Diffusion 2, depth"),
    "x4-upscaler": Published("stabilityai/stable-diffusion-x4-upscaler", "x4-upscaler-ema.safetensors", "x4 upscaler"),
    "sdxl-base": Published("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", "SDXL 1.0, base"),
    "sdxl-refiner": Published("stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors", "SDXL 1.0, refiner"),
    "sdxl-turbo": Published("stabilityai/sdxl-turbo", "sd_xl_turbo_1.0.safetensors", "SDXL-Turbo"),
    "svd": Published("stabilityai/stable-video-diffusion-img2vid", "svd.safetensors", "Stable Video Diffusion, 14 frames"),
    "svd-xt": Published("stabilityai/stable-video-diffusion-img2vid-xt", "svd_xt.safetensors", "Stable Video Diffusion, 25 frames"),
    "sv3d-u": Published("stabilityai/sv3d", "sv3d_u.safetensors", "SV3D, orbit"),
    "sv3d-p": Published("stabilityai/sv3d", "sv3d_p.safetensors", "SV3D, given path"),
    "sv4d": Published("stabilityai/sv4d", "sv4d.safetensors", "SV4D"),
    "vae-ft-mse": Published("stabilityai/sd-vae-ft-mse-original", "vae-ft-mse-840000-ema-pruned.safetensors", "Stable Diffusion 1's autoencoder, tuned"),
}  # fmt: skip


def cache_folder() -> Path:
    """Where fetched weights are: $LGM_CACHE, or `latent-generative-models` in the user's cache folder."""
    return Path(os.environ.get(CACHE) or user_cache() / "latent-generative-models")


def place_of(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The path that a published file has in the cache folder, whether it is there or not.

    Raises:
        KeyError: unknown name.
    """
    if name not in PUBLISHED:
        raise KeyError(f"no published weights are known as {name!r}. {nearest(name, PUBLISHED)}")
    known = PUBLISHED[name]
    root = cache_folder() if folder is None else Path(folder)
    return root / known.repository.replace("/", "--") / known.file


def fetch(name: str, folder: str | os.PathLike[str] | None = None, check: bool = False) -> Path:
    """The path of published weights, fetched first where they are absent, and compared with the hub's SHA-256.

    Args:
        name: a key of `PUBLISHED`.
        folder: to keep it in; the cache folder if None.
        check: compare a file that is already there, too.

    Raises:
        KeyError: unknown name.
        OSError: it cannot be fetched; the message says which file to put where.
        ValueError: the file is not what the hub says.
    """
    place, known = place_of(name, folder), PUBLISHED[name]
    if place.is_file() and not check:
        return place
    url = f"{HUB}/{known.repository}/resolve/main/{urllib.parse.quote(known.file)}"
    try:
        expected = published_sha256(url)
        if place.is_file():
            if expected is not None and (found := sha256_hash(place)) != expected:
                raise ValueError(
                    f"{place} has SHA-256 {found} instead of {expected}; remove it and fetch it again"
                )
            return place
        download(url, place, sha256=expected, headers=_token(url))
    except OSError as error:
        raise OSError(
            f"{known.about} could not be fetched ({_reason(error)}). Fetch {known.file} of {HUB}/{known.repository} on a machine "
            f"with a connection (its page may ask you to agree to a license; then give your token as HF_TOKEN) and put it at {place}"
        ) from error
    return place


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", error) or error)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def published_sha256(url: str) -> str | None:
    """What the hub says of a large file; None if it says nothing.

    Raises:
        OSError: the hub cannot be reached, or has no such file.
    """
    opener = urllib.request.build_opener(_Stay)
    for _ in range(REDIRECTS):
        try:
            headers: Any = opener.open(
                urllib.request.Request(url, method="HEAD", headers=_token(url))
            ).headers
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                raise
            headers = error.headers
        tag = (headers.get("X-Linked-Etag") or "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
        if not headers.get("Location"):
            return None
        url = urllib.parse.urljoin(url, headers["Location"])
    return None


def _token(url: str) -> dict[str, str]:
    """The user's own token for files behind a license, if the address is the hub's own: others must not see it."""
    token = os.environ.get("HF_TOKEN") if url.startswith(f"{HUB}/") else None
    return {"Authorization": f"Bearer {token}"} if token else {}
