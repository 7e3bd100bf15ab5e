"""The `search` command's work: losses of every layer and window, a choice within a budget, a curve against memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import modeling  # noqa: F401  (registers the NHA classes)
from ..convert import load_student
from ..devices import find_device
from ..errors import InputError
from ..model_source import resolve_model
from ..plan import BYTES
from .auto import all_converted
from .calibration import Calibration, calibration_text
from .choose import Option, greedy_path, loss_of, neediest, size_of, within_budget
from .request import SearchRequest
from .scores import Losses, divergences, layer_losses

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
    place = find_device(recipe.runtime.device)
    if recipe.runtime.threads is not None:
        torch.set_num_threads(recipe.runtime.threads)
    model, tokenizer, teacher = _load(request, place)
    with_recall = request.method == "recall"
    text = calibration_text(recipe, tokenizer, request.sizes.context, with_recall=with_recall, quiet=quiet)
    measure = {"branch": recipe.search.branch, "teacher": teacher, "quiet": quiet}
    losses = layer_losses(request.method, model, text, request.windows, **measure)
    options = _options(request, losses, BYTES[recipe.runtime.dtype])
    chosen = _choice(request, options)
    states = ([("chosen", chosen)] if chosen else []) + _curve(request, options)
    points = _points(request, states, model, text, measure)
    return {
        "target": request.target,
        "finished": request.checkpoint is not None,
        "model": str(request.checkpoint or recipe.model),
        "method": request.method,
        "branch": recipe.search.branch,
        "tokens": text.tokens.numel(),
        "sequence_length": text.length,
        "seed": recipe.seed,
        "context": request.context,
        "full_bytes": _full_bytes(request),
        "losses": {str(layer): {str(w): loss for w, loss in row.items()} for layer, row in losses.items()},
        "choice": points[0] if chosen else None,
        "curve": points[1:] if chosen else points,
        "setting": setting(request, points[0]["windows"]) if chosen else None,
    }


def setting(request: SearchRequest, windows: list[int | str]) -> str:
    """What to pass to `run`, `swap`, `eval` or `generate` for a choice."""
    if request.full is not None and request.checkpoint is None:
        full = [layer for layer in request.windows if windows[layer] == "full"]
        return f"nha.full_attention_layers=[{','.join(map(str, full))}]"
    return f"nha.window=[{','.join(map(str, windows))}]"


def _load(request: SearchRequest, place: torch.device) -> tuple[Any, Any, Any]:
    """The model as a student, its tokenizer, and a teacher of its own where one was named."""
    recipe = request.recipe
    if request.checkpoint is None:
        folder = resolve_model(recipe.model)
        dtype = getattr(torch, recipe.runtime.dtype)
        model = load_student(folder, all_converted(recipe).nha, dtype=dtype, seed=recipe.seed)
        return model.to(place).eval(), AutoTokenizer.from_pretrained(folder), None
    loaded = []
    for folder in [request.checkpoint, *([resolve_model(request.teacher)] if request.teacher else [])]:
        try:
            loaded.append(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(place).eval())
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    teacher = loaded[1] if len(loaded) > 1 else None
    return loaded[0], AutoTokenizer.from_pretrained(request.checkpoint), teacher


def _full_bytes(request: SearchRequest) -> int:
    element = BYTES[request.recipe.runtime.dtype]
    return request.sizes.layers * request.sizes.full_cache_bytes(request.context, element)


def _options(request: SearchRequest, losses: Losses, element: int) -> dict[int, list[Option]]:
    sizes, nha = request.sizes, request.recipe.nha
    slots = nha.slots_by_layer(sizes.layers)
    whole = Option(None, sizes.full_cache_bytes(request.context, element), 0.0)
    return {
        layer: [
            Option(window, sizes.nha_cache_bytes(nha, slots[layer], window, element), loss)
            for window, loss in row.items()
        ]
        + [whole]
        for layer, row in losses.items()
    }


def _choice(request: SearchRequest, options: Mapping[int, list[Option]]) -> dict[int, Option] | None:
    if request.full is not None:
        keep = neediest({layer: row[0].loss for layer, row in options.items()}, request.full)
        return {layer: row[-1] if layer in keep else row[0] for layer, row in options.items()}
    if request.memory is None:
        return None
    beside = _beside(request)
    return within_budget(options, int(request.memory * _full_bytes(request)) - beside)


def _beside(request: SearchRequest) -> int:
    """Bytes of the layers that cannot be chosen: they stay full."""
    element = BYTES[request.recipe.runtime.dtype]
    return (request.sizes.layers - len(request.windows)) * request.sizes.full_cache_bytes(request.context, element)


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
    whole, beside = _full_bytes(request), _beside(request)
    points = []
    for (name, state), windows, kl in zip(states, arrangements, kls):
        each = ["full" if windows.get(layer) is None else windows[layer] for layer in range(request.sizes.layers)]
        size = size_of(state) + beside
        points.append(
            {"choice": name, "windows": each, "bytes": size, "share": size / whole, "loss": loss_of(state), "kl": kl}
        )
    return points
