"""A row of the compile table: what one kernel needs, the limits it must keep, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # a block may have
HEADS = "kernel|target|d|M|dtype|variant|warps|stages|tile|registers|spills|shared|matrix|seconds|broken"


@dataclass
class Row:
    """What one kernel needs on one target; registers and spilled bytes of a thread, shared bytes of a block."""

    of: str  # forward, backward, decode, decode split
    kernel: str
    target: str
    head_dim: int
    slots: int
    dtype: str
    variant: str
    warps: int = 0
    stages: int = 0
    rows: int = 0  # BT
    tile: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    dots: int = 0  # matrix products in the source, as Triton's first stage has them
    matrix: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None  # None: from the cache
    error: str = ""
    broken: list[str] = field(default_factory=list)


def spill_limit(row: Row) -> int | None:
    """Bytes that this kernel may spill, None where nothing is asked for."""
    if (row.head_dim, row.slots, row.dtype) != (128, 64, "bf16") or "decode" in row.of:
        return None
    if row.of == "backward":
        return 160
    return 16 if row.target.startswith("sm_8") else 0


def broken(row: Row) -> list[str]:
    """Limits that a row breaks."""
    if row.error:
        return ["does not compile"]
    out = []
    if row.dots and not row.matrix:  # an empty kernel compiles without complaint
        out.append("no matrix instruction")
    if row.shared > SHARED_KIB[row.target] * 1024:
        out.append(f"shared memory over {SHARED_KIB[row.target]} KiB")
    limit = spill_limit(row)
    if limit is not None and row.spills > limit:
        out.append(f"spills over {limit} bytes")
    return out


def cells(row: Row) -> list[str]:
    """A row of the page."""
    matrix = ", ".join(f"{n} {k}" for k, n in row.matrix.items()) or "-"
    name = row.kernel if row.of in ("forward", "decode") else f"{row.kernel} ({row.of})"
    size = [str(row.head_dim), str(row.slots), row.dtype, row.variant, str(row.warps), str(row.stages), row.tile]
    used = [str(row.registers), str(row.spills), f"{row.shared / 1024:.0f}", matrix]
    seconds = "cached" if row.seconds is None else f"{row.seconds:.1f}"
    return [name, row.target, *size, *used, seconds, "; ".join([*row.broken, row.error]).strip("; ")]


def page(results: dict[str, Any], rows: list[Row]) -> str:
    """The table in Markdown."""
    dirty = ", with changes" if results["commit"]["dirty"] else ""
    failed = sum(bool(r.broken) for r in rows)
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"Triton {results['triton']}, torch {results['torch']}, commit {results['commit']['commit']}{dirty}, "
        f"{results['date']}: `{results['command']}`. No GPU ran any of it.",
        "",
        "Registers and spilled bytes of a thread, shared KiB of a block, matrix instructions by kind (as they stand in "
        "the code; `fma` in fp32, whose products are exact), seconds to compile (`cached`: Triton's cache had it). "
        "Tile: BT rows, BN window keys, BM slots, BD dimensions. Variants: see `Case` in `compile_table.py`.",
        "",
        f"{len(rows)} kernels, {failed} break a limit.",
        "",
        f"|{HEADS}|",
        "|" + "---|" * len(HEADS.split("|")),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells(r)).replace("\n", " ") + " |" for r in rows]) + "\n"
