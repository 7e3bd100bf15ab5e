"""Stage `finetune`: cross entropy to the text."""

from __future__ import annotations

from ...stage_settings import LossSettings
from .whole_model import WholeModelObjective


class FinetuneObjective(WholeModelObjective):
    """Cross entropy, mean over predicted tokens; no teacher runs."""

    def terms(self) -> list[LossSettings]:
        return [LossSettings(function="ce")]
