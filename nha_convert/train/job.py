"""One stage of one run: its names, folders and settings in one place, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..recipe import Recipe
from .checkpoints import TRAINED
from .metrics import MetricsFile

LATER = {"gate": "independent", "slot_rotary": False, "gate_init_rows": 32}
"""Settings of `nha` that are younger than the digests in run folders, with what runs did before there was a choice."""


def stage_folder(run_dir: Path, recipe: Recipe, index: int) -> Path:
    """`stages/NN-name`, NN from 01; the name is the stage's kind where it has none."""
    stage = recipe.stages[index]
    return Path(run_dir) / "stages" / f"{index + 1:02d}-{stage.name or stage.kind}"


@dataclass
class StageJob:
    """What a trainer needs to know besides the model and the data.

    Attributes:
        quiet: no progress bars.
        stop: set by SIGTERM; the step at hand is finished and saved.
        text: a digest of the text that the stage trains on, once that is known.
    """

    recipe: Recipe
    index: int
    run_dir: Path
    quiet: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    text: str = ""

    @property
    def settings(self) -> Any:
        return self.recipe.stages[self.index]

    @property
    def folder(self) -> Path:
        return stage_folder(self.run_dir, self.recipe, self.index)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def trained(self) -> Path:
        return self.folder / TRAINED

    @property
    def done(self) -> Path:
        return self.folder / "done.json"

    @property
    def seed(self) -> int:
        return self.recipe.seed + self.index

    @property
    def how_to_resume(self) -> str:
        return f"go on with `nha-convert run {self.run_dir}/recipe.yaml --out {self.run_dir} --resume`"

    def metrics(self) -> MetricsFile:
        """This stage's rows of the run's metrics.jsonl."""
        return MetricsFile(self.run_dir / "metrics.jsonl", self.name)

    def identity(self) -> str:
        """A digest of every setting that the trained weights depend on."""
        stages = [stage.model_dump(mode="json", exclude={"name", "save_steps"}) for stage in self.recipe.stages]
        data = self.recipe.data.model_dump(mode="json", exclude={"workers", "cache"})
        nha = self.recipe.nha.model_dump(mode="json", exclude={"layer"})  # the others say what it stands for
        parts = [
            self.recipe.model,
            self.recipe.seed,
            self.recipe.runtime.dtype,
            {name: value for name, value in nha.items() if name not in LATER or value != LATER[name]},
            data,
            stages,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def check_identity(self, found: str, where: Path) -> None:
        """
        Raises:
            InputError: what lies in the run folder was trained with other settings.
        """
        if found != self.identity():
            raise InputError(
                f"{where}: was trained with other settings than this recipe's (model, seed, nha, data, stages or "
                f"dtype); use the recipe.yaml of the run folder, or another --out"
            )

    def check_text(self, found: str, where: Path) -> None:
        """
        Raises:
            InputError: the steps before were trained on other text.
        """
        if found != self.text:
            raise InputError(
                f"{where}: the text of data.sources is not what its steps were trained on, so the rest of the stage "
                "would see some of it twice; bring the old text back, or start anew with another --out"
            )

    @contextmanager
    def stopping_on_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM asks the trainer to save and stop; only the main thread can receive it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
