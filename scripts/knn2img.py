"""Text to image with a retrieval-augmented model: the prompt, and the pictures of a database nearest to it.

    python scripts/knn2img.py --prompt "a fox in a forest" --use_neighbors --database artbench-impressionism
    python scripts/knn2img.py --prompt "a fox in a forest" --use_neighbors --database path/to/my/database --knn 4

All flags of scripts/txt2img.py hold. Databases lie in data/rdm/retrieval_databases, searchers in data/rdm/searchers;
scripts/train_searcher.py makes either of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn import Identity

from ldm.inference import InferenceError
from ldm.inference_images import report
from ldm.modules.encoders.retrieval import RetrievalTextEmbedder
from scripts import flags, txt2img

__all__ = ["main"]

# published databases: openimages, and one for each style of ArtBench
STYLES = (
    "art_nouveau", "baroque", "expressionism", "impressionism", "post_impressionism", "realism", "romanticism", "renaissance",
    "surrealism", "ukiyo_e",
)  # fmt: skip
DEFAULTS = {
    "prompt": "a painting of a virus monster playing guitar",
    "steps": 50,
    "n_iter": 1,
    "n_samples": 3,
    "scale": 5.0,
    "ckpt": "models/rdm/rdm768x768/model.ckpt",
}
CONFIG = "configs/retrieval-augmented-diffusion/768x768.yaml"
DATABASE = "artbench-surrealism"


def get_parser() -> argparse.ArgumentParser:
    """The flags of txt2img with the published defaults, and those of retrieval."""
    parser = txt2img.get_parser()
    parser.description = __doc__
    parser.set_defaults(**DEFAULTS)
    group = parser.add_argument_group("retrieval")
    group.add_argument("--use_neighbors", action="store_true", help="look the prompt up in the database")
    group.add_argument(
        "--database",
        default=DATABASE,
        help=f"a folder, or openimages, or artbench- and one of {', '.join(STYLES)}; default: {DATABASE}",
    )
    group.add_argument("--searcher", help="folder of its searcher; default: data/rdm/searchers/DATABASE")
    group.add_argument("--knn", type=int, default=10, help="neighbours of a prompt")
    group.add_argument(
        "--clip_type", default="ViT-L/14", help="OpenAI's CLIP, or a folder with one of open_clip"
    )
    group.add_argument(
        "--n_repeat", type=int, default=1, help="how often the prompt's own vector is repeated"
    )
    return parser


def add_retrieval(model: Any, opt: argparse.Namespace) -> dict[str, Any]:
    """Put CLIP and the database before a model that takes their vectors; returns what is worth noting in the pictures.

    Raises:
        InferenceError: something is missing; the message says what to do.
    """
    own = getattr(model, "cond_stage_model", None)
    if not isinstance(own, Identity | RetrievalTextEmbedder):
        raise InferenceError(
            f"this {type(model).__name__} is conditioned through its own {type(own).__name__}, not on vectors from outside; "
            "if on text, scripts/txt2img.py samples it"
        )
    if opt.prompt_weights or opt.windows:
        raise InferenceError(
            "--prompt_weights and --windows are for encoders of single words; here a prompt is one vector"
        )
    if opt.n_repeat < 1:
        raise InferenceError(f"--n_repeat {opt.n_repeat}: the prompt is needed once at least")
    if opt.database != DATABASE and not opt.use_neighbors:
        logging.warning("--database has no effect without --use_neighbors")
    database = opt.database if opt.use_neighbors else None
    try:
        encoder = RetrievalTextEmbedder(opt.clip_type, opt.n_repeat, database, opt.knn, opt.searcher)
        encoder.text.ensure_weights()
        encoder.retriever  # noqa: B018 - what is wrong with the database should show before sampling
    except (ImportError, OSError) as error:
        raise InferenceError(str(error)) from error
    model.cond_stage_model, model.cond_stage_key = encoder.to(model.device), "caption"
    return {"clip": opt.clip_type} | ({"database": database, "knn": opt.knn} if database else {})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    flags.fill_config(opt, CONFIG)
    return report(lambda: txt2img.run(opt, add_retrieval))


if __name__ == "__main__":
    sys.exit(main())
