#!/usr/bin/env python3
"""Runs `nha-convert` from a checkout, without installing: `python cli.py --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nha_convert.app import main  # noqa: E402  (the two lines above make it importable)

if __name__ == "__main__":
    main()
