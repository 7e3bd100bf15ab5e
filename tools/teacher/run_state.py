"""What a teacher's training keeps on disk, so that a killed run goes on where it was saved."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nha_convert.errors import InputError
from tools.teacher.stages import Progress, Sources

FILE = "state.pt"
LOG = "training.jsonl"


class RunState:
    """The folder of one run: `state.pt`, the log, and the model at the end of each stage.

    Args:
        folder: made where it is missing.
        settings: what decides the result besides the budgets; a kept state has to agree.

    Attributes:
        stage: index of the stage that runs.
        progress: how far that stage has come.
        seconds: time of the whole run without pauses.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.stage = 0
        self.progress = Progress()
        self.seconds = 0.0

    def save(self, model: Any, optimizer: torch.optim.Optimizer | None, sources: Sources) -> None:
        """Replaces the state on disk; a kill at any moment leaves the old one or the new one.

        Args:
            optimizer: None between two stages.
        """
        log = self.folder / LOG
        content = {
            "settings": self.settings,
            "stage": self.stage,
            "progress": asdict(self.progress),
            "seconds": self.seconds,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "random": [generator.getstate() for generator in _generators(sources)],
            "model": model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{FILE}.partial"
        torch.save(content, beside)
        os.replace(beside, self.folder / FILE)

    def restore(self, model: Any, sources: Sources) -> dict[str, Any] | None:
        """Takes up a kept state, if there is one: weights, random numbers, progress, and the log up to there.

        Returns:
            The optimizer's state inside a stage; None between two stages and for a new run.
        Raises:
            InputError: the kept state belongs to other settings, or cannot be read; nothing was changed.
        """
        path = self.folder / FILE
        if not path.exists():
            (self.folder / LOG).unlink(missing_ok=True)  # of a run that was killed before its first save
            return None
        try:
            content = torch.load(path, weights_only=True)
            kept = content["settings"]
        except Exception as error:  # torch raises whatever the damage leads to
            raise InputError(f"{path} cannot be read ({type(error).__name__}); delete it to train anew") from error
        for name in sorted(kept.keys() | self.settings.keys()):
            if kept.get(name) != self.settings.get(name):
                raise InputError(
                    f"{path} holds a run with {name} {kept.get(name)!r}, asked for is {self.settings.get(name)!r}; "
                    "give the same options, or another folder with --state"
                )
        model.load_state_dict(content["model"])
        for generator, state in zip(_generators(sources), content["random"]):
            generator.setstate(state)
        self.stage = content["stage"]
        self.progress = Progress(**content["progress"])
        self.seconds = content["seconds"]
        if (self.folder / LOG).exists():
            os.truncate(self.folder / LOG, content["log_bytes"])
        return content["optimizer"]

    def log(self, row: dict[str, Any]) -> None:
        """Appends one row to the log, with the run's seconds."""
        row = row | {"seconds": self.seconds}
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _generators(sources: Sources) -> tuple[random.Random, random.Random]:
    return sources.rng, sources.documents.rng
