"""Make a searcher for a retrieval database, and the database itself of one's own pictures.

    python scripts/train_searcher.py -d data/rdm/retrieval_databases/openimages -t data/rdm/searchers/openimages
    python scripts/train_searcher.py -d data/rdm/retrieval_databases/mine -t data/rdm/searchers/mine --images ~/pictures

Below 100,000 vectors the search is exact, and above in √n lists, of which a twentieth is searched.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.data.retrieval import RetrievalDatabase, Searcher, recall
from ldm.data.retrieval_build import build_database
from ldm.inference import InferenceError, choose_device
from ldm.modules.encoders.image import ClipImageEmbedder

__all__ = ["main"]


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and those for one's own pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-d", "--database", default="data/rdm/retrieval_databases/openimages", help="folder of .npz files"
    )
    parser.add_argument(
        "-t", "--target_path", default="data/rdm/searchers/openimages", help="folder for the searcher"
    )
    parser.add_argument(
        "-k", "--knn", type=int, default=20, help="neighbours by which a search in lists is compared with an exact one"
    )  # fmt: skip
    own = parser.add_argument_group("a database of one's own pictures")
    own.add_argument("--images", help="folder of pictures; their database is written to DATABASE first")
    own.add_argument(
        "--clip_type", default="ViT-L/14", help="OpenAI's CLIP model, or a folder with one of open_clip"
    )
    own.add_argument("--batch_size", type=int, default=32, help="pictures encoded at once")
    own.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def run(opt: argparse.Namespace) -> str:
    """Build what is wanted; returns a sentence about it."""
    if opt.images:
        device = choose_device(opt.device)
        encoder = ClipImageEmbedder(opt.clip_type).to(device)
        build_database(opt.images, opt.database, encoder, opt.batch_size, device)
    vectors = RetrievalDatabase(opt.database).embedding
    if not 1 <= opt.knn <= len(vectors):
        raise InferenceError(f"--knn {opt.knn}: there are {len(vectors)} vectors in {opt.database}")
    searcher = Searcher.build(vectors)
    path = searcher.save(opt.target_path)
    quality = "exact" if searcher.is_exact else f"{recall(searcher, vectors, opt.knn):.1%} of the {opt.knn} nearest found"  # fmt: skip
    return f"{path}: {len(searcher)} vectors of {searcher.width} numbers, {quality}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opt = get_parser().parse_args(argv)
    try:
        print(run(opt))
    except (InferenceError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
