"""What the acceptance measurements share: the list of lines, and how commands are run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

LINES: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {}


def line(name: str, what: str, target: str) -> Callable[[Callable[[], dict[str, Any]]], Callable[[], dict[str, Any]]]:
    """Register a measurement; it returns {"measured": text, "met": bool, ...}."""

    def register(measure: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        LINES[name] = (what, target, measure)
        return measure

    return register


def run(command: list[str], where: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end; a failure ends the measurement with the command's own words."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=own | (env or {}))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def clone(folder: Path) -> Path:
    """A clean clone of the committed state."""
    run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], folder)
    return folder / "clone"


def stamp(command: str) -> dict[str, str]:
    """What every results file says of its making: machine, versions, commit, date, command."""
    import torch
    import transformers

    from nha_convert.provenance import processor

    return {
        "machine": f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": run(["git", "rev-parse", "--short", "HEAD"], ROOT).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
    }
