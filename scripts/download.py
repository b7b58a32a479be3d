"""Fetch published weights into one cache folder: resumed where they broke off, verified, whole or not at all.

python scripts/download.py --list
python scripts/download.py sdxl-base sdxl-refiner
python scripts/txt2img.py --ckpt "$(python scripts/download.py sd-v1-5)" --prompt "a red heart"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # this checkout first, whatever else owns `taming`

from taming import hub


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of published weights, see --list")
    parser.add_argument("--list", action="store_true", help="say which are known, and which are here")
    parser.add_argument("--folder", help=f"to keep them in; default: ${hub.CACHE}, or {hub.cache_folder()}")
    parser.add_argument("--check", action="store_true", help="compare files that are already here, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Paths go to standard output, one a line."""
    opt = get_parser().parse_args(argv)
    if opt.list or not opt.names:
        for name, known in hub.PUBLISHED.items():
            here = "here" if hub.place_of(name, opt.folder).is_file() else "    "
            print(f"{name:20}{here}  {known.about} ({known.repository}: {known.file})")
        return 0 if opt.list else 2
    for name in opt.names:
        try:
            print(hub.fetch(name, opt.folder, opt.check))
        except KeyError as error:
            print(f"error: {error.args[0]}", file=sys.stderr)
            return 2
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstopped; the next call goes on from here", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
