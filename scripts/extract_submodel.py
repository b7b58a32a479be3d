"""Cut one part out of a trained model: its weights, named as if it stood alone.

    python scripts/extract_submodel.py logs/<run>/checkpoints/last.ckpt first_stage.ckpt first_stage_model

IN may be a run's folder; OUT ending in .safetensors is written as safetensors, else as `{"state_dict": …}`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taming.checkpoint import find_run, load_state_dict, save_checkpoint, save_safetensors
from taming.util import nearest


def get_parser() -> argparse.ArgumentParser:
    """The published positional arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="IN", help="checkpoint, or folder of a run")
    parser.add_argument("dst", metavar="OUT", help="file to write")
    parser.add_argument("submodel", metavar="SUBMODEL", nargs="?", default="cond_stage_model", help="which part; default: cond_stage_model")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    prefix = opt.submodel.rstrip(".") + "."
    try:
        source, _ = find_run(opt.src)
        weights = load_state_dict(source)
        part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not part:
            parts = {k.split(".")[0] for k in weights if "." in k}
            raise ValueError(f"{source} has no part {opt.submodel!r}. {nearest(opt.submodel, parts)}")
        if opt.dst.endswith(".safetensors"):
            save_safetensors(part, opt.dst)
        else:
            save_checkpoint({"state_dict": part}, opt.dst)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{opt.dst}: {len(part)} entries of {opt.submodel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
