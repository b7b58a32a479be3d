"""What the notebook of latent-diffusion imports: super-resolution of a picture, over the same code as everything else.

```python
model = get_model("superresolution")
log = run(model["model"], "small.png", "superresolution", custom_steps=100)
```

A model conditioned on text or classes needs none of this: see `ldm.models.LatentDiffusion` and docs/notebooks.md.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from ldm.inference import InferenceError, choose_device
from ldm.inference_images import shrunk_to_step, to_pixels
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import ismap
from taming.checkpoint import find_run, load_checkpoint, load_into, tensors_of
from taming.data.images import EXTENSIONS, open_rgb
from taming.util import download, instantiate_from_config

# task → the folder of its published model, and where its weights were published
MODELS = {"superresolution": ("models/ldm/bsr_sr", "https://ommer-lab.com/files/latent-diffusion/sr_bsr.zip")}
EXAMPLES = "data/example_conditioning"
FACTOR = 4  # of the enlarging
MULTIPLE = 16  # of a small picture's sides: what crops cover, and a network can halve
# large pictures go through network and first stage in overlapping crops, see `ldm.models.diffusion.patches`
PATCHWISE = {
    "ks": (128, 128), "stride": (64, 64), "vqf": 4, "patch_distributed_vq": True, "tie_braker": False, "clip_max_weight": 0.5,
    "clip_min_weight": 0.01, "clip_max_tie_weight": 0.5, "clip_min_tie_weight": 0.01,
}  # fmt: skip
LARGE = 128


def _known(mode: str) -> tuple[Path, str]:
    if mode not in MODELS:
        raise InferenceError(f"there is no task {mode!r}; choose one of {', '.join(MODELS)}")
    folder, url = MODELS[mode]
    return Path(folder), url


def _path(selected: Any) -> Path:
    """A path, or the one that a widget shows as selected."""
    return Path(getattr(selected, "value", selected))


# ------------------------------------------------------------------------------------------------------------- models


def download_models(mode: str) -> tuple[Path, Path]:
    """Configuration and checkpoint of a published model, fetched first where it is absent.

    Raises:
        InferenceError: unknown task, or no configuration with the weights.
        OSError: it cannot be fetched; the message says where it may be put by hand.
    """
    folder, url = _known(mode)
    try:
        ckpt, configs = find_run(folder)
    except FileNotFoundError:
        archive = folder / Path(url).name
        folder.mkdir(parents=True, exist_ok=True)
        download(url, archive)
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        archive.unlink()
        ckpt, configs = find_run(folder)
    # a checkout holds the published configurations apart from the weights
    beside = [*configs, *(c for c in [Path("configs", folder, "config.yaml")] if c.is_file())]
    if not beside:
        raise InferenceError(f"{folder} has weights and no config.yaml; put the published one there")
    return beside[0], ckpt


def load_model_from_config(config: Any, ckpt: str | Path) -> tuple[dict[str, Any], int]:
    """The model that a configuration describes, with a checkpoint's weights, where this machine computes best.

    Returns:
        {"model": model}, and the step of the training at which the checkpoint was saved.
    """
    checkpoint = load_checkpoint(ckpt)
    model = instantiate_from_config(config.model)
    load_into(model, tensors_of(checkpoint, Path(ckpt)), source=ckpt)
    return {"model": model.to(choose_device()).eval()}, int(checkpoint.get("global_step", 0))


def get_model(mode: str) -> dict[str, Any]:
    """{"model": model} for a task, see `download_models`."""
    config, ckpt = download_models(mode)
    return load_model_from_config(OmegaConf.load(config), ckpt)[0]


# --------------------------------------------------------------------------------------------------------- conditions


def get_cond_options(mode: str) -> tuple[str, list[str]]:
    """The folder of a task's example pictures, and their names.

    Raises:
        InferenceError: there is no such folder.
    """
    folder = Path(EXAMPLES, mode)
    if not folder.is_dir():
        raise InferenceError(f"there are no examples in {folder}; put pictures there, or give run() a path")
    return str(folder), sorted(p.name for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)


def select_cond_path(mode: str) -> Any:
    """Show a task's examples as a choice; what it returns goes into `get_cond` or `run`, which read what is selected then.

    Raises:
        ImportError: ipywidgets is not installed.
    """
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError as error:
        raise ImportError("a choice on the page needs python -m pip install ipywidgets") from error
    folder, names = get_cond_options(mode)
    choice = ipywidgets.RadioButtons(
        options=[(name, str(Path(folder, name))) for name in names], description="Picture:"
    )
    display(choice)
    return choice


def get_custom_cond(mode: str) -> str:
    """Upload a picture in Colab; returns its path among the task's examples.

    Raises:
        ImportError: this is not Colab.
    """
    try:
        from google.colab import files
    except ImportError as error:
        raise ImportError(
            "uploading works in Colab alone; elsewhere give run() the path of a picture"
        ) from error
    folder = Path(EXAMPLES, mode)
    folder.mkdir(parents=True, exist_ok=True)
    name, content = next(iter(files.upload().items()))
    target = folder / f"custom_{Path(name).name}"
    target.write_bytes(content)
    return str(target)


def get_cond(mode: str, selected_path: Any, multiple: int = 1) -> dict[str, Tensor]:
    """A batch of one picture for a task.

    Args:
        mode: "superresolution".
        selected_path: of the picture, or a choice of `select_cond_path`.
        multiple: make the picture smaller until its sides are multiples of it.

    Returns:
        `LR_image` (1, h, w, 3) in [-1, 1], and `image`, four times as large by interpolation, in [0, 1].
    """
    _known(mode)
    small = to_pixels(shrunk_to_step(open_rgb(_path(selected_path)), multiple))
    large = F.interpolate(
        (small + 1.0) / 2.0, scale_factor=FACTOR, mode="bilinear", antialias=True, align_corners=False
    )
    return {"LR_image": small.movedim(1, -1), "image": large.clamp(0.0, 1.0).movedim(1, -1)}


def visualize_cond_img(path: Any) -> None:
    """Show a picture on the page."""
    from IPython.display import display

    display(open_rgb(_path(path)))


# ----------------------------------------------------------------------------------------------------------- sampling


def run(
    model: Any,
    selected_path: Any,
    task: str,
    custom_steps: int,
    resize_enabled: bool = False,
    classifier_ckpt: Any = None,
    global_step: Any = None,
) -> dict[str, Any]:
    """Do a task on one picture, by DDIM with all its noise; large pictures patch by patch.

    Args:
        model: for the task, see `get_model`.
        selected_path: of the picture, or a choice of `select_cond_path`.
        task: "superresolution".
        custom_steps: of DDIM.
        resize_enabled: make a picture smaller whose sides do not suit, instead of refusing it.
        classifier_ckpt, global_step: accepted, as published.

    Returns:
        See `make_convolutional_sample`.

    Raises:
        InferenceError: unknown task, or sides that do not suit.
    """
    example = get_cond(task, selected_path, MULTIPLE if resize_enabled else 1)
    height, width = example["LR_image"].shape[1:3]
    if FACTOR * min(height, width) >= LARGE:
        if height % MULTIPLE or width % MULTIPLE:
            raise InferenceError(
                f"{_path(selected_path)} is {width}x{height}; overlapping crops cover multiples of {MULTIPLE} pixels alone: "
                "resize_enabled=True makes it smaller"
            )
        model.split_input_params = dict(PATCHWISE)
    elif hasattr(model, "split_input_params"):
        del model.split_input_params
    batch = {name: picture.to(model.device) for name, picture in example.items()}
    return make_convolutional_sample(batch, model, custom_steps=custom_steps, eta=1.0)


def convsample_ddim(
    model: Any, cond: Any, steps: int, shape: Sequence[int], eta: float = 1.0, **options: Any
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Latents of a shape (b, c, h, w) by DDIM, and intermediates; the options are those of `DDIMSampler.sample`."""
    return DDIMSampler(model).sample(
        S=steps, batch_size=shape[0], shape=shape[1:], conditioning=cond, eta=eta, **options
    )


@torch.no_grad()
def make_convolutional_sample(
    batch: dict[str, Any], model: Any, custom_steps: int, eta: float = 1.0, **options: Any
) -> dict[str, Any]:
    """A sample under a batch's condition, of the batch's size.

    Args:
        batch: images, and whatever the condition is made of.
        model: a latent diffusion model.
        custom_steps, eta: of DDIM.
        options: of `DDIMSampler.sample`, such as `quantize_x0`, `temperature`, `x_T`.

    Returns:
        `input`, `reconstruction`, the condition under the model's own name for it (and, for maps that are no pictures, as
        `original_conditioning` in colours), `sample` in [-1, 1]; `sample_noquant` and `sample_diff` where the first stage
        quantises; `time` in seconds.
    """
    z, c, x, reconstruction, condition = model.get_input(
        batch, model.first_stage_key, return_first_stage_outputs=True, force_c_encode=True, return_original_cond=True
    )  # fmt: skip
    log = {"input": x, "reconstruction": reconstruction}
    if ismap(condition):
        log["original_conditioning"] = condition = model.to_rgb(condition)
    log[model.cond_stage_key] = condition
    with model.ema_scope():
        start = time.perf_counter()
        sample, _ = convsample_ddim(model, c, custom_steps, z.shape, eta, **options)
        log["time"] = time.perf_counter() - start
    log["sample"] = model.decode_first_stage(sample)
    if hasattr(model.first_stage_model, "quantize"):
        log["sample_noquant"] = model.decode_first_stage(sample, force_not_quantize=True)
        log["sample_diff"] = (log["sample_noquant"] - log["sample"]).abs()
    return log
