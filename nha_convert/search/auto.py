"""`full_attention_layers: auto:N`: measured once before the swap, and written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..convert import load_student
from ..devices import working_device
from ..files import write_json, write_text
from ..model_source import resolve_model
from ..plan import model_dimensions
from ..recipe import Recipe, dump_recipe
from .calibration import Calibration, calibration_text
from .choose import neediest
from .record import RECORD, naming, search_record, with_chosen_layers
from .scores import layer_losses


def all_converted(recipe: Recipe) -> Recipe:
    """The recipe with every layer that `auto:N` may choose as an NHA layer: the model that is measured."""
    return naming(recipe, [])


def prepared_text(recipe: Recipe, tokenizer: Any, *, quiet: bool = True) -> Calibration:
    """What `choose_layers` measures on, from files alone; refuses what cannot be measured.

    Args:
        recipe: with `auto:N`.
    Raises:
        InputError: too few layers, too little text, or no answer beyond the windows.
    """
    assert recipe.nha.auto is not None
    sizes = model_dimensions(recipe.model)
    windows = recipe.nha.candidates(sizes.layers)
    with_recall = recipe.nha.auto[1] == "recall"
    text = calibration_text(recipe, tokenizer, sizes.context, with_recall=with_recall, quiet=quiet)
    if with_recall:
        text.questions(min(windows.values()))
    return text


def choose_layers(recipe: Recipe, model: Any, text: Calibration, *, quiet: bool = True) -> dict[str, Any]:
    """Measures a model's layers and chooses.

    Args:
        recipe: with `auto:N`.
        model: the student of `all_converted`, on its device, untrained.
        text: `prepared_text`.
    Returns:
        `search_record`.
    """
    assert recipe.nha.auto is not None
    count, method = recipe.nha.auto
    windows = recipe.nha.candidates(model.config.num_hidden_layers)
    each = {layer: [window] for layer, window in windows.items()}
    losses = layer_losses(method, model, text, each, branch=recipe.search.branch, quiet=quiet)
    scores = {layer: losses[layer][window] for layer, window in windows.items()}
    return search_record(recipe, scores, neediest(scores, count), text.tokens.numel())


def choose_for_run(
    recipe: Recipe, out: Path, tokenizer: Any, load: Callable[[Recipe], Any], *, main: bool = True, quiet: bool = True
) -> Recipe:
    """A run's recipe with its layers named; `auto:N` is measured on the first start and read back after.

    Args:
        out: the run folder; gets recipe.yaml and search.json.
        load: gives the student of a recipe, on its device.
        main: whether this process measures; the others come after it and read.
    Raises:
        InputError: as `prepared_text`.
    """
    if recipe.nha.auto is None:
        return recipe
    if main and with_chosen_layers(recipe, out) is recipe:
        text = prepared_text(recipe, tokenizer, quiet=quiet)
        write_text(out / "recipe.yaml", dump_recipe(recipe))  # from here on the run can be resumed
        write_json(out / RECORD, choose_layers(recipe, load(all_converted(recipe)), text, quiet=quiet))
    return with_chosen_layers(recipe, out)


def choose_for_swap(recipe: Recipe, *, quiet: bool = True) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with its layers named, and `search_record`; the model is loaded and measured.

    Args:
        recipe: with `auto:N`; its `data` is the text to measure on.
    Raises:
        InputError: the model or the text is wrong.
    """
    folder = resolve_model(recipe.model)
    place = working_device(recipe.runtime.device, recipe.runtime.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prepared_text(recipe, tokenizer, quiet=quiet)
    model = load_student(folder, all_converted(recipe).nha, seed=recipe.seed).to(place)
    record = choose_layers(recipe, model, text, quiet=quiet)
    return naming(recipe, record["full_attention_layers"]), record
