"""Command lines of the library; run them from a checkout, `python scripts/txt2img.py --help`."""

import sys
from pathlib import Path

# python looks first in the folder of the script that it starts; there the folders gradio and streamlit would stand for packages of
# that name where those are not installed
_here = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]
