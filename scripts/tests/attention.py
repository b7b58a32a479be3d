"""Time every way to compute attention, for the shapes of SDXL's network and of its first stage; nothing is recorded.

    python scripts/tests/attention.py
    python scripts/tests/attention.py --config configs/inference/sd_2_1.yaml --H 512 --W 512 --dtype bf16

The flags are those of scripts/optimize/optimize_attention.py, which does the work, and can record the fastest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # this checkout first, whatever else owns `scripts`

from scripts.optimize import optimize_attention

CONFIG = Path(__file__).resolve().parents[2] / "configs/inference/sd_xl_base.yaml"
SDXL = ["--config", str(CONFIG), "--H", "1024", "--W", "1024"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return optimize_attention.main([*SDXL, *(sys.argv[1:] if argv is None else argv), "--dry_run"])


if __name__ == "__main__":
    sys.exit(main())
