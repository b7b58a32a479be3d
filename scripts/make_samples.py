"""Re-draw the images of a data set with a token transformer, at any size: each image's condition is kept, its codes are drawn.

    python scripts/make_samples.py -r logs/<run> --outdir samples --top_k 100 --temperature 1.0

Writes originals/, reconstructions/ and samples/ below <outdir>/<step>_<top_k>_<temperature>/. Images larger than the training crop are
drawn by a sliding window of attention. The data is that of the configurations, alphabetically the first split.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.inference import InferenceError, Run, choose_device, load_run, save_png, to_image
from scripts.sample_fast import latent_shape, require_tokens
from taming.checkpoint import CheckpointError
from taming.data.utils import custom_collate
from taming.models.sliding_window import sample_windows
from taming.training.arguments import split_overrides
from taming.util import ConfigError, instantiate_from_config

FOLDERS = ("originals", "reconstructions", "samples")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `make_samples`, `make_scene_samples` and `sample_conditional` share."""
    parser.add_argument("-r", "--resume", help="folder of a run, or a checkpoint in it")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument("-c", "--config", nargs="?", const=True, help="use this configuration alone; without a value the last of -b")  # fmt: skip
    parser.add_argument("--ignore_base_data", action="store_true", help="drop the files' data sections; give one by a.b=c")  # fmt: skip
    parser.add_argument("--top_k", type=int, default=100, help="draw among so many codes")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above more varied")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("-s", "--seed", type=int, help="for pictures that repeat")


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--device` and `--seed`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--outdir", required=True, help="folder for the pictures")
    return parser


def load(opt: argparse.Namespace, overrides: list[str]) -> tuple[Run, Dataset]:
    """The transformer that the flags name, and its data set.

    Raises:
        InferenceError: no transformer, or no data.
    """
    device = choose_device(opt.device)
    options = {"only_config": opt.config, "ignore_base_data": opt.ignore_base_data}
    run = load_run(opt.resume, opt.base, overrides, device, **options)
    require_tokens(run.model, opt.resume)
    run.model.downsample_cond_size = -1
    if "data" not in run.config:
        raise InferenceError("no data: give a data section with -b, or by data.target=… data.params.…=…")
    data = instantiate_from_config(run.config.data)
    data.prepare_data()
    data.setup()
    split = min(data.datasets)
    print(f"data: {split}, {len(data.datasets[split])} pictures")
    return run, data.datasets[split]


def to_pixels(image: Tensor) -> Any:
    """(3, h, w) in [-1, 1] → a picture."""
    return to_image(((image + 1.0) / 2.0).clamp(0.0, 1.0))


def window_of(model: Any) -> int:
    """Side of the code maps that the transformer was trained on."""
    return latent_shape(model)[1]


def as_map(tokens: Tensor, codes: Tensor) -> Tensor:
    """A condition's tokens as a map (b, h, w) if there is one for each code, else as rows (b, n)."""
    tokens = tokens.reshape(len(codes), -1)
    return tokens.reshape(codes.shape) if tokens.numel() == codes.numel() else tokens


@torch.no_grad()
def redraw_batch(model: Any, batch: Any, top_k: int, temperature: float, progress: bool = True) -> dict[str, Tensor]:  # fmt: skip
    """Originals, reconstructions and samples of a batch, each (b, 3, h, w) in [-1, 1]."""
    x, c = (t.to(model.device) if isinstance(t, Tensor) else t for t in model.get_xc(batch))
    quant, codes = model.encode_to_z(x)
    b, e, h, w = quant.shape
    empty = torch.zeros(b, h, w, dtype=torch.long, device=codes.device)
    condition = as_map(model.encode_to_c(c)[1], empty)
    window = min(window_of(model), h, w)
    drawn = sample_windows(
        model, empty, condition, window=window, top_k=top_k, temperature=temperature, progress=progress
    )
    decode = model.first_stage_model
    return {
        "originals": x,
        "reconstructions": decode.decode(quant),
        "samples": decode.decode(decode.quantize.get_codebook_entry(drawn.flatten(), (b, h, w, e))),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        run, dataset = load(opt, overrides)
        if opt.seed is not None:
            torch.manual_seed(opt.seed)
        root = Path(opt.outdir) / f"{run.global_step:06}_{opt.top_k}_{opt.temperature}"
        loader: Any = DataLoader(dataset, batch_size=1, shuffle=False, collate_fn=custom_collate)
        with run.model.ema_scope():
            for index, batch in enumerate(tqdm(loader, desc="pictures")):
                pictures = redraw_batch(run.model, batch, opt.top_k, opt.temperature)
                for name in FOLDERS:
                    save_png(to_pixels(pictures[name][0]), root / name / f"{index:06}.png")
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures are in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
