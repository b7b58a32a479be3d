"""Command lines of the library; run them from a checkout, `python scripts/txt2img.py --help`."""
