"""On what and from what the results come."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention", "einops", "numpy")


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    """First command output line or more, None where it fails or is missing."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    """Of the module that is imported where there is one of this name, else of the installed distribution."""
    try:
        return str(import_module(package).__version__)
    except (ImportError, AttributeError):
        pass
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(root: Path, given: str | None) -> dict[str, Any]:
    """The commit that is measured.

    Args:
        root: of the repository, which need not be a checkout.
        given: by the user; goes before the environment variable NHA_COMMIT, and that before git.
    Returns:
        commit, dirty (uncommitted or new files in kernels/nha_kernels; None if unknown) and source.
    """
    named = given or os.environ.get("NHA_COMMIT")
    if named:
        dirty = named.endswith("-dirty") or None
        return {"commit": named.removesuffix("-dirty"), "dirty": dirty, "source": "given"}
    head = _output(["git", "rev-parse", "HEAD"], root)
    if head is None:
        return {"commit": None, "dirty": None, "source": "unknown: no git here; give --commit or NHA_COMMIT"}
    changes = _output(["git", "status", "--porcelain", "--", "kernels/nha_kernels"], root)
    return {"commit": head, "dirty": None if changes is None else bool(changes), "source": "git"}


def describe(root: Path, device: torch.device, command: str, given_commit: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit, date and command.

    Args:
        root: of the repository.
        device: that is measured.
        command: as started, without paths of this machine.
        given_commit: see `commit`.
    Returns:
        Values for the results; None where something is unknown.
    """
    name, driver, memory, multiprocessors = platform.processor() or platform.machine(), None, None, None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, multiprocessors = properties.name, properties.total_memory, properties.multi_processor_count
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "device": name,
        "device_type": device.type,
        "device_memory_bytes": memory,
        "multiprocessors": multiprocessors,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        **commit(root, given_commit),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
