"""Samplers × steps on a trained text-to-image model: how far from where they lead with many steps, and from real pictures.

    python scripts/evaluate_samplers.py -r logs/<run> --outfile samplers.png

Every sampler starts from the same noise and the same captions, those of pictures of the run's own data. Printed as markdown tables:

- network calls (a sampler may take a step more than asked for; guidance doubles the batch, not the calls);
- root mean square distance of the latents to those of the reference, one sampler with many steps;
- Fréchet distances between Gaussians fitted to numbers of the samples and of all pictures of the data set (Heusel et al.
  2017, equation 6, with latents instead of Inception's features): "layout", each channel's latents averaged to 4 × 4
  numbers, and "texture", patches of 3 × 3 latents, the same wherever they lie. Latents of pictures are drawn from the
  first stage's posterior, as in training. The distances depend on the number of samples: compare within one run only, and
  with what the captions' own pictures give.

Latents have unit variance. Uses the averaged weights where the run kept an average. Other data: data.params.train.…=…
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ldm.inference import SAMPLERS, InferenceError, choose_device, load_run, require_text, save_grid
from ldm.util import log_txt_as_img
from taming.checkpoint import CheckpointError
from taming.data.utils import custom_collate
from taming.models.base import image_from_batch
from taming.training.arguments import split_overrides
from taming.util import ConfigError, instantiate_from_config

Cell = tuple[str, int]  # a sampler and its number of steps


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument(
        "--samplers",
        nargs="+",
        choices=sorted(SAMPLERS),
        default=["ddim", "plms", "dpm", "unipc", "deis"],
        help="to compare",
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[4, 6, 8, 12, 20, 50], help="numbers of steps to compare"
    )
    parser.add_argument("--reference", choices=sorted(SAMPLERS), default="dpm", help="sampler of the reference")  # fmt: skip
    parser.add_argument("--reference_steps", type=int, default=250, help="steps of the reference")
    parser.add_argument("-n", "--n_samples", type=int, default=128, help="captions, spread over the data set")
    parser.add_argument("--split", default="train", help="section of the configuration's data to take them from")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance; 1 is none")
    parser.add_argument(
        "--time_spacing",
        choices=["uniform", "trailing"],
        default="uniform",
        help="which steps to visit; uniform is the published way",
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="of the noise, and of captions drawn among several names"
    )
    parser.add_argument("--outfile", help="picture strip: a row for each sampler, a column for each number of steps")  # fmt: skip
    parser.add_argument("--columns", type=int, default=3, help="captions in the strip")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


# ---------------------------------------------------------------------------------------------------------- distances


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of each pair of latents (n, c, h, w), the mean over pairs."""
    return float((a - b).square().flatten(1).mean(1).sqrt().mean())


def layout(z: Tensor) -> Tensor:
    """Latents (n, c, h, w) → each channel averaged to 4 × 4 numbers, (n, 16 c)."""
    return F.adaptive_avg_pool2d(z, 4).flatten(1)


def texture(z: Tensor) -> Tensor:
    """Latents (n, c, h, w) → all their patches of 3 × 3, (n (h - 2) (w - 2), 9 c)."""
    return F.unfold(z, 3).transpose(1, 2).flatten(0, 1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"layout": layout, "texture": texture}


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance (squared, as is usual) between Gaussians fitted to rows a (n, d) and b (m, d).

    Raises:
        ValueError: fewer than two rows.

    Source: Dowson & Landau 1982; Heusel et al. 2017, equation 6.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} samples have no covariance; take two or more")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # the product of two covariances has the eigenvalues of a positive semi-definite matrix
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


# ----------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def encode(model: Any, dataset: Any, batch_size: int) -> tuple[Tensor, list[str]]:
    """Latents (n, c, h, w) of a data set's pictures, drawn as in training, and their captions."""
    latents, captions = [], []
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=custom_collate), desc="real pictures"):
        posterior = model.encode_first_stage(image_from_batch(batch, model.first_stage_key).to(model.device))
        latents.append(model.get_first_stage_encoding(posterior).float().cpu())
        captions += batch[model.cond_stage_key]
    return torch.cat(latents), captions


class Comparison:
    """Samples of the same captions from the same noise, by any sampler in any number of steps.

    Args:
        model: a latent diffusion model conditioned on text, in eval mode.
        captions: n texts.
        noise: what to start from, (n, c, h, w).
        scale: of classifier-free guidance.
        batch_size: samples at a time.
        time_spacing: see `LatentSampler.sample`.
    """

    def __init__(
        self, model: Any, captions: Sequence[str], noise: Tensor, scale: float, batch_size: int, time_spacing: str
    ) -> None:  # fmt: skip
        self.model, self.captions, self.noise = model, list(captions), noise
        self.scale, self.batch_size, self.time_spacing = scale, batch_size, time_spacing

    @torch.no_grad()
    def draw(self, name: str, steps: int) -> tuple[Tensor, int]:
        """Latents (n, c, h, w), and how often the network was called for one of them."""
        sampler, made, calls = SAMPLERS[name](self.model), [], 0
        predict = self.model.apply_model

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return predict(*args, **kwargs)

        starts = range(0, len(self.noise), self.batch_size)
        self.model.apply_model = counted
        try:
            for start in starts:
                x_T = self.noise[start : start + self.batch_size].to(self.model.device)
                made.append(self._batch(sampler, steps, x_T, self.captions[start : start + len(x_T)]))
        finally:
            self.model.apply_model = predict
        return torch.cat(made), calls // len(starts)

    def _batch(self, sampler: Any, steps: int, x_T: Tensor, captions: list[str]) -> Tensor:
        model = self.model
        uc = model.get_learned_conditioning([""] * len(captions)) if self.scale != 1.0 else None
        z, _ = sampler.sample(
            S=steps, batch_size=len(x_T), shape=list(x_T.shape[1:]), conditioning=model.get_learned_conditioning(captions),
            x_T=x_T, verbose=False, unconditional_guidance_scale=self.scale, unconditional_conditioning=uc,
            time_spacing=self.time_spacing,
        )  # fmt: skip
        return z.float().cpu()


# ------------------------------------------------------------------------------------------------------------ showing


def table(title: str, rows: Mapping[str, Iterable[str]], columns: Iterable[Any]) -> str:
    """A markdown table; `title` heads its first column."""
    heads = [title, *map(str, columns)]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join([name, *cells]) for name, cells in rows.items()]
    return "\n".join(f"| {line} |" for line in lines)


def strip(pictures: Mapping[Cell, Tensor], samplers: Sequence[str], steps: Sequence[int]) -> list[Tensor]:
    """Cells of a grid, row by row, in [0, 1]: numbers of steps on top, samplers at the left.

    Args:
        pictures: (k, 3, h, w) by sampler and number of steps.
        samplers: rows.
        steps: columns, each of k pictures.
    """
    first = next(iter(pictures.values()))
    blank = torch.ones_like(first[0])

    def label(text: str) -> Tensor:
        height, width = first.shape[-2:]
        return (log_txt_as_img((width, height), [text], size=max(10, width // 4))[0] + 1) / 2

    cells = [blank]
    for count in steps:
        cells += [label(str(count)), *[blank] * (len(first) - 1)]
    for name in samplers:
        cells += [label(name), *(picture for count in steps for picture in pictures[name, count])]
    return cells


@torch.no_grad()
def decode(model: Any, z: Tensor) -> Tensor:
    """Latents → pictures (n, 3, h, w) in [0, 1]."""
    return ((model.decode_first_stage(z.to(model.device)).float().cpu() + 1) / 2).clamp(0, 1)


# -------------------------------------------------------------------------------------------------------------- whole


def real_pictures(config: Any, split: str) -> Any:
    """The data set of a configuration's section, each picture once.

    Raises:
        InferenceError: there is no such section.
    """
    sections = config.get("data", {}).get("params", {})
    if split not in sections:
        raise InferenceError(f"the configuration's data has no section {split!r}; choose it with --split")
    dataset = instantiate_from_config(sections[split])
    return Subset(dataset, range(len(dataset) // getattr(dataset, "repeats", 1)))


def evaluate(opt: argparse.Namespace, overrides: list[str]) -> str:
    """Sample, measure, draw; returns the report."""
    run = load_run(opt.resume, opt.base, overrides, choose_device(opt.device))
    model = run.model
    require_text(model)
    torch.manual_seed(opt.seed)  # captions may be drawn among several names
    z_all, captions = encode(model, real_pictures(run.config, opt.split), opt.batch_size)
    n = min(opt.n_samples, len(z_all))
    chosen = torch.arange(n) * len(z_all) // n
    z_real, noise = z_all[chosen], torch.randn(n, *z_all.shape[1:])
    todo = {(opt.reference, opt.reference_steps), *((s, k) for s in opt.samplers for k in opt.steps)}
    made: dict[Cell, Tensor] = {}
    calls: dict[Cell, int] = {}
    compared = Comparison(
        model, [captions[i] for i in chosen], noise, opt.scale, opt.batch_size, opt.time_spacing
    )
    # few steps first: what cannot be sampled is known before the reference has taken its many
    with model.ema_scope(), tqdm(sorted(todo, key=lambda cell: cell[::-1])) as bar:
        for cell in bar:
            bar.set_description(f"{cell[0]}, {cell[1]} steps")
            made[cell], calls[cell] = compared.draw(*cell)
    if opt.outfile:
        few = torch.arange(opt.columns) * n // opt.columns
        pictures = {cell: decode(model, z[few]) for cell, z in made.items()}
        cells = strip(pictures, opt.samplers, opt.steps)
        save_grid(cells, 1 + opt.columns * len(opt.steps), Path(opt.outfile))
    return report(opt, run.global_step, made, calls, z_real, z_all)


def report(
    opt: argparse.Namespace, global_step: int, made: Mapping[Cell, Tensor], calls: Mapping[Cell, int], z_real: Tensor, z_all: Tensor
) -> str:  # fmt: skip
    """All tables, with what they were made of and with."""
    target = made[opt.reference, opt.reference_steps]
    real = {name: features(z_all) for name, features in FEATURES.items()}

    def distances(z: Tensor) -> dict[str, str]:
        return {name: f"{frechet(features(z), real[name]):.2f}" for name, features in FEATURES.items()}

    measured = {cell: distances(z) for cell, z in made.items()}
    measures: dict[str, Callable[[Cell], str]] = {
        "network calls": lambda cell: str(calls[cell]),
        "distance to the reference": lambda cell: f"{rms(made[cell], target):.3f}",
        "Fréchet distance, layout": lambda cell: measured[cell]["layout"],
        "Fréchet distance, texture": lambda cell: measured[cell]["texture"],
    }
    parts = [
        f"step {global_step}, {len(z_real)} captions, guidance {opt.scale:g}, {opt.time_spacing} steps, seed {opt.seed}; "
        f"torch {torch.__version__}, {platform.machine()}"
    ]
    for title, z in {
        f"reference ({opt.reference}, {opt.reference_steps} steps)": target,
        "captions' own pictures": z_real,
    }.items():
        parts.append(
            f"{title}: Fréchet distance "
            + ", ".join(f"{name} {value}" for name, value in distances(z).items())
        )
    for title, measure in measures.items():
        rows = {name: [measure((name, k)) for k in opt.steps] for name in opt.samplers}
        parts.append(table(title, rows, opt.steps))
    return "\n\n".join(parts)


def print_report(
    parser: argparse.ArgumentParser, evaluate: Callable[[argparse.Namespace, list[str]], str], argv: list[str] | None
) -> int:  # fmt: skip
    """Print what `evaluate` makes of a command line's flags and overrides, or the one sentence that says what is wrong; returns the
    exit status.
    """
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = parser.parse_args(flags)
    try:
        print(evaluate(opt, overrides))
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return print_report(get_parser(), evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
