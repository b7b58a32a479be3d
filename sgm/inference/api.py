"""Published image models under short names: text to image, image to image, and SDXL's refiner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.inference import choose_device
from ldm.lora import load_lora
from sgm.inference.helpers import (
    Filter,
    Img2ImgDiscretizationWrapper,
    Txt2NoisyDiscretizationWrapper,
    do_img2img,
    do_sample,
)
from sgm.util import get_configs_path, get_obj_from_str, load_model_from_config
from taming.util import nearest

__all__ = [
    "Discretization", "Guider", "ModelArchitecture", "Sampler", "SamplingParams", "SamplingPipeline", "SamplingSpec", "Thresholder",
    "get_discretization_config", "get_guider_config", "get_sampler_config", "model_specs",
]  # fmt: skip

logger = logging.getLogger(__name__)

PARTS = "sgm.modules.diffusionmodules"
REFINER_SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}


class ModelArchitecture(StrEnum):
    """What `SamplingPipeline` can load."""

    SD_2_1 = "stable-diffusion-v2-1"
    SD_2_1_768 = "stable-diffusion-v2-1-768"
    SDXL_V0_9_BASE = "stable-diffusion-xl-v0-9-base"
    SDXL_V0_9_REFINER = "stable-diffusion-xl-v0-9-refiner"
    SDXL_V1_BASE = "stable-diffusion-xl-v1-base"
    SDXL_V1_REFINER = "stable-diffusion-xl-v1-refiner"


class Sampler(StrEnum):
    """Classes of `sgm.modules.diffusionmodules.sampling`."""

    EULER_EDM = "EulerEDMSampler"
    HEUN_EDM = "HeunEDMSampler"
    EULER_ANCESTRAL = "EulerAncestralSampler"
    DPMPP2S_ANCESTRAL = "DPMPP2SAncestralSampler"
    DPMPP2M = "DPMPP2MSampler"
    LINEAR_MULTISTEP = "LinearMultistepSampler"


class Discretization(StrEnum):
    """Classes of `sgm.modules.diffusionmodules.discretizer`."""

    LEGACY_DDPM = "LegacyDDPMDiscretization"
    EDM = "EDMDiscretization"


class Guider(StrEnum):
    """Classes of `sgm.modules.diffusionmodules.guiders`."""

    VANILLA = "VanillaCFG"
    IDENTITY = "IdentityGuider"


class Thresholder(StrEnum):
    """How guided estimates are bounded."""

    NONE = "None"


@dataclass
class SamplingParams:
    """How to sample.

    Attributes:
        width, height: of the images in pixels.
        steps, sampler, discretization, guider, thresholder: see the enumerations.
        scale: of classifier-free guidance.
        aesthetic_score, negative_aesthetic_score: conditions of the refiner.
        img2img_strength: how much of the way is walked from a given image, above 0 up to 1.
        orig_width, orig_height, crop_coords_top, crop_coords_left: conditions of SDXL: size and cut of the training image.
        sigma_min, sigma_max, rho: of EDM's discretization.
        s_churn, s_tmin, s_tmax, s_noise: of the Euler and Heun samplers; the last one of the ancestral ones, too.
        eta: of the ancestral samplers.
        order: of the linear multistep sampler.
    """

    width: int = 1024
    height: int = 1024
    steps: int = 50
    sampler: Sampler = Sampler.DPMPP2M
    discretization: Discretization = Discretization.LEGACY_DDPM
    guider: Guider = Guider.VANILLA
    thresholder: Thresholder = Thresholder.NONE
    scale: float = 6.0
    aesthetic_score: float = 5.0
    negative_aesthetic_score: float = 5.0
    img2img_strength: float = 1.0
    orig_width: int = 1024
    orig_height: int = 1024
    crop_coords_top: int = 0
    crop_coords_left: int = 0
    sigma_min: float = 0.0292
    sigma_max: float = 14.6146
    rho: float = 3.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = 999.0
    s_noise: float = 1.0
    eta: float = 1.0
    order: int = 4


@dataclass
class SamplingSpec:
    """A published model.

    Attributes:
        width, height: that it was trained with.
        channels, factor: of its latents.
        is_legacy: the unconditional text is encoded; otherwise its embedding is zero.
        config, ckpt: file names.
        is_guided: whether it is sampled with guidance.
    """

    width: int
    height: int
    channels: int
    factor: int
    is_legacy: bool
    config: str
    ckpt: str
    is_guided: bool


def _spec(side: int, is_legacy: bool, config: str, ckpt: str) -> SamplingSpec:
    return SamplingSpec(side, side, 4, 8, is_legacy, f"{config}.yaml", f"{ckpt}.safetensors", True)


model_specs = {
    ModelArchitecture.SD_2_1: _spec(512, True, "sd_2_1", "v2-1_512-ema-pruned"),
    ModelArchitecture.SD_2_1_768: _spec(768, True, "sd_2_1_768", "v2-1_768-ema-pruned"),
    ModelArchitecture.SDXL_V0_9_BASE: _spec(1024, False, "sd_xl_base", "sd_xl_base_0.9"),
    ModelArchitecture.SDXL_V0_9_REFINER: _spec(1024, True, "sd_xl_refiner", "sd_xl_refiner_0.9"),
    ModelArchitecture.SDXL_V1_BASE: _spec(1024, False, "sd_xl_base", "sd_xl_base_1.0"),
    ModelArchitecture.SDXL_V1_REFINER: _spec(1024, True, "sd_xl_refiner", "sd_xl_refiner_1.0"),
}


# ------------------------------------------------------------------------------------------------------- configurations

CHURN, ANCESTRAL = ("s_churn", "s_tmin", "s_tmax", "s_noise"), ("eta", "s_noise")
# what each class takes from `SamplingParams`
SAMPLER_OPTIONS: dict[str, tuple[str, ...]] = {
    Sampler.EULER_EDM: CHURN,
    Sampler.HEUN_EDM: CHURN,
    Sampler.EULER_ANCESTRAL: ANCESTRAL,
    Sampler.DPMPP2S_ANCESTRAL: ANCESTRAL,
    Sampler.DPMPP2M: (),
    Sampler.LINEAR_MULTISTEP: ("order",),
}
DISCRETIZATION_OPTIONS: dict[str, tuple[str, ...]] = {
    Discretization.LEGACY_DDPM: (),
    Discretization.EDM: ("sigma_min", "sigma_max", "rho"),
}
GUIDER_OPTIONS: dict[str, tuple[str, ...]] = {Guider.VANILLA: ("scale",), Guider.IDENTITY: ()}


def _config(
    kind: str, name: str, module: str, options: Mapping[str, Sequence[str]], params: SamplingParams
) -> dict[str, Any]:
    if name not in options:
        raise ValueError(f"unknown {kind} {name!r}. {nearest(str(name), map(str, options))}")
    config: dict[str, Any] = {"target": f"{PARTS}.{module}.{name!s}"}
    if options[name]:
        config["params"] = {option: getattr(params, option) for option in options[name]}
    return config


def get_discretization_config(params: SamplingParams) -> dict[str, Any]:
    """The configuration of the discretization.

    Raises:
        ValueError: an unknown one.
    """
    return _config("discretization", params.discretization, "discretizer", DISCRETIZATION_OPTIONS, params)


def get_guider_config(params: SamplingParams) -> dict[str, Any]:
    """The configuration of the guider.

    Raises:
        ValueError: an unknown one, or an unknown thresholder.
    """
    if params.thresholder != Thresholder.NONE:
        raise ValueError(
            f"unknown thresholder {params.thresholder!r}; there is {str(Thresholder.NONE)!r} only"
        )
    return _config("guider", params.guider, "guiders", GUIDER_OPTIONS, params)


def get_sampler_config(params: SamplingParams) -> Any:
    """The sampler itself, made for the parameters.

    Raises:
        ValueError: an unknown one.
    """
    config = _config("sampler", params.sampler, "sampling", SAMPLER_OPTIONS, params)
    return get_obj_from_str(config["target"])(
        num_steps=params.steps,
        discretization_config=get_discretization_config(params),
        guider_config=get_guider_config(params),
        **config.get("params", {}),
    )


# ------------------------------------------------------------------------------------------------------------- pipeline


def find_config(folder: str | Path, name: str) -> Path:
    """A configuration in a folder, or among those that are shipped.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    places = [Path(folder) / name, Path(get_configs_path()) / "inference" / name]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"there is no configuration {' or '.join(map(str, places))}")


class SamplingPipeline:
    """A published model, ready to draw.

    ```python
    pipeline = SamplingPipeline(ModelArchitecture.SDXL_V1_BASE)
    images = pipeline.text_to_image(SamplingParams(steps=30), "a red heart", samples=2)
    ```

    Args:
        model_id: which one.
        model_path: folder of the checkpoints.
        config_path: folder of the configurations; those that are shipped are found without it.
        device: where to compute; the GPU if None and there is one.
        use_fp16: half precision for the network and the conditioner, on a GPU.
        lora: files of low-rank adapters, of any layout that `ldm.lora.load_lora` reads, and how strong each is.

    Raises:
        ValueError: an unknown model.
        FileNotFoundError: its configuration, its checkpoint or a LoRA is missing.
        CheckpointError: a LoRA for another model.
    """

    def __init__(
        self,
        model_id: ModelArchitecture | str,
        model_path: str | Path = "checkpoints",
        config_path: str | Path = "configs/inference",
        device: str | torch.device | None = None,
        use_fp16: bool = True,
        lora: Mapping[str | Path, float] | None = None,
    ) -> None:
        if model_id not in model_specs:
            raise ValueError(
                f"model {str(model_id)!r} is unknown. {nearest(str(model_id), map(str, model_specs))}"
            )
        self.model_id = ModelArchitecture(model_id)
        self.specs = model_specs[self.model_id]
        self.config = str(find_config(config_path, self.specs.config))
        self.ckpt = str(Path(model_path) / self.specs.ckpt)
        if not Path(self.ckpt).is_file():
            raise FileNotFoundError(
                f"there is no checkpoint {self.ckpt}; put it there, or give its folder as model_path"
            )
        self.device = choose_device(str(device or "auto"))
        self.model = self._load_model(use_fp16)
        for file, strength in (lora or {}).items():
            load_lora(self.model, file, strength)

    def _load_model(self, use_fp16: bool) -> Any:
        model: Any = load_model_from_config(OmegaConf.load(self.config), self.ckpt).to(self.device)
        if use_fp16 and self.device.type == "cuda":
            model.conditioner.half()
            model.model.half()
        return model

    def _uncond_zeros(self, negative_prompt: str) -> list[str]:
        """Entries whose unconditional embedding is zero: the text of a model trained so, where nothing is to be avoided."""
        return [] if self.specs.is_legacy or negative_prompt else ["txt"]

    def text_to_image(
        self,
        params: SamplingParams,
        prompt: str,
        negative_prompt: str = "",
        samples: int = 1,
        return_latents: bool = False,
        filter: Filter | None = None,
        left_to_refiner: float = 0.0,
    ) -> Any:
        """Images for a prompt.

        Args:
            params: how; `width` and `height` are the images' size.
            prompt: what to draw.
            negative_prompt: what guidance leads away from; without one, what training put in the place of dropped texts.
            samples: how many.
            return_latents: give the latents, too.
            filter: is called with the images.
            left_to_refiner: share of the way that is left to `refiner`, which is to go on from the latents with add_noise=False
                and this strength.

        Returns:
            (samples, 3, height, width) in [0, 1], and the latents if wanted.
        """
        values = {**asdict(params), "prompt": prompt, "negative_prompt": negative_prompt}
        values |= {"target_width": params.width, "target_height": params.height}
        sampler = get_sampler_config(params)
        if left_to_refiner:
            sampler.discretization = Txt2NoisyDiscretizationWrapper(
                sampler.discretization, left_to_refiner, params.steps
            )
        return do_sample(
            self.model, sampler, values, samples, params.height, params.width, self.specs.channels,
            self.specs.factor, self._uncond_zeros(negative_prompt), return_latents=return_latents, filter=filter, device=self.device,
        )  # fmt: skip

    def image_to_image(
        self,
        params: SamplingParams,
        image: Tensor,
        prompt: str,
        negative_prompt: str = "",
        samples: int = 1,
        return_latents: bool = False,
        filter: Filter | None = None,
    ) -> Any:
        """Images (b, 3, h, w) in [-1, 1] redrawn under a prompt, as far as `params.img2img_strength` says.

        The other arguments and the result are those of `text_to_image`; the size is that of the images.
        """
        height, width = image.shape[-2:]
        values = {**asdict(params), "prompt": prompt, "negative_prompt": negative_prompt}
        values |= {"target_width": width, "target_height": height}
        return do_img2img(
            image, self.model, self._redrawing(params), values, samples, self._uncond_zeros(negative_prompt),
            return_latents=return_latents, filter=filter, device=self.device,
        )  # fmt: skip

    def refiner(
        self,
        params: SamplingParams,
        image: Tensor,
        prompt: str,
        negative_prompt: str | None = None,
        samples: int = 1,
        return_latents: bool = False,
        filter: Filter | None = None,
        add_noise: bool = True,
    ) -> Any:
        """The second stage: another model's latents (b, c, h, w) redrawn, as far as `params.img2img_strength` says.

        With add_noise=False they are as noisy as that already, see `text_to_image`. The other arguments and the result are those of `text_to_image`.
        """
        height, width = (side * self.specs.factor for side in image.shape[-2:])
        values = {"prompt": prompt, "negative_prompt": negative_prompt or "", **REFINER_SCORES}
        values |= {"crop_coords_top": 0, "crop_coords_left": 0}
        for name, side in (("width", width), ("height", height)):
            values |= {f"orig_{name}": side, f"target_{name}": side}
        return do_img2img(
            image, self.model, self._redrawing(params), values, samples, skip_encode=True,
            return_latents=return_latents, filter=filter, device=self.device, add_noise=add_noise,
        )  # fmt: skip

    def _redrawing(self, params: SamplingParams) -> Any:
        sampler = get_sampler_config(params)
        if params.img2img_strength < 1.0:
            sampler.discretization = Img2ImgDiscretizationWrapper(
                sampler.discretization, params.img2img_strength
            )
        return sampler
