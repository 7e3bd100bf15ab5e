"""Text that every machine has: the sources and docstrings of its own Python standard library.

Nothing is shipped or downloaded; the files are read where the interpreter keeps them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

SKIPPED = frozenset({"site-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib", "encodings"})
HELD_OUT_SHARE = 0.06


def stdlib_files(split: str) -> list[Path]:
    """The standard library's `.py` files, in a fixed order.

    Args:
        split: `train`, or `held_out` for the 6 % of files whose relative path hashes lowest.
    Raises:
        ValueError: another split was named.
        FileNotFoundError: the interpreter has no readable standard library (a zipped or frozen Python).
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', found {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts) or path.stat().st_size > 400_000:
            continue
        held_out = _share(relative.as_posix()) < HELD_OUT_SHARE
        if held_out == (split == "held_out"):
            files.append(path)
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}; use `source: text` with a path instead")
    return files


def stdlib_texts(split: str) -> list[str]:
    """The texts of `stdlib_files(split)`, one per file."""
    return [path.read_text(encoding="utf-8", errors="ignore") for path in stdlib_files(split)]


def _share(name: str) -> float:
    """A number in [0, 1) from a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
