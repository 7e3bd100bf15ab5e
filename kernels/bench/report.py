"""Results as JSON, as a Markdown page, and as plots. Files are written beside their place and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .cases import LLAMA, K

Row = dict[str, Any]


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write beside `path`, then rename.

    Args:
        path: the finished file.
        save: writes the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """The results as they are."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write(path, lambda p: p.write_text(text, encoding="utf-8"))


def _size(n: int) -> str:
    return f"{n // K}k" if n >= K and n % K == 0 else str(n)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def _baseline(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not measured"
    return f"{_number(entry['ms'])} ({_number(entry['speedup'])}x)" if "ms" in entry else "not available"


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["baselines"]))


def _target(row: Row) -> str:
    return ", ".join(f"{t['name']} {'met' if t['met'] else '**not met**'}" for t in row["targets"])


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def attention_table(rows: list[Row], kind: str) -> str:
    """Rows of one kind, by shape and length."""
    rows = [r for r in rows if r["kind"] == kind]
    names = _names(rows)
    header = ["model", "W", "M", "tokens", "T", "ours ms", "floor ms", "ours / floor", *names, "target"]
    lines = []
    for r in rows:
        s = r["shape"]
        sizes = [s["model"], str(s["window"]), str(s["slots"]), _size(r["tokens"]), _size(r["time"])]
        own = [_number(r["ours"]["ms"]), _number(r["floor"]["ms"]), _number(r["ratio"])]
        lines.append([*sizes, *own, *(_baseline(r["baselines"].get(n)) for n in names), _target(r)])
    return _table(header, lines)


def decode_table(rows: list[Row]) -> str:
    """Decode rows; times are of one layer's step."""
    rows = [r for r in rows if r["kind"] == "decode"]
    names = _names(rows)
    header = [
        "model",
        "W",
        "M",
        "batch",
        "context",
        "ours us",
        "floor us",
        "share of bandwidth",
        "as",
        *names,
        "target",
    ]
    lines = []
    for r in rows:
        s = r["shape"]
        sizes = [s["model"], str(s["window"]), str(s["slots"]), str(r["batch"]), _size(r["context"])]
        own = [_number(r["ours"]["ms"] * 1e3), _number(r["floor"]["ms"] * 1e3), f"{r['bandwidth_share']:.0%}"]
        lines.append([*sizes, *own, r["timed_as"], *(_baseline(r["baselines"].get(n)) for n in names), _target(r)])
    return _table(header, lines)


def _targets_table(targets: list[dict[str, Any]]) -> str:
    answer = {True: "met", False: "**not met**", None: "not measured"}
    lines = [
        [t["name"], t["text"], f"{t['sense']} {t['limit']:g}", _number(t["worst"]), str(t["rows"]), answer[t["met"]]]
        for t in targets
    ]
    return _table(["line", "what", "target", "worst", "rows", ""], lines)


def markdown(results: dict[str, Any]) -> str:
    """The page.

    Args:
        results: as in the JSON.
    Returns:
        Markdown: what was measured on, acceptance lines, one table per kind, what is missing and why.
    """
    e, peaks, gate = results["environment"], results["peaks"], results["gate"]
    versions = ", ".join(f"{n} {v}" for n, v in e["packages"].items() if v)
    commit = f"{e['commit'] or 'unknown'}{' (with uncommitted changes)' if e['dirty'] else ''}"
    parts = [
        f"# {'Toy run' if results['toy'] else 'Timings'}, {e['device']}, {e['date'][:10]}",
        f"`{e['command']}` at commit {commit}; driver {e['driver']}, CUDA {e['cuda']}, Python {e['python']}, "
        f"{versions}; backend {results['backend']}, {results['dtype']}. Measured ceilings: "
        f"{peaks['flops_per_s'] / 1e12:.3g} TFLOP/s, {peaks['bytes_per_s'] / 1e12:.3g} TB/s. "
        "Times are medians; speed-ups are baseline over ours.",
        f"Gate: {gate['tests'].get('passed', 0)} GPU tests passed{_note(gate['tests'])}, {len(gate['checks'])} shapes "
        "checked against fp64. " + " ".join(f"{n}: {text}." for n, text in results["kernels_chosen"].items()),
        "## Acceptance lines",
        _targets_table(results["targets"]),
    ]
    for kind in ("forward", "backward", "forward+backward"):
        if any(r["kind"] == kind for r in results["rows"]):
            parts += [f"## {kind.capitalize()}", attention_table(results["rows"], kind)]
    if any(r["kind"] == "decode" for r in results["rows"]):
        parts += ["## Decode, one layer's step", decode_table(results["rows"])]
    parts += ["## Baselines", "\n".join(f"- **{n}**: {text}" for n, text in results["baselines"].items())]
    if results["not_measured"]:
        parts += ["## Not measured", "\n".join(f"- {text}" for text in results["not_measured"])]
    return "\n\n".join(parts) + "\n"


def _note(tests: dict[str, Any]) -> str:
    return f" ({tests['not_run']})" if "not_run" in tests else ""


def _line(rows: list[Row], x: str, read: Callable[[Row], float | None]) -> tuple[list[float], list[float]]:
    points = sorted((r[x], y) for r in rows if (y := read(r)) is not None)
    return [p[0] for p in points], [p[1] for p in points]


def _baseline_ms(name: str, row: Row) -> float | None:
    return row["baselines"].get(name, {}).get("ms")


def plot(path: Path, results: dict[str, Any]) -> str | None:
    """Time against length for the acceptance shape: forward, forward+backward, decode.

    Args:
        path: of the PNG.
        results: as in the JSON.
    Returns:
        None, or why there is no plot.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"plots: matplotlib is not importable ({error})"
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, kind in zip(figure.subplots(1, 3), ("forward", "forward+backward", "decode")):
        rows = [r for r in results["rows"] if r["kind"] == kind]
        if rows:
            lead, x = rows[0], "context" if kind == "decode" else "time"
            same = ("shape", "batch") if kind == "decode" else ("shape", "tokens")
            rows = [r for r in rows if all(r[name] == lead[name] for name in same)]
            axis.plot(*_line(rows, x, lambda r: r["ours"]["ms"]), "o-", label="ours", linewidth=2)
            axis.plot(*_line(rows, x, lambda r: r["floor"]["ms"]), "k:", label="floor")
            for name in _names(rows):
                points = _line(rows, x, partial(_baseline_ms, name))
                if points[0]:
                    axis.plot(*points, "o--", label=name)
            s = lead["shape"]
            size = f"batch {lead['batch']}" if kind == "decode" else f"{_size(lead['tokens'])} tokens"
            axis.set_title(f"{kind}: {s['model']}, W {s['window']}, M {s['slots']}, {size}", fontsize=10)
            axis.set(xscale="log", yscale="log", xlabel=x, ylabel="ms")
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
        else:
            axis.set_title(f"{kind}: not measured", fontsize=10)
    write(path, lambda p: figure.savefig(p, dpi=120))
    return None


def summary(results: dict[str, Any]) -> str:
    """What a terminal shows last: acceptance lines, and the rows of the acceptance shape."""
    rows = [r for r in results["rows"] if results["toy"] or r["shape"]["model"] == LLAMA.model]
    parts = [attention_table(rows, k) for k in ("forward", "backward", "forward+backward")]
    parts += [decode_table(rows), _targets_table(results["targets"])]
    return "\n\n".join(parts)
