"""Starts the command line as a stranger does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python cli.py ARGUMENTS` in `cwd`, without a network."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
