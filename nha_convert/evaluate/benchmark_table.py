"""The tables of bench.json: how a benchmark's numbers are written. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

DECODE_HEADER = ["context", "teacher", "student", "faster", "teacher's cache", "student's cache", "smaller"]
PREFILL_HEADER = ["tokens", "teacher", "student", "faster"]


def decode_rows(bench: dict[str, Any]) -> list[list[str]]:
    """Per context: time of one decoded token of both, their ratio, bytes of both caches, their ratio."""
    rows = []
    for row in bench["decode"]:
        sizes = row["cache_bytes"]
        rows.append(
            [
                f"{row['context']:,}",
                *(_time(row[mode]) for mode in ("teacher", "student")),
                _ratio(row["ratio"]),
                *(byte_text(sizes[mode]) for mode in ("teacher", "student")),
                f"{sizes['teacher'] / sizes['student']:.2f}x",
            ]
        )
    return rows


def prefill_rows(bench: dict[str, Any]) -> list[list[str]]:
    """Per length: time of a prefill of both, and their ratio."""
    return [
        [f"{row['tokens']:,}", *(_time(row[mode]) for mode in ("teacher", "student")), _ratio(row["ratio"])]
        for row in bench["prefill"]
    ]


def bench_notes(bench: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know: intervals, machine, teacher, untrained positions, what is left out."""
    where, positions = bench["environment"], bench["max_position_embeddings"]
    rows = [*bench["decode"], *bench["prefill"]]
    threads = f", torch threads: {where['threads']}" if where["device"] == "cpu" else ""
    notes = [
        "Medians of turns, teacher and student by turns in one process; in brackets "
        f"{brackets(*(row['ratio'] for row in rows))}. "
        f"Batch 1, {where['dtype']}, {where['device_name']}{threads}.",
        f"Teacher: {bench['teacher']}, with transformers' DynamicCache.",
        "Caches for decoding hold random keys and values.",
    ]
    lengths = {row["context"] for row in bench["decode"]} | {row["tokens"] for row in bench["prefill"]}
    beyond = sorted(length for length in lengths if length > positions)
    if beyond:
        listed = ", ".join(f"{context:,}" for context in beyond)
        notes.append(f"Beyond the model's {positions:,} positions, and so for time and memory alone: {listed}.")
    for row in rows:
        if "working_bytes" in row:
            kind = f"decode at {row['context']:,}" if "context" in row else f"prefill of {row['tokens']:,}"
            both = ", ".join(f"{mode} {byte_text(row['working_bytes'][mode])}" for mode in ("teacher", "student"))
            notes.append(f"Most memory allocated beside what was there before, {kind}: {both}.")
    return notes + [f"Left out: {one['what']} at {one['context']:,}: {one['reason']}." for one in bench["left_out"]]


def render_bench(bench: dict[str, Any]) -> Group:
    """Both tables for rich."""
    decode = _table("One decoded token", DECODE_HEADER, decode_rows(bench))
    prefill = _table("Prefill", PREFILL_HEADER, prefill_rows(bench))
    notes = Text("\n".join(bench_notes(bench)))
    return Group(decode, prefill, notes) if bench["prefill"] else Group(decode, notes)


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def brackets(*timed: dict[str, Any]) -> str:
    """What `low` and `high` of all these summaries are; the least sure of them speaks."""
    sure = math.floor(100 * min(one.get("confidence", 0.0) for one in timed))  # older files have none
    return f"the interval that holds the true median with {sure} % confidence" if sure else "the range of the turns"


def byte_text(number: float) -> str:
    """Bytes in decimal units: `4.07 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f} B"


def _time(seconds: dict[str, float]) -> str:
    factor, unit = (1e3, "ms") if seconds["median"] < 1 else (1, "s")
    low, middle, high = (f"{seconds[key] * factor:.3g}" for key in ("low", "median", "high"))
    return f"{middle} {unit} [{low}, {high}]"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
