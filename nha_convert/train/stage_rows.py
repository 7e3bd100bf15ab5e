"""What a stage tells while it trains: rows of metrics.jsonl, loggers, the progress line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine import Engine
from .job import StageJob
from .metrics import Meter
from .progress import StageProgress


class StageRows:
    """A row every `runtime.logging_steps` steps, after the first and after the last.

    Args:
        job: the stage.
        meter: what was measured since the last row; every rank has one.
        engine: rank 0 writes.
        total: steps of the stage.
        done: steps that an earlier process has made.
        log: is given the numbers of a row, under names that begin with the stage's, where the recipe reports them.
    """

    def __init__(
        self,
        job: StageJob,
        meter: Meter,
        engine: Engine,
        *,
        total: int,
        done: int = 0,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.job, self.meter, self.engine, self.total, self.log = job, meter, engine, total, log
        self.file = job.metrics()
        self.progress = StageProgress(job.name, total, done, quiet=job.quiet or not engine.main)
        meter.start()

    def step(self, step: int, rates: dict[str, float], steps_per_second: float | None = None) -> None:
        """One optimizer step is done; all ranks call it.

        Args:
            step: from 1.
            rates: learning rates that it used, by the name of their group.
            steps_per_second: measured by the caller; None takes the time since the last row.
        """
        if step == 1 or step % self.job.recipe.runtime.logging_steps == 0 or step == self.total:
            means, items, measured = self.meter.take(self.engine)
            if self.engine.main:
                self._row(step, means, items, rates, measured if steps_per_second is None else steps_per_second)
        self.progress.step()

    def _row(
        self,
        step: int,
        means: dict[str, float],
        items: list[list[int]],
        rates: dict[str, float],
        steps_per_second: float,
    ) -> None:
        tokens = self.job.settings.batch_size * self.job.settings.sequence_length
        row = {
            "step": step,
            "tokens": step * tokens,
            **{name: round(value, 6) for name, value in means.items()},
            **rates,
            "tokens_per_second": round(steps_per_second * tokens, 1),
            "seconds": round(self.meter.seconds, 1),
        }
        self.file.append({**row, "items": items})
        if self.log is not None and self.job.recipe.runtime.report_to != "none":
            self.log({f"{self.job.name}/{name}": value for name, value in row.items()})
        self.progress.row(means, steps_per_second * tokens)

    def close(self) -> None:
        """Ends the progress line, also after an error."""
        self.progress.close()
