"""metrics.jsonl: means over the steps since the row before, the same after a resume as without one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .engine import Engine


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as [first, last] of every gapless run; one that stands twice starts a run of its own."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


class Meter:
    """Means per step of named values since the last row; its state travels in checkpoints.

    Every rank adds what it measured; rank 0 gets the sums. The values of a step's micro-batches and ranks add up.

    Attributes:
        first: the values of the first step.
        last: the last row's means.
        items: the dataset's items that this rank trained on since the last row.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.items: list[int] = []
        self._waiting: dict[str, torch.Tensor] = {}
        self._seconds, self._since = 0.0, time.monotonic()
        self._row, self._steps = self._since, 0

    def add(self, values: dict[str, torch.Tensor], items: list[int]) -> None:
        """Adds one micro-batch's share: 0-dim tensors, and the items it held."""
        for name, value in values.items():
            value = value.detach().double()
            self._waiting[name] = self._waiting[name] + value if name in self._waiting else value
        self.items += items

    def end_step(self) -> None:
        """Closes a step; until then nothing is asked of the device."""
        names = list(self._waiting)
        numbers = torch.stack([self._waiting[name] for name in names]).tolist() if names else []
        for name, number in zip(names, numbers):
            self.sums[name] = self.sums.get(name, 0.0) + number
        self._waiting = {}
        self.count += 1
        self._steps += 1

    def fold(self, engine: Engine) -> None:
        """Moves every rank's sums and items to rank 0; all ranks call it at the same step."""
        if engine.world == 1:
            return
        given = engine.gather((self.sums, self.items))
        self.sums, self.items = {}, []
        if engine.main:
            for sums, items in given:
                self.items += items
                for name, number in sums.items():
                    self.sums[name] = self.sums.get(name, 0.0) + number

    def take(self, engine: Engine) -> tuple[dict[str, float], list[list[int]], float]:
        """Rank 0's means since the last call, the items as ranges, and the steps per second of this process."""
        self.fold(engine)
        now = time.monotonic()
        self.last = {name: total / self.count for name, total in self.sums.items()}
        self.first = self.first or self.last
        taken = self.last, ranges(self.items), self._steps / max(now - self._row, 1e-9)
        self.count, self.sums, self.items, self._row, self._steps = 0, {}, [], now, 0
        return taken

    @property
    def seconds(self) -> float:
        """Time spent on this stage, over all its processes up to their last checkpoint."""
        return self._seconds + time.monotonic() - self._since

    def start(self) -> None:
        """Training begins now: what was before it is not part of the first row's rate."""
        self._row = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Rank 0's, after `fold`."""
        return {
            "count": self.count,
            "sums": self.sums,
            "items": self.items,
            "first": self.first,
            "last": self.last,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any], main: bool = True) -> None:
        """Takes what `state` gave; ranks other than 0 take the count alone."""
        self.count = state["count"]
        self.sums, self.items = (state["sums"], state["items"]) if main else ({}, [])
        self.first, self.last = state["first"], state["last"]
        self._seconds, self._since = state["seconds"], time.monotonic()


class MetricsFile:
    """The rows of one stage in a run's metrics.jsonl."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, **row}) + "\n")

    def cut(self, step: int) -> None:
        """Drops this stage's rows after `step`, and a last line that a kill left half written."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["stage"] != self.stage or row["step"] <= step:
                kept.append(line + "\n")
        beside = self.path.with_name(f".{self.path.name}.partial")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self.path)
