"""Stage `hidden`: after every block the student, on its own inputs, is to be where the teacher is."""

from __future__ import annotations

from ...stage_settings import LossSettings
from .whole_model import WholeModelObjective


class HiddenObjective(WholeModelObjective):
    """Mean over blocks and predicted tokens of ||student - teacher||^2 / ||teacher||^2; no head runs."""

    def terms(self) -> list[LossSettings]:
        return [LossSettings(function="hidden")]
