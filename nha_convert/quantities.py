"""Numbers as a reader wants them, and what a number takes."""

from __future__ import annotations

BYTES = {"float32": 4, "bfloat16": 2}
"""Of one number, by dtype."""


def count(number: int) -> str:
    """A count in three digits: 6.29M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in three digits: 1.5 MiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"
