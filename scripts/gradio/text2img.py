"""Text to image as a page of Gradio, by the model that comes with the repository or any other of text.

python scripts/gradio/text2img.py
python scripts/gradio/text2img.py CONFIG CKPT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

from scripts import pages

if __name__ == "__main__":
    if status := pages.main("text2img", "gradio", __doc__):
        sys.exit(status)
