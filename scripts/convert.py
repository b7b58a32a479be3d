"""Convert a model's weights: to safetensors, to the folder of a pipeline of diffusers, between ldm's and sgm's names.

    python scripts/convert.py logs/<run> model.safetensors --ema --dtype fp16
    python scripts/convert.py v1-5-pruned.ckpt stable-diffusion/ --to diffusers
    python scripts/convert.py stable-diffusion/ v1-5.safetensors
    python scripts/convert.py v2-1_768.ckpt sd_2_1_768.safetensors --to sgm

SRC may be a training run's folder, any checkpoint, or a pipeline's folder; optimizer states and counters stay behind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # this checkout first, whatever else owns `taming`

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm import conversion
from ldm.inference import forget_starting_points
from ldm.recognition import published_config, recognise
from taming.checkpoint import Weights, averaged_weights, build_empty, find_run, load_state_dict, save_shards
from taming.util import instantiate_from_config

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"ldm": conversion.to_ldm, "sgm": conversion.to_sgm}
TARGETS = ("safetensors", "diffusers", *LAYOUTS)


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "src", help="training run's folder, checkpoint (.ckpt, .pt, .safetensors, index) or pipeline's folder"
    )
    parser.add_argument("dst", help="file to write, .safetensors; or a folder, --to diffusers")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        help="what to write; default: safetensors under the same names, or diffusers if DST is no .safetensors file",
    )
    parser.add_argument(
        "--config",
        help="configuration of the weights, to write a pipeline's folder; default: the one beside them, or that of the "
        "published model that they are recognised as",
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the moving averages instead of the live weights"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="keep",
        help="type of the networks' weights; tables of noise levels keep theirs",
    )
    parser.add_argument(
        "--drop", nargs="*", default=[], metavar="PREFIX", help="leave out entries that begin so, e.g. loss."
    )
    parser.add_argument(
        "--max_size", type=float, metavar="MB", help="split larger weights into several files, with an index"
    )
    parser.add_argument(
        "--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="notes to store in the file"
    )
    return parser


def settle(opt: argparse.Namespace) -> None:
    """What is to be written, told by DST where --to does not say it.

    Raises:
        ValueError: flags that contradict each other.
    """
    suffix = Path(opt.dst).suffix
    if opt.to is None:
        opt.to = "safetensors" if suffix == ".safetensors" else "diffusers" if not suffix else None
    if opt.to == "diffusers" and suffix == ".safetensors":
        raise ValueError(f"--to diffusers writes a folder, and {opt.dst} is the name of a file")
    if opt.to != "diffusers" and suffix != ".safetensors":
        raise ValueError(f"{opt.dst} must end in .safetensors, or name a folder for --to diffusers")
    if opt.max_size is not None and (opt.to == "diffusers" or opt.max_size <= 0):
        raise ValueError(f"--max_size {opt.max_size:g} splits .safetensors files, and must be above 0 MB")
    if wrong := [m for m in opt.metadata if "=" not in m]:
        raise ValueError(f"--metadata {wrong[0]}: write KEY=VALUE")


def read(opt: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    """The weights, and the model that they belong to, without memory for its parameters; None where it does not matter.

    Raises:
        ValueError: unreadable weights, or no known configuration where one is needed.
        FileNotFoundError: no such file.
    """
    if is_pipeline(opt.src):
        config = (
            conversion.pipeline_model_config(opt.src) if opt.config is None else OmegaConf.load(opt.config)
        )
        model = empty_model(config)
        return conversion.read_pipeline(model, opt.src), model
    source, beside = find_run(opt.src)
    weights = load_state_dict(source)
    if opt.to != "diffusers":
        return weights, None
    files = [opt.config] if opt.config else beside or [configuration_of(source)]
    return weights, empty_model(OmegaConf.load(files[0]))


def configuration_of(source: Path) -> Path:
    """The configuration of the published model that a file is recognised as.

    Raises:
        ValueError: the weights do not tell which of two it is.
    """
    found = recognise(Weights(source))
    if found.twin is not None:
        raise ValueError(
            f"{source} is {found.name}, and its weights do not say whether it predicts ε or v: name --config {found.config} "
            f"or --config {found.twin}"
        )
    return published_config(found.config)


def is_pipeline(src: str) -> bool:
    """Whether it is a pipeline's folder, or that of an autoencoder of diffusers."""
    return (Path(src) / "model_index.json").is_file() or (Path(src) / "config.json").is_file()


def empty_model(config: Any) -> Any:
    """The model of a configuration, whose parameters have no memory."""
    config = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(config), resolve=True))
    forget_starting_points(config.model)
    with build_empty():
        return instantiate_from_config(config.model)


def choose(weights: dict[str, Tensor], opt: argparse.Namespace) -> dict[str, Tensor]:
    """The weights that are wanted, in the type that is wanted.

    Raises:
        ValueError: averages are wanted and there are none.
    """
    if opt.ema:
        weights = averaged_weights(weights)
    weights = {k: v for k, v in weights.items() if not k.startswith(("model_ema.", *opt.drop))}
    return conversion.cast(weights, DTYPES[opt.dtype])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        settle(opt)
        weights, model = read(opt)
        weights = choose(LAYOUTS.get(opt.to, dict)(weights), opt)
        if opt.to == "diffusers":
            parts = conversion.write_pipeline(model, opt.dst, weights)
            written = f"{', '.join(parts)}, {sum(f.stat().st_size for f in Path(opt.dst).rglob('*') if f.is_file()) / 1e6:.2f} MB"
        else:
            largest = sys.maxsize if opt.max_size is None else int(opt.max_size * 1e6)
            files = save_shards(weights, opt.dst, largest, dict(m.split("=", 1) for m in opt.metadata))
            total = sum(file.stat().st_size for file in files) / 1e6
            written = f"{len(weights)} tensors in {len(files)} {'file' if len(files) == 1 else 'files'}, {total:.2f} MB"
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{opt.dst}: {written}, {sum(v.numel() for v in weights.values()) / 1e6:.2f} M numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
