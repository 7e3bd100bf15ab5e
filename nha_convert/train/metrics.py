"""metrics.jsonl: means over the steps since the row before, the same after a resume as without one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Means of named values since the last row; its state travels in checkpoints.

    Attributes:
        first: the values of the first batch that was ever added.
        last: the last row's means.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._seconds, self._since = 0.0, time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one batch's 0-dim tensors."""
        numbers = dict(zip(values, torch.stack([value.detach().double() for value in values.values()]).tolist()))
        self.first = self.first or numbers
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        self.last = {name: total / self.count for name, total in self.sums.items()}
        self.count, self.sums = 0, {}
        return self.last

    @property
    def seconds(self) -> float:
        """Time spent on this stage, over all its processes up to their last checkpoint."""
        return self._seconds + time.monotonic() - self._since

    def state(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sums": self.sums,
            "first": self.first,
            "last": self.last,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.sums = state["count"], state["sums"]
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
