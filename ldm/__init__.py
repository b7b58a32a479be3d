"""Chapter two: diffusion in the latent space of a first stage (latent diffusion, Stable Diffusion v1 and v2)."""

try:
    from taming import __version__, require_same_home
except ImportError as error:
    raise ImportError(
        "The package 'taming' on this path is not the one of latent-generative-models (an older "
        "taming-transformers shadows it). Uninstall that distribution: python -m pip uninstall taming-transformers"
    ) from error

require_same_home(__file__, "taming")

__all__ = ["__version__"]
