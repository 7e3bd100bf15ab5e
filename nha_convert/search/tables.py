"""A search on a terminal and as markdown. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..quantities import size

if TYPE_CHECKING:
    from rich.console import Group

UNITS = {
    "attention": "share of the teacher's softmax beyond window and sinks",
    "alignment": "||layer - teacher||^2 / ||teacher||^2 of attention outputs",
    "kl": "KL to the teacher, nats per token, this layer alone as NHA",
    "restore": "KL saved by this layer as full attention, nats per token, all others NHA",
    "recall": "growth of the answers' NLL, nats per token, this layer alone as NHA",
}


def chooses_slots(found: dict[str, Any]) -> bool:
    """Whether a search was for counts of slots, and not for windows."""
    return "slots" in found["curve"][0]


def score_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the losses by layer."""
    layers = found["losses"]
    columns = len(next(iter(layers.values())))
    same = len({tuple(row) for row in layers.values()}) == 1
    word = "slots" if chooses_slots(found) else "window"
    header = [f"{word} {choice}" for choice in next(iter(layers.values()))] if same else ["own window"] * columns
    return ["layer", *header], [[layer, *(f"{loss:.4g}" for loss in row.values())] for layer, row in layers.items()]


def curve_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the choice and the curve."""
    points = ([found["choice"]] if found["choice"] else []) + found["curve"]
    what = "slots" if chooses_slots(found) else "windows"
    rows = [
        [
            point["choice"],
            size(point["bytes"]),
            f"{100 * point['share']:.1f} %",
            f"{point['loss']:.4g}",
            f"{point['kl']:.4g}",
            runs(point[what]),
        ]
        for point in points
    ]
    return ["choice", "cache", "of full", "sum of losses", "KL of all", what], rows


def runs(windows: list[int | str]) -> str:
    """`64 x3, full` for [64, 64, 64, "full"]."""
    parts: list[tuple[int | str, int]] = []
    for window in windows:
        if parts and parts[-1][0] == window:
            parts[-1] = (window, parts[-1][1] + 1)
        else:
            parts.append((window, 1))
    return ", ".join(str(window) if count == 1 else f"{window} x{count}" for window, count in parts)


def heading(found: dict[str, Any]) -> str:
    kind = "finished model" if found["finished"] else "base model"
    slots = "slots hidden" if found["branch"] == "window" else "slots as they are"
    if chooses_slots(found):
        slots = f"gates started `{found['gate_init']}`, untrained"
    return (
        f"{found['target']} ({kind}), {found['tokens']} tokens in rows of {found['sequence_length']}, "
        f"seed {found['seed']}, {slots}"
    )


def titles(found: dict[str, Any]) -> tuple[str, str]:
    """Of the two tables."""
    return (
        f"Loss of each layer by `{found['method']}` ({UNITS[found['method']]})",
        f"Quality against cache memory at {found['context']} tokens",
    )


def advice(found: dict[str, Any]) -> list[str]:
    """Lines that say how to use the choice."""
    if not found["setting"]:
        return ["No budget was given: choose with --full N, or --memory 25% --context 32768."]
    if not found["finished"]:
        return [f"use it:  --set {found['setting']}"]
    return [
        f"use it:  --set {found['setting']}   (generate, eval)",
        f"         model.set_windows({found['choice']['windows']!r})",
    ]


def render(found: dict[str, Any]) -> Group:
    """Rich tables: losses by layer, then the choice and the curve."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(heading(found), style="bold")]
    for title, (header, rows) in zip(titles(found), (score_rows(found), curve_rows(found))):
        table = Table()
        for column in header:
            table.add_column(column, justify="left" if column in ("layer", "choice", "windows", "slots") else "right")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == "chosen" else None)
        parts += [Text(title, style="italic"), table]
    return Group(*parts, *(Text(line) for line in advice(found)))


def markdown(found: dict[str, Any]) -> str:
    """The same as a page."""
    what = "slots" if chooses_slots(found) else "layers"
    lines = [f"# Which {what}: {found['target']}", "", heading(found) + ".", ""]
    for title, (header, rows) in zip(titles(found), (score_rows(found), curve_rows(found))):
        lines += [f"{title}:", "", *table(header, rows), ""]
    return "\n".join([*lines, *(f"    {line}" for line in advice(found)), ""])


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
