"""Super-resolution as a page of Gradio.

python scripts/gradio/superresolution.py configs/stable-diffusion/x4-upscaling.yaml x4-upscaler-ema.ckpt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

from scripts import pages

if __name__ == "__main__":
    if status := pages.main("superresolution", "gradio", __doc__):
        sys.exit(status)
