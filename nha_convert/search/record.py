"""What a search found, as a run folder keeps it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json_object
from ..recipe import Recipe

RECORD = "search.json"


def search_record(recipe: Recipe, scores: dict[int, float], layers: list[int], tokens: int) -> dict[str, Any]:
    """The content of search.json.

    Args:
        recipe: with `auto:N`.
        scores: of each layer that could be chosen.
        layers: those chosen.
        tokens: of text that were measured.
    Returns:
        {"setting", "method", "full_attention_layers", "scores": {layer: score}, "tokens", "branch", "seed"}.
    """
    assert recipe.nha.auto is not None
    return {
        "setting": recipe.nha.full_attention_layers,
        "method": recipe.nha.auto[1],
        "full_attention_layers": layers,
        "scores": {str(layer): score for layer, score in sorted(scores.items())},
        "tokens": tokens,
        "branch": recipe.search.branch,
        "seed": recipe.seed,
    }


def with_chosen_layers(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with the layers named that a search in this run folder chose; unchanged where none did.

    Args:
        recipe: with `auto:N` or not.
        out: the run folder.
    Raises:
        InputError: search.json cannot be read.
    """
    path = out / RECORD
    if recipe.nha.auto is None or not path.is_file():
        return recipe
    record = read_json_object(path)
    if record.get("setting") != recipe.nha.full_attention_layers:
        return recipe
    return naming(recipe, record["full_attention_layers"])


def naming(recipe: Recipe, layers: list[int]) -> Recipe:
    """The recipe with these layers full."""
    nha = recipe.nha.model_copy(update={"full_attention_layers": sorted(layers)})
    return recipe.model_copy(update={"nha": nha})
