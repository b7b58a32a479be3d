"""Draw many pictures from an unconditional latent diffusion model, and pack them as an array for metrics.

    python scripts/sample_diffusion.py -r models/ldm/celeba256 -n 100 --batch_size 10 -c 200 -e 0.0

Below LOGDIR/<name of the run> (or the run's own folder), samples/<step>/<time>/ gets img/sample_000000.png, …,
numpy/<n>x<h>x<w>x3-samples.npz and sampling_config.yaml. Values of the configuration are overridden by a.b=c.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import trange

from ldm import inference, inference_images
from ldm.inference_images import Finished
from scripts import flags
from taming.checkpoint import find_run
from taming.training.arguments import split_overrides
from taming.util import atomic_path


def get_parser() -> argparse.ArgumentParser:
    """The published flags, `--seed`, and where to compute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-r", "--resume", nargs="?", help="folder of a run or of a published model, or a checkpoint in it"
    )
    parser.add_argument("-n", "--n_samples", type=int, default=50000, help="pictures, in whole batches")
    parser.add_argument(
        "-e", "--eta", type=float, default=1.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    parser.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="all steps of training, one by one, without DDIM"
    )
    parser.add_argument("-l", "--logdir", nargs="?", help="extra folder for the pictures")
    parser.add_argument("-c", "--custom_steps", type=int, default=50, help="number of steps")
    parser.add_argument("--batch_size", type=int, default=10, help="pictures at once")
    parser.add_argument("--seed", type=int, help="for reproducible pictures")
    flags.add_device_arguments(parser)
    return parser


def require_unconditional(model: Any) -> None:
    """Refuse a model that wants a condition.

    Raises:
        InferenceError: says which.
    """
    inference_images.require_diffusion(model)
    if model.cond_stage_model is not None or model.model.conditioning_key is not None:
        raise inference.InferenceError(
            f"this model is conditioned (cond_stage_key={model.cond_stage_key!r}, conditioning_key={model.model.conditioning_key!r}); "
            "the script draws from unconditional models. For text there is scripts/txt2img.py"
        )


def sampling_folder(run: inference.Run, logdir: str | None, stamp: str) -> Path:
    """Where this call's files go, a folder that was not there before."""
    root = run.folder if logdir is None else Path(logdir) / run.folder.resolve().name
    folder = inference_images.free_path(root / "samples" / f"{run.global_step:08}" / stamp)
    for part in ("img", "numpy"):
        (folder / part).mkdir(parents=True)
    return folder


def make_drawing(model: Any, opt: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], Tensor]]:
    """What says how latents are drawn, and what draws a batch of them."""
    network = model.model.diffusion_model
    shape = (network.in_channels, network.image_size, network.image_size)
    if opt.vanilla_sample:
        said = {"sampler": "ancestral", "steps": model.num_timesteps}
        return said, lambda: model.p_sample_loop(None, (opt.batch_size, *shape), verbose=False)
    name, sampler = inference.make_sampler(model)
    eta = 0.0 if name == "flow" else opt.eta  # the way of a flow knows no noise
    return {"sampler": name, "steps": opt.custom_steps, "eta": eta}, lambda: sampler.sample(
        opt.custom_steps, opt.batch_size, shape, eta=eta, verbose=False
    )[0]


def pack(pictures: Sequence[Path], folder: Path) -> Path:
    """All pictures as one array `arr_0`, (n, h, w, 3) uint8, written one by one: memory does not grow with their number."""
    first = np.asarray(Image.open(pictures[0]))
    shape = (len(pictures), *first.shape)
    target = folder / f"{'x'.join(map(str, shape))}-samples.npz"
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    with (
        atomic_path(target) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for picture in pictures:
            array.write(np.asarray(Image.open(picture)).tobytes())
    return target


def sample(run: inference.Run, opt: argparse.Namespace, made: Finished, checkpoint: Path) -> None:
    """Draw batch after batch; each picture is written as it is finished."""
    said, draw = make_drawing(run.model, opt)
    common = inference_images.described(checkpoint, seed=opt.seed, **said)
    with flags.drawing(run.model, made, opt):
        for _ in trange(opt.n_samples // opt.batch_size, desc="Sampling batches"):
            for image in inference.decode_images(run.model, draw()):
                number = len(made.files)
                target = made.folder / "img" / f"sample_{number:06}.png"
                made.save(inference.to_image(image), target, {"index": number, **common})


def work(opt: argparse.Namespace, overrides: Sequence[str]) -> Finished:
    """Load, sample, save."""
    if not opt.resume:
        raise inference.InferenceError("name a model: -r models/ldm/<model> or -r logs/<run>")
    if opt.n_samples < 1 or opt.batch_size < 1:
        raise inference.InferenceError(
            f"-n {opt.n_samples} --batch_size {opt.batch_size}: both must be at least 1"
        )
    opt.batch_size = min(opt.batch_size, opt.n_samples)
    if left := opt.n_samples % opt.batch_size:
        logging.warning(
            "Whole batches of %d: %d pictures instead of %d",
            opt.batch_size,
            opt.n_samples - left,
            opt.n_samples,
        )
    run = inference.load_run(opt.resume, overrides=overrides, device=inference.choose_device(opt.device))
    require_unconditional(run.model)
    made = Finished(sampling_folder(run, opt.logdir, time.strftime("%Y-%m-%d-%H-%M-%S")))
    OmegaConf.save(
        OmegaConf.create({**vars(opt), "overrides": list(overrides)}), made.folder / "sampling_config.yaml"
    )
    sample(run, opt, made, find_run(opt.resume)[0])
    if made.files:
        made.files.append(pack(made.files, made.folder / "numpy"))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, given = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(given)
    return inference_images.report(lambda: work(opt, overrides))


if __name__ == "__main__":
    sys.exit(main())
