"""Text to image.

    python scripts/txt2img.py --ckpt logs/<run> --prompt "red heart"
    python scripts/txt2img.py --config configs/stable-diffusion/v1-inference.yaml --ckpt model.ckpt --prompt "…" --plms

Pictures go to OUTDIR/samples/00000.png, … and a grid of all to OUTDIR/grid-0000.png; nothing there is overwritten.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

import torch
from pytorch_lightning import seed_everything
from tqdm import trange

from ldm import inference
from taming.checkpoint import load_model_from_config

__all__ = ["load_model_from_config", "main"]

# The published scripts differ in their defaults; a configuration's path says which one it belongs to.
FAMILIES: dict[str, dict[str, Any]] = {
    "v2": {
        "prompt": "a professional photograph of an astronaut riding a triceratops",
        "steps": 50,
        "n_iter": 3,
        "n_samples": 3,
        "scale": 9.0,
    },
    "v1": {
        "prompt": "a painting of a virus monster playing guitar",
        "steps": 50,
        "n_iter": 2,
        "n_samples": 3,
        "scale": 7.5,
    },
    "txt2img-1p4B": {
        "prompt": "a painting of a virus monster playing guitar",
        "steps": 200,
        "n_iter": 1,
        "n_samples": 4,
        "scale": 5.0,
    },
    "own": {"prompt": "red heart", "steps": 50, "n_iter": 1, "n_samples": 4, "scale": 3.0},
}
PUBLISHED_V1 = ("configs/stable-diffusion/v1-inference.yaml", "models/ldm/stable-diffusion-v1/model.ckpt")
LAION400M = (
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "models/ldm/text2img-large/model.ckpt",
    "outputs/txt2img-samples-laion400m",
)


def get_parser() -> argparse.ArgumentParser:
    """The flags of the three published scripts, both spellings where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", nargs="?", help="what to draw")
    prompt.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    prompt.add_argument("--from-file", dest="from_file", help="read prompts from this file, one a line")
    prompt.add_argument("--repeat", type=int, default=1, help="how often to repeat each prompt of the file")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt", help="a training run's folder (logs/…), or a checkpoint; default: the newest run in logs/"
    )
    model.add_argument("--config", help="configuration of the checkpoint; default: the one that lies with it")
    model.add_argument("--laion400m", action="store_true", help="the text2img-large model")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    model.add_argument(
        "--precision",
        choices=["full", "autocast"],
        default="autocast",
        help="half precision on a GPU, or none",
    )
    model.add_argument("--bf16", action="store_true", help="bfloat16 instead")
    model.add_argument("--torchscript", action="store_true", help="accepted and not needed any more")
    model.add_argument("--ipex", action="store_true", help="accepted and not needed any more")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--ddim_steps", "--steps", dest="steps", type=int, help="number of steps")
    sampling.add_argument("--plms", action="store_true", help="sample with PLMS")
    sampling.add_argument(
        "--dpm_solver", "--dpm", dest="dpm", action="store_true", help="sample with DPM-Solver++"
    )
    sampling.add_argument("--sampler", choices=sorted(inference.SAMPLERS), help="or any of these by name")
    sampling.add_argument(
        "--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    sampling.add_argument(
        "--scale", type=float, help="guidance: ê = e(uncond) + scale · (e(cond) - e(uncond))"
    )
    sampling.add_argument("--seed", type=int, default=42, help="for reproducible pictures")
    sampling.add_argument("--fixed_code", action="store_true", help="the same starting noise for every batch")

    tokens = parser.add_argument_group("sampling with a token transformer")
    tokens.add_argument("--top_k", type=int, default=100, help="draw among so many codes; 0: all")
    tokens.add_argument(
        "--top_p", type=float, help="draw among the codes that reach this probability together"
    )
    tokens.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above more varied")

    size = parser.add_argument_group("size")
    size.add_argument("--H", type=int, help="height in pixels; default: the model's")
    size.add_argument("--W", type=int, help="width in pixels; default: the model's")
    size.add_argument("--C", type=int, help="channels of the latents; default: the model's")
    size.add_argument("--f", type=int, help="factor of the first stage; default: the model's")

    output = parser.add_argument_group("output")
    output.add_argument("--outdir", help="folder for the pictures; default: outputs/txt2img-samples")
    output.add_argument("--n_samples", type=int, help="pictures a batch (and a prompt, without a file)")
    output.add_argument("--n_iter", type=int, help="how often to go through the prompts")
    output.add_argument("--n_rows", type=int, default=0, help="columns of the grid; default: n_samples")
    output.add_argument("--skip_grid", action="store_true", help="no grid")
    output.add_argument("--skip_save", action="store_true", help="no single pictures")
    return parser


def fill_defaults(opt: argparse.Namespace) -> None:
    """Settle on a model, and on the defaults of the script that it was published with."""
    if opt.laion400m:
        config, ckpt, outdir = LAION400M
        opt.config, opt.ckpt, opt.outdir = opt.config or config, opt.ckpt or ckpt, opt.outdir or outdir
    if opt.ckpt is None:
        published = Path(PUBLISHED_V1[1])
        runs = sorted(Path("logs").glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if opt.config is None and runs:
            opt.ckpt = str(runs[-1].parents[1])
            logging.info("Sampling from the newest run: %s", opt.ckpt)
        elif published.is_file():
            opt.config, opt.ckpt = opt.config or PUBLISHED_V1[0], str(published)
        else:
            raise inference.InferenceError(
                f"name a model with --ckpt: a training run's folder or a checkpoint (there is none in logs/, nor at {published})"
            )
    opt.outdir = opt.outdir or "outputs/txt2img-samples"
    family = next((name for name in FAMILIES if opt.config and name in Path(opt.config).stem), "own")
    for key, value in FAMILIES[family].items():
        if getattr(opt, key) is None:
            setattr(opt, key, value)


class LatentArtist:
    """Draws with a latent diffusion model.

    Args:
        model: conditioned on text.
        opt: the flags.
        device: of the model.

    Raises:
        InferenceError: a size that the first stage cannot make.
    """

    def __init__(self, model: Any, opt: argparse.Namespace, device: torch.device) -> None:
        self.model, self.opt, self.device = model, opt, device
        flow = model.parameterization == "flow"
        name = opt.sampler or ("plms" if opt.plms else "dpm" if opt.dpm else "flow" if flow else "ddim")
        self.sampler = inference.SAMPLERS[name](model)
        size, factor = inference.image_size(model)
        factor = opt.f or factor
        height, width, channels = opt.H or size, opt.W or size, opt.C or model.channels
        if height % factor or width % factor:
            raise inference.InferenceError(
                f"--H {height} --W {width}: both must be multiples of {factor}, the factor of the first stage"
            )
        self.shape = (channels, height // factor, width // factor)
        self.details = {"sampler": name, "steps": opt.steps, "eta": opt.ddim_eta, "size": f"{width}x{height}"}
        self.start: torch.Tensor | None = None

    def begin(self) -> None:
        """Draw the starting noise that `--fixed_code` shares between batches."""
        if self.opt.fixed_code:
            self.start = torch.randn([self.opt.n_samples, *self.shape], device=self.device)

    def draw(self, prompts: list[str]) -> torch.Tensor:
        """Images (b, 3, h, w) in [0, 1]."""
        opt, x_T = self.opt, None if self.start is None else self.start[: len(prompts)]
        return inference.sample_text(
            self.model, self.sampler, prompts, opt.steps, self.shape, opt.scale, opt.ddim_eta, x_T, opt.negative_prompt
        )  # fmt: skip


class TokenArtist:
    """Draws with a token transformer, code by code.

    Args:
        model: conditioned on text.
        opt: the flags.
        device: of the model.

    Raises:
        InferenceError: a flag of diffusion models, or guidance for a model that was not trained for it.
    """

    def __init__(self, model: Any, opt: argparse.Namespace, device: torch.device) -> None:
        self.model, self.opt = model, opt
        foreign = ["sampler", "plms", "dpm", "fixed_code", "negative_prompt", "H", "W", "C", "f"]
        if given := [name for name in foreign if getattr(opt, name)]:
            raise inference.InferenceError(
                f"--{given[0]} is for diffusion models; this is a token transformer, which takes --top_k, --top_p, --temperature"
            )
        if model.null_cond is None and opt.scale != 1.0:
            logging.info(
                "This model was trained without dropped conditions: no guidance, --scale has no effect."
            )
            opt.scale = 1.0
        encoder = model.first_stage_model.encoder
        side = encoder.resolution // 2 ** (encoder.num_resolutions - 1)
        self.latent = (model.first_stage_model.quantize.e_dim, side, side)
        self.details = {
            "sampler": "tokens", "steps": side * side, "top_k": opt.top_k, "top_p": opt.top_p, "temperature": opt.temperature,
            "size": f"{encoder.resolution}x{encoder.resolution}",
        }  # fmt: skip

    def begin(self) -> None:
        """There is nothing to share between batches."""

    @torch.no_grad()
    def draw(self, prompts: list[str]) -> torch.Tensor:
        """Images (b, 3, h, w) in [0, 1]."""
        opt, steps = self.opt, self.latent[1] * self.latent[2]
        cond = self.model.condition_tokens(prompts)
        codes = self.model.sample(
            cond[:, :0], cond, steps, opt.temperature, True, opt.top_k, guidance=opt.scale, top_p=opt.top_p, progress=True
        )  # fmt: skip
        images = self.model.decode_to_img(codes, (len(prompts), *self.latent))
        return ((images.float() + 1.0) / 2.0).clamp(0.0, 1.0)


def run(opt: argparse.Namespace) -> list[Path]:
    """Load, sample, save; returns the pictures' paths."""
    fill_defaults(opt)
    for flag in ("torchscript", "ipex"):
        if getattr(opt, flag):
            logging.warning("--%s has no effect: PyTorch's own kernels do its work now", flag)
    device = inference.choose_device(opt.device)
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device)
    inference.require_text(model)
    artist = (TokenArtist if hasattr(model, "transformer") else LatentArtist)(model, opt, device)
    batches = inference.read_prompts(opt.prompt, opt.from_file, opt.n_samples, opt.repeat)

    outdir = Path(opt.outdir)
    (outdir / "samples").mkdir(parents=True, exist_ok=True)
    number = inference.next_number(outdir / "samples", r"(\d+)\.png")
    common = {
        "seed": opt.seed, **artist.details, "scale": opt.scale, "checkpoint": path.name, "checkpoint_sha256": inference.file_hash(path),
        "software": "latent-generative-models",
    }  # fmt: skip
    # after loading, so that the pictures depend on the seed alone and not on how many numbers the constructors drew
    seed_everything(opt.seed, verbose=False)
    artist.begin()
    saved, images = [], []
    with inference.precision_scope(device, opt.precision, opt.bf16), model.ema_scope():
        for _ in trange(opt.n_iter, desc="Sampling", disable=opt.n_iter == 1):
            for prompts in batches:
                made = artist.draw(prompts)
                for prompt, image in zip(prompts, made, strict=True):
                    images.append(image)
                    if not opt.skip_save:
                        target = outdir / "samples" / f"{number:05}.png"
                        details = {
                            "prompt": prompt,
                            "negative_prompt": opt.negative_prompt,
                            "index": len(images) - 1,
                            **common,
                        }
                        inference.save_png(inference.to_image(image), target, details)
                        saved.append(target)
                        number += 1
    if not opt.skip_grid:
        grid = outdir / "grid-{:04}.png".format(inference.next_number(outdir, r"grid-(\d+)\.png"))
        prompts = "\n".join(p for _ in range(opt.n_iter) for batch in batches for p in batch)
        inference.save_grid(images, opt.n_rows or opt.n_samples, grid, {"prompts": prompts, **common})
        saved.append(grid)
    return saved


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opt = get_parser().parse_args(argv)
    try:
        saved = run(opt)
    except (inference.InferenceError, ValueError, FileNotFoundError) as error:
        # the library's ValueErrors (sizes, step counts, checkpoints, configurations) are written for users
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(saved)} files in {opt.outdir}" + (f", the last is {saved[-1]}" if saved else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
