"""The acceptance lines, judged on the measured rows; the worst row that a line speaks of decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import LLAMA, K
from .contenders import GSA

Row = dict[str, Any]
Reader = Callable[[list[Row]], list[tuple[Row, float | None]]]
FLAT = 1.10
"""Slowest over fastest decode step of a sweep of contexts that still counts as flat: nothing a step does depends on the
context, so what remains is the timing's spread."""


def _near(row: Row, kind: str) -> bool:
    """Llama-3-8B at W 64, M 64."""
    shape = row["shape"]
    sizes = shape["model"], shape["slots"], shape["window"]
    return row["kind"] == kind and sizes == (LLAMA.model, LLAMA.slots, LLAMA.window)


def _speedup(row: Row, *names: str) -> float | None:
    """Over the fastest of some baselines; None where none was measured."""
    found = [row["baselines"][n]["speedup"] for n in names if "speedup" in row["baselines"].get(n, {})]
    return min(found) if found else None


def _ratio(kind: str) -> Reader:
    return lambda rows: [(r, r["ratio"]) for r in rows if _near(r, kind) and r["tokens"] == 32 * K]


def _over(kind: str, names: tuple[str, ...], keep: Callable[[Row], bool]) -> Reader:
    return lambda rows: [(r, _speedup(r, *names)) for r in rows if _near(r, kind) and keep(r)]


def _decode_rows(rows: list[Row]) -> list[Row]:
    wanted = (LLAMA.model, LLAMA.slots, 512, 32)
    decode = [r for r in rows if r["kind"] == "decode"]
    return [r for r in decode if (r["shape"]["model"], r["shape"]["slots"], r["shape"]["window"], r["batch"]) == wanted]


def _flatness(rows: list[Row]) -> list[tuple[Row, float | None]]:
    sweep = sorted(_decode_rows(rows), key=lambda r: r["ours"]["ms"])
    if not {4 * K, 512 * K} <= {r["context"] for r in sweep}:
        return []
    return [(sweep[-1], sweep[-1]["ours"]["ms"] / sweep[0]["ours"]["ms"])]


SDPA, BOTH = ("sdpa", "flash"), "forward+backward"
LINES: tuple[tuple[str, str, str, float, Reader], ...] = (
    ("forward_floor", "forward over its floor, W 64, 32k tokens", "<=", 2.0, _ratio("forward")),
    ("backward_floor", "backward over its floor, W 64, 32k tokens", "<=", 2.0, _ratio("backward")),
    (
        "sdpa_forward",
        "speed-up over SDPA/flash, forward, W 64, T >= 2k",
        ">",
        1.0,
        _over("forward", SDPA, lambda r: r["time"] >= 2 * K),
    ),
    (
        "sdpa_training",
        "speed-up over SDPA/flash, forward+backward, W 64, T >= 4k",
        ">",
        1.0,
        _over(BOTH, SDPA, lambda r: r["time"] >= 4 * K),
    ),
    (
        "sdpa_forward_32k",
        "speed-up over SDPA/flash, forward, W 64, T = 32k",
        ">=",
        15.0,
        _over("forward", SDPA, lambda r: r["time"] == 32 * K),
    ),
    (
        "gsa_forward",
        "speed-up over the GSA chain, forward",
        ">=",
        3.0,
        _over("forward", (GSA,), lambda r: True),
    ),
    (
        "gsa_training",
        "speed-up over the GSA chain, forward+backward",
        ">=",
        2.5,
        _over(BOTH, (GSA,), lambda r: True),
    ),
    (
        "decode_bandwidth",
        "decode, share of measured bandwidth, batch 32, W 512",
        ">=",
        0.6,
        lambda rows: [(r, r["bandwidth_share"]) for r in _decode_rows(rows)],
    ),
    ("decode_flat", "decode, slowest over fastest context from 4k to 512k", "<=", FLAT, _flatness),
)


def _met(value: float, sense: str, limit: float) -> bool:
    return {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[sense]


def judge(rows: list[Row]) -> list[dict[str, Any]]:
    """Every acceptance line; each row gets the lines it takes part in under `targets`.

    Args:
        rows: of the results.
    Returns:
        Per line its name, text, sense, limit, worst value, the number of rows behind it, and met: True, False, or None
        where nothing was measured.
    """
    for row in rows:
        row["targets"] = []
    judged = []
    for name, text, sense, limit, read in LINES:
        found = [(row, value) for row, value in read(rows) if value is not None]
        for row, value in found:
            row["targets"].append({"name": name, "value": value, "met": _met(value, sense, limit)})
        values = [value for _, value in found]
        worst = None if not values else max(values) if sense == "<=" else min(values)
        met = None if worst is None else _met(worst, sense, limit)
        judged.append({"name": name, "text": text, "sense": sense, "limit": limit, "worst": worst, "met": met})
        judged[-1]["rows"] = len(values)
    return judged
