"""The `search` command's work: losses of every layer and window, a choice within a budget, a curve against memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import modeling  # noqa: F401  (registers the NHA classes)
from ..convert import load_student
from ..devices import working_device
from ..errors import InputError
from ..model_source import resolve_model
from .auto import all_converted
from .calibration import Calibration, calibration_text
from .choose import Option, greedy_path, loss_of, neediest, size_of, within_budget
from .request import SearchRequest
from .scores import Losses, divergences, layer_losses
from .student import started

POINTS = 12
"""Points of the curve that are measured."""


def find_windows(request: SearchRequest, *, quiet: bool = True) -> dict[str, Any]:
    """Measures, chooses, and measures what was chosen.

    Returns:
        {"target", "finished", "model", "method", "branch", "tokens", "sequence_length", "seed", "context",
        "full_bytes" (cache of full attention everywhere), "losses": {layer: {window: loss}}, "choice": point or None,
        "curve": [point], "setting": text or None}; a point is {"choice", "windows": [number or "full"], "bytes",
        "share", "loss" (the sum of the layers' own), "kl" (of all together)}.
    Raises:
        InputError: model or text is wrong, or the budget too small.
    """
    recipe = request.recipe
    place = working_device(recipe.runtime.device, recipe.runtime.threads)
    model, tokenizer, teacher = _load(request, place, quiet)
    with_recall = request.method == "recall"
    text = calibration_text(recipe, tokenizer, request.sizes.context, with_recall=with_recall, quiet=quiet)
    measure = {"branch": recipe.search.branch, "teacher": teacher, "quiet": quiet}
    losses = layer_losses(request.method, model, text, request.windows, **measure)
    options = _options(request, losses)
    chosen = _choice(request, options)
    states = ([("chosen", chosen)] if chosen else []) + _curve(request, options)
    points = _points(request, states, model, text, measure)
    choice, curve = (points[0], points[1:]) if chosen else (None, points)
    advice = setting(request, points[0]["windows"]) if chosen else None
    return search_result(request, text, losses, choice, curve, advice, branch=recipe.search.branch)


def search_result(
    request: SearchRequest,
    text: Calibration,
    losses: Mapping[int, Mapping[int, float]],
    choice: dict[str, Any] | None,
    curve: list[dict[str, Any]],
    advice: str | None,
    *,
    branch: str,
) -> dict[str, Any]:
    """What a search returns, of windows or of slots."""
    return {
        "target": request.target,
        "finished": request.checkpoint is not None,
        "model": str(request.checkpoint or request.recipe.model),
        "method": request.method,
        "branch": branch,
        "tokens": text.tokens.numel(),
        "sequence_length": text.length,
        "seed": request.recipe.seed,
        "context": request.context,
        "full_bytes": request.full_bytes,
        "losses": {str(layer): {str(one): loss for one, loss in row.items()} for layer, row in losses.items()},
        "choice": choice,
        "curve": curve,
        "setting": advice,
    }


def setting(request: SearchRequest, windows: list[int | str]) -> str:
    """What to pass to `run`, `swap`, `eval` or `generate` for a choice."""
    if request.full is not None and request.checkpoint is None:
        full = [layer for layer in request.windows if windows[layer] == "full"]
        return f"nha.full_attention_layers=[{','.join(map(str, full))}]"
    return f"nha.window=[{','.join(map(str, windows))}]"


def _load(request: SearchRequest, place: torch.device, quiet: bool) -> tuple[Any, Any, Any]:
    """The model as a student, its tokenizer, and a teacher of its own where one was named."""
    recipe = request.recipe
    if request.checkpoint is None:
        folder = resolve_model(recipe.model)
        tokenizer, recipe = AutoTokenizer.from_pretrained(folder), all_converted(recipe)
        dtype, length = getattr(torch, recipe.runtime.dtype), recipe.training_length
        model = load_student(folder, recipe.nha, dtype=dtype, seed=recipe.seed, length=length).to(place).eval()
        return started(model, recipe, tokenizer, quiet=quiet), tokenizer, None
    loaded = []
    for folder in [request.checkpoint, *([resolve_model(request.teacher)] if request.teacher else [])]:
        try:
            loaded.append(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(place).eval())
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    teacher = loaded[1] if len(loaded) > 1 else None
    return loaded[0], AutoTokenizer.from_pretrained(request.checkpoint), teacher


def _options(request: SearchRequest, losses: Losses) -> dict[int, list[Option]]:
    slots = request.recipe.nha.slots_by_layer(request.sizes.layers)
    whole = Option(None, request.layer_bytes(None, 0), 0.0)
    return {
        layer: [Option(window, request.layer_bytes(window, slots[layer]), loss) for window, loss in row.items()]
        + [whole]
        for layer, row in losses.items()
    }


def _choice(request: SearchRequest, options: Mapping[int, list[Option]]) -> dict[int, Option] | None:
    if request.full is not None:
        keep = neediest({layer: row[0].loss for layer, row in options.items()}, request.full)
        return {layer: row[-1] if layer in keep else row[0] for layer, row in options.items()}
    return None if request.budget is None else within_budget(options, request.budget)


def _curve(request: SearchRequest, options: Mapping[int, list[Option]]) -> list[tuple[str, dict[int, Option]]]:
    """States to measure: along the greedy path, and uniform choices with the smallest window."""
    path = greedy_path(options)
    last = len(path) - 1
    picked = sorted({round(place * last / (POINTS - 1)) for place in range(POINTS)}) if last else [0]
    states = [("greedy", path[place]) for place in picked]
    layers = sorted(options)
    smallest = {layer: min(row, key=lambda one: one.size) for layer, row in options.items()}
    for step in (8, 4, 2):
        if step <= len(layers):
            full = {layer: options[layer][-1] for layer in layers[step - 1 :: step]}
            states.append((f"every:{step}", smallest | full))
    return states


def _points(
    request: SearchRequest,
    states: list[tuple[str, dict[int, Option]]],
    model: Any,
    text: Calibration,
    measure: dict[str, Any],
) -> list[dict[str, Any]]:
    """The states with their bytes, their share of full attention's cache, their losses and their KL."""
    arrangements = [{layer: option.value for layer, option in state.items()} for _, state in states]
    kls = divergences(model, text, arrangements, **measure)
    points = []
    for (name, state), windows, kl in zip(states, arrangements, kls):
        each = ["full" if windows.get(layer) is None else windows[layer] for layer in range(request.sizes.layers)]
        points.append(point(request, name, state, "windows", each, kl))
    return points


def point(
    request: SearchRequest, name: str, state: Mapping[int, Option], what: str, each: list[Any], kl: float
) -> dict[str, Any]:
    """A choice, by layer, with its cache, the sum of its layers' losses, and its KL."""
    size = size_of(state) + request.beside
    row = {"choice": name, what: each, "bytes": size, "share": size / request.full_bytes}
    return {**row, "loss": loss_of(state), "kl": kl}
