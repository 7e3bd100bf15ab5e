"""The objective of each kind of stage."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...stage_settings import StageSettings
from ..objective import Objective
from .align import AlignObjective
from .distill import DistillObjective
from .finetune import FinetuneObjective
from .hidden import HiddenObjective

__all__ = ["AlignObjective", "DistillObjective", "FinetuneObjective", "HiddenObjective", "make_objective"]

KINDS: dict[str, type[Objective]] = {
    "align": AlignObjective,
    "hidden": HiddenObjective,
    "distill": DistillObjective,
    "finetune": FinetuneObjective,
}


def make_objective(
    model: Any, settings: StageSettings, *, seed: int = 0, teacher: nn.Module | None = None
) -> Objective:
    """The objective of a stage's kind.

    Args:
        model: the student, changed in place: what learns is marked, adapters are put in, windows are set.
        settings: the stage.
        seed: of the adapters' first weights and of all that is drawn.
        teacher: the student as it was before any training (`load_student`), on the same device; needed where
            `Recipe.needs_teacher` says so.
    Raises:
        InputError: the stage does not fit the model.
        ValueError: a teacher is needed and none was given.
    """
    return KINDS[settings.kind](model, settings, seed=seed, teacher=teacher)
