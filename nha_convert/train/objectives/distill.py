"""Stage `distill`: the student learns from its teacher and the text, by a list of losses."""

from __future__ import annotations

from typing import Any

from ...stage_settings import DistillStage, LossSettings
from .whole_model import WholeModelObjective


class DistillObjective(WholeModelObjective):
    """The stage's `losses`, each measured on its own."""

    settings: Any

    def terms(self) -> list[LossSettings]:
        settings: DistillStage = self.settings
        return settings.losses
