"""Do pictures carry the watermark of this library's samples?

python scripts/demo/detect.py outputs/demo/*.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import numpy as np

from ldm import watermark
from ldm.inference import InferenceError
from ldm.inference_images import open_picture
from sgm.inference.helpers import WATERMARK_BITS

# up to so many of 48 bits agree → what that means
VERDICTS = (
    (27, "no watermark"),
    (33, "a part of the watermark matches; this decides nothing"),
    (35, "probably watermarked"),
    (len(WATERMARK_BITS), "almost certainly watermarked"),
)


class GetWatermarkMatch:
    """Counts the bits of a watermark that pictures carry.

    Args:
        watermark: zeros and ones.
    """

    def __init__(self, watermark: Sequence[int]) -> None:
        self.watermark = np.asarray(watermark)
        self.num_bits = len(self.watermark)

    def __call__(self, x: np.ndarray) -> np.ndarray | int:
        """Pictures (h, w, 3) or (b, h, w, 3), blue first, 0 to 255 → how many bits agree, a number or (b,).

        Raises:
            ValueError: pictures below 256² pixels.
        """
        pictures = x[None] if x.ndim == 3 else x
        counts = [(np.asarray(watermark.extract(p, self.num_bits)) == self.watermark).sum() for p in pictures]
        return np.asarray(counts) if x.ndim == 4 else int(counts[0])


def verdict(matches: int) -> str:
    """What a number of agreeing bits means."""
    return next(words for most, words in VERDICTS if matches <= most)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 if a file could not be judged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filename", nargs="+", help="pictures")
    count, status = GetWatermarkMatch(WATERMARK_BITS), 0
    for name in parser.parse_args(argv).filename:
        try:
            matches = count(np.asarray(open_picture(name, "filename"))[..., ::-1])
        except (InferenceError, ValueError) as error:
            print(f"{name}: error: {error}", file=sys.stderr)
            status = 2
        else:
            print(f"{name}: {verdict(int(matches))} ({matches} of {count.num_bits} bits agree)")
    return status


if __name__ == "__main__":
    sys.exit(main())
