"""How many slots each layer gets: layers are measured with several counts, and share a cache by what each gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer

from ..convert import load_student
from ..devices import find_device
from ..gate_inputs import calibrate_gates, calibration_ids
from ..model_source import resolve_model
from ..plan import BYTES
from ..recipe import NHASettings
from ..settings_types import NEEDS_TEXT
from .calibration import Calibration, calibration_text
from .choose import Option, loss_of, size_of, within_budget
from .request import SearchRequest
from .scores import divergences, layer_losses

START = "attended"
"""How gates start for the measure where the recipe's own start reads no text, and so tells nothing of a count."""


def find_slots(request: SearchRequest, *, quiet: bool = True) -> dict[str, Any]:
    """Measures every layer with every count of slots, chooses within the cache, and measures what was chosen.

    The gates of each count start from the recipe's calibration text and are not trained.

    Args:
        request: with `slots`.
    Returns:
        As `find_windows`, with {layer: {count: loss}} as "losses" and points that have "slots" (None where a layer
        stays full) in place of "windows": the choice, and each count in all layers.
    Raises:
        InputError: model or text is wrong, or the budget is too small.
    """
    assert request.slots is not None
    recipe = request.recipe
    measured = _Measured(request, quiet)
    windows = {layer: [window] for layer, window in measured.windows.items()}
    losses: dict[int, dict[int, float]] = {layer: {} for layer in windows}
    together = []
    for count in request.slots:
        model = measured.student(count)
        found = layer_losses(request.method, model, measured.text, windows, branch="both", quiet=quiet)
        for layer, window in measured.windows.items():
            losses[layer][count] = found[layer][window]
        together.append(measured.kl(model))
    options = {
        layer: [Option(count, measured.size(layer, count), loss) for count, loss in row.items()]
        for layer, row in losses.items()
    }
    budget = sum(measured.size(layer, measured.own[layer]) for layer in windows)
    if request.memory is not None:
        budget = int(request.memory * measured.full_bytes) - measured.beside
    chosen = within_budget(options, budget)
    curve = [
        measured.point(f"{count} each", {layer: row[place] for layer, row in options.items()}, kl)
        for place, (count, kl) in enumerate(zip(request.slots, together))
    ]
    return {
        "target": request.target,
        "finished": False,
        "model": recipe.model,
        "method": request.method,
        "branch": "both",
        "tokens": measured.text.tokens.numel(),
        "sequence_length": measured.text.length,
        "seed": recipe.seed,
        "context": request.context,
        "full_bytes": measured.full_bytes,
        "losses": {str(layer): {str(count): loss for count, loss in row.items()} for layer, row in losses.items()},
        "choice": measured.point("chosen", chosen, measured.kl(measured.student(measured.counts(chosen)))),
        "curve": curve,
        "setting": f"nha.slots=[{','.join(map(str, measured.counts(chosen)))}]",
    }


class _Measured:
    """The model of a search, made anew for every choice of slots, and what it is measured on."""

    def __init__(self, request: SearchRequest, quiet: bool) -> None:
        recipe = request.recipe
        self.request, self.recipe, self.quiet = request, recipe, quiet
        self.place = find_device(recipe.runtime.device)
        if recipe.runtime.threads is not None:
            torch.set_num_threads(recipe.runtime.threads)
        layers = request.sizes.layers
        self.windows = {layer: w for layer, w in enumerate(recipe.nha.windows(layers)) if w is not None}
        self.own = recipe.nha.slots_by_layer(layers)
        self.folder = resolve_model(recipe.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        with_recall = request.method == "recall"
        self.text: Calibration = calibration_text(
            recipe, self.tokenizer, request.sizes.context, with_recall=with_recall, quiet=quiet
        )
        self.ids = calibration_ids(recipe, self.tokenizer, quiet=quiet)
        self.element = BYTES[recipe.runtime.dtype]
        full = request.sizes.full_cache_bytes(request.context, self.element)
        self.full_bytes, self.beside = layers * full, (layers - len(self.windows)) * full

    def size(self, layer: int, count: int) -> int:
        """Cache of a layer with so many slots, in bytes."""
        return self.request.sizes.nha_cache_bytes(self.recipe.nha, count, self.windows[layer], self.element)

    def student(self, slots: int | list[int]) -> Any:
        """The student with so many slots, in all layers or by layer, its gates started from text."""
        recipe = self.recipe
        start = recipe.nha.gate_init if recipe.nha.gate_init in NEEDS_TEXT else START
        nha: NHASettings = recipe.nha.model_copy(update={"slots": slots, "gate_init": start})
        dtype, length = getattr(torch, recipe.runtime.dtype), recipe.training_length
        model = load_student(self.folder, nha, dtype=dtype, seed=recipe.seed, length=length).to(self.place).eval()
        calibrate_gates(model, nha, self.ids, seed=recipe.seed)
        return model

    def counts(self, state: Mapping[int, Option]) -> list[int]:
        """The slots of every layer; layers that stay full have what the recipe says, which nothing reads."""
        return [int(state[layer].value or 0) if layer in state else own for layer, own in enumerate(self.own)]

    def kl(self, model: Any) -> float:
        """KL(teacher || student) in nats per token, with every layer that can be NHA as NHA."""
        return divergences(model, self.text, [self.windows], branch="both", quiet=self.quiet)[0]

    def point(self, name: str, state: Mapping[int, Option], kl: float) -> dict[str, Any]:
        """A choice with its cache and the sum of its layers' losses."""
        size = size_of(state) + self.beside
        slots = [state[layer].value if layer in state else None for layer in range(len(self.own))]
        row = {"slots": slots, "bytes": size, "share": size / self.full_bytes, "loss": loss_of(state), "kl": kl}
        return {"choice": name, **row}
