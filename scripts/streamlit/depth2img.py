"""Depth to image as a page of Streamlit.

streamlit run scripts/streamlit/depth2img.py configs/stable-diffusion/v2-midas-inference.yaml 512-depth-ema.ckpt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

from scripts import pages

if __name__ == "__main__":
    if status := pages.main("depth2img", "streamlit", __doc__):
        sys.exit(status)
