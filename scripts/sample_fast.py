"""Many samples of a class-conditional or unconditional token transformer, as PNG files.

    python scripts/sample_fast.py -r logs/<run> -n 4 --classes 0,7 -k 250 -p 0.95

Pictures go to <outdir>/samples/top_k_…_temp_…_top_p_…/<step>/[<class>/]000000.png; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.inference import InferenceError, choose_device, load_run, save_png, to_image
from taming.checkpoint import CheckpointError
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.transformer.mingpt import sample_with_past
from taming.training.arguments import split_overrides


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--device` and `--seed`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-o", "--outdir", default="", help="default: the run's folder")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument("-n", "--num_samples", type=int, default=50000, help="pictures (of each class)")
    parser.add_argument("--batch_size", type=int, default=25, help="pictures at once")
    parser.add_argument("-k", "--top_k", type=int, default=250, help="draw among so many codes; 0: all")
    parser.add_argument(
        "-t", "--temperature", type=float, default=1.0, help="below 1 safer, above more varied"
    )
    parser.add_argument("-p", "--top_p", type=float, default=1.0, help="draw among the codes that reach this probability")  # fmt: skip
    parser.add_argument("--classes", default="imagenet", help="0,7,… or imagenet (0 to 999)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("-s", "--seed", type=int, help="for pictures that repeat")
    return parser


def _draw(
    model: Any,
    start: Tensor,
    steps: int,
    temperature: float | None,
    top_k: int | None,
    callback: Callable[[int], Any] | None,
    latent: tuple[int, int, int],
    verbose_time: bool,
    top_p: float | None,
) -> dict[str, Any]:
    began = time.time()
    codes = sample_with_past(
        start, model.transformer, steps, 1.0 if temperature is None else temperature, True, top_k, top_p, callback
    )  # fmt: skip
    drawn = time.time()
    images = model.decode_to_img(codes, (len(start), *latent))
    if verbose_time:
        print(f"{len(start)} pictures: {drawn - began:.2f} s for the codes, {time.time() - drawn:.2f} s to decode")  # fmt: skip
    return {"samples": images}


@torch.no_grad()
def sample_classconditional(
    model: Any,
    batch_size: int,
    class_label: int,
    steps: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    callback: Callable[[int], Any] | None = None,
    dim_z: int = 256,
    h: int = 16,
    w: int = 16,
    verbose_time: bool = False,
    top_p: float | None = None,
) -> dict[str, Any]:
    """Samples of one class.

    Args:
        model: a class-conditional Net2NetTransformer.
        batch_size: pictures.
        class_label: number of the class.
        steps: codes of a picture, h · w.
        temperature, top_k, top_p: see `taming.modules.transformer.sampling.Draw`; None for 1, all, all.
        callback: called with the number of each step.
        dim_z, h, w: shape of the latents.
        verbose_time: print how long it took.

    Returns:
        `samples` (b, 3, H, W) in [-1, 1], and `class_label` (b, 1).
    """
    labels = torch.full((batch_size, 1), class_label, device=model.device)
    start = model.encode_to_c(labels[:, 0])[1].reshape(batch_size, -1)
    log = _draw(model, start, steps, temperature, top_k, callback, (dim_z, h, w), verbose_time, top_p)
    return log | {"class_label": labels}


@torch.no_grad()
def sample_unconditional(
    model: Any,
    batch_size: int,
    steps: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[int], Any] | None = None,
    dim_z: int = 256,
    h: int = 16,
    w: int = 16,
    verbose_time: bool = False,
) -> dict[str, Any]:
    """Samples of an unconditional Net2NetTransformer; as `sample_classconditional`, from its start token."""
    start = model.condition_tokens().repeat(batch_size, 1)
    return _draw(model, start, steps, temperature, top_k, callback, (dim_z, h, w), verbose_time, top_p)


def save_from_logs(log: Mapping[str, Any], logdir: str | Path, base_count: int, key: str = "samples") -> int:
    """Write pictures (b, 3, h, w) in [-1, 1] as `logdir/{count:06}.png`; returns the next count."""
    for image in log[key]:
        save_png(to_image(((image + 1.0) / 2.0).clamp(0.0, 1.0)), Path(logdir) / f"{base_count:06}.png")
        base_count += 1
    return base_count


def require_tokens(model: Any, name: str) -> None:
    """Refuse what is no token transformer.

    Args:
        model: what was loaded.
        name: what the user calls it.

    Raises:
        InferenceError: says what it is.
    """
    if not isinstance(model, Net2NetTransformer):
        raise InferenceError(f"{name} is a {type(model).__name__}, no token transformer")


def latent_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a model's training images."""
    encoder = model.first_stage_model.encoder
    side = encoder.resolution // 2 ** (encoder.num_resolutions - 1)
    return model.first_stage_model.quantize.e_dim, side, side


def run(
    logdir: str | Path,
    model: Any,
    batch_size: int,
    temperature: float | None,
    top_k: int | None,
    unconditional: bool = True,
    num_samples: int = 50000,
    given_classes: Sequence[int] | None = None,
    top_p: float | None = None,
) -> None:
    """Draw `num_samples` pictures (of each class) and write those that are not there yet.

    Raises:
        InferenceError: a class that the model does not know.
    """
    dim_z, h, w = latent_shape(model)
    options: dict[str, Any] = {"steps": h * w, "temperature": temperature, "top_k": top_k, "top_p": top_p, "dim_z": dim_z, "h": h, "w": w}  # fmt: skip
    known = getattr(model.cond_stage_model, "n_classes", 0)
    jobs: list[tuple[Path, int | None]] = [(Path(logdir), None)]
    if not unconditional:
        classes = range(known) if given_classes is None else given_classes
        if wrong := [c for c in classes if not 0 <= c < known]:
            raise InferenceError(f"--classes: this model knows the classes 0 to {known - 1}, not {wrong[0]}")
        jobs = [(Path(logdir) / str(c), c) for c in classes]
    with tqdm(total=num_samples * len(jobs), unit="picture") as bar:
        for folder, label in jobs:
            count = 0
            while count < num_samples:
                size = min(batch_size, num_samples - count)
                if all((folder / f"{count + i:06}.png").is_file() for i in range(size)):
                    count += size
                elif label is None:
                    count = save_from_logs(sample_unconditional(model, size, **options), folder, count)
                else:
                    log = sample_classconditional(model, size, label, **options)
                    count = save_from_logs(log, folder, count)
                bar.update(size)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        loaded = load_run(opt.resume, opt.base, overrides, choose_device(opt.device), strict=True)
        require_tokens(loaded.model, opt.resume)
        unconditional = loaded.model.be_unconditional
        if not unconditional and not hasattr(loaded.model.cond_stage_model, "n_classes"):
            raise InferenceError(
                f"this model is conditioned on {loaded.model.cond_stage_key!r}, not on classes; use scripts/make_samples.py"
            )
        try:
            classes = range(1000) if opt.classes == "imagenet" else [int(c) for c in opt.classes.split(",")]
        except ValueError as error:
            raise InferenceError(f"--classes {opt.classes}: write 0,7,… or imagenet") from error
        if opt.seed is not None:
            torch.manual_seed(opt.seed)
        root = Path(opt.outdir) if opt.outdir else loaded.folder
        settings = f"top_k_{opt.top_k}_temp_{opt.temperature:.2f}_top_p_{opt.top_p}"
        folder = root / "samples" / settings / str(loaded.global_step)
        with loaded.model.ema_scope():
            run(folder, loaded.model, opt.batch_size, opt.temperature, opt.top_k, unconditional, opt.num_samples, classes, opt.top_p)  # fmt: skip
    except (InferenceError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
