"""Where numbers come from: machine, versions, commit, date, command. Imports no torch at module level."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import __version__

PROVENANCE = "run.json"
"""In a run folder: `provenance` of the process that began or last resumed it."""


def versions() -> dict[str, str]:
    """This package's version, Python's, and those of the libraries that compute."""
    names = ("torch", "transformers", "peft", "accelerate")
    return {"nha-convert": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package lies in, with `-dirty` where files differ; None if it is installed.

    Asked once, since what is checked out later is not what this process runs.
    Only the package's own parent folder is asked, never a repository further up.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def provenance() -> dict[str, Any]:
    """{"command", "date" (UTC), "commit", "versions", "machine"} of this process."""
    return {
        "command": " ".join(["nha-convert", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": f"{os.cpu_count()} cores of {processor()}",
    }
