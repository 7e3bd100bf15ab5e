"""One line on the terminal that says how a stage goes: steps, loss, tokens per second, time left, error per layer."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """One character per value, low to high from 0 to 1; what is beyond 1 or not a number is the highest."""
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[min(top, int(value * len(_LEVELS)))] if 0 <= value < 1 else _LEVELS[top] for value in values)


def layer_errors(means: dict[str, float]) -> str:
    """The per-layer values of a metrics row, such as `▂▁▃ worst layer 2: 0.41`; empty where there are none."""
    errors = {int(name.rpartition("_")[2]): value for name, value in means.items() if "align/layer_" in name}
    if not errors:
        return ""
    worst = max(errors, key=lambda index: (errors[index] != errors[index], errors[index]))
    return f"{sparkline([errors[index] for index in sorted(errors)])} worst layer {worst}: {errors[worst]:.3g}"


def short(number: float) -> str:
    """A rate in at most five characters: 950, 12.3k, 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


class StageProgress:
    """The progress line of one stage, on stderr; nothing is drawn where it is not wanted or there is no terminal.

    Args:
        name: the stage.
        total: optimizer steps.
        done: steps that an earlier process has made.
        quiet: draw nothing.
        console: where to draw; stderr if not given.
    """

    def __init__(self, name: str, total: int, done: int = 0, *, quiet: bool, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[layers]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        fields: dict[str, Any] = {"loss": "", "rate": "", "layers": ""}
        self.task = self.progress.add_task(name, total=total, completed=done, **fields)
        self.progress.start()

    def step(self) -> None:
        """One optimizer step is done."""
        self.progress.advance(self.task)

    def row(self, means: dict[str, float], tokens_per_second: float) -> None:
        """Shows what was measured last."""
        self.progress.update(
            self.task,
            loss=f"loss {means['loss']:.4g}  ",
            rate=f"{short(tokens_per_second)} tok/s",
            layers=layer_errors(means),
        )

    def close(self) -> None:
        """Ends the line, also after an error."""
        self.progress.stop()
