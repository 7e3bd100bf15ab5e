"""The student as a search looks at it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..gate_inputs import calibrate_gates, calibration_ids
from ..recipe import Recipe
from ..settings_types import NEEDS_TEXT


def started(model: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True) -> Any:
    """The model, whose gates start from text as the run's will, where its slots are read (`search.branch: both`).

    Args:
        model: `load_student` of the recipe, on its device.
        recipe: with the layers that may be chosen as NHA layers.
    Raises:
        InputError, WorkError: as `calibration_ids`.
    """
    if recipe.search.branch == "both" and recipe.nha.gate_init in NEEDS_TEXT:
        calibrate_gates(model, recipe.nha, calibration_ids(recipe, tokenizer, quiet=quiet), seed=recipe.seed)
    return model
