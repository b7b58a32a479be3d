"""Inpainting as a page of Gradio.

python scripts/gradio/inpainting.py configs/stable-diffusion/v2-inpainting-inference.yaml 512-inpainting-ema.ckpt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

from scripts import pages

if __name__ == "__main__":
    if status := pages.main("inpainting", "gradio", __doc__):
        sys.exit(status)
