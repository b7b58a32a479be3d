"""Train a model from YAML: another name of main.py; `python train.py --help` lists every flag."""

import sys

from main import main

if __name__ == "__main__":
    sys.exit(main())
