"""How many slots each layer gets: layers are measured with several counts, and share a cache by what each gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer

from ..convert import load_student
from ..devices import working_device
from ..gate_inputs import calibrate_gates, calibration_ids
from ..model_source import resolve_model
from ..settings_types import NEEDS_TEXT
from .calibration import Calibration, calibration_text
from .choose import Option, within_budget
from .find import point, search_result
from .request import SearchRequest
from .scores import divergences, layer_losses

START = "attended"
"""How gates start for the measure where the recipe's own start reads no text, and so tells nothing of a count."""
BRANCH = "both"
"""Slots are measured as they are read."""


def find_slots(request: SearchRequest, *, quiet: bool = True) -> dict[str, Any]:
    """Measures every layer with every count of slots, chooses within the cache, and measures what was chosen.

    The gates of each count start from the recipe's calibration text and are not trained.

    Args:
        request: with `slots`.
    Returns:
        As `find_windows`, with {layer: {count: loss}} as "losses", points that have "slots" ("full" where a layer stays
        so) in place of "windows" (the choice, and each count in all layers), and "gate_init", the start measured.
    Raises:
        InputError: model or text is wrong.
    """
    assert request.slots is not None
    measured = _Measured(request, quiet)
    own = request.recipe.nha.slots_by_layer(request.sizes.layers)
    losses: dict[int, dict[int, float]] = {layer: {} for layer in request.windows}
    together = []
    for count in request.slots:
        found, kl = measured.with_slots(count)
        together.append(kl)
        for layer, window in measured.windows.items():
            losses[layer][count] = found[layer][window]
    options = {
        layer: [Option(count, request.layer_bytes(measured.windows[layer], count), loss) for count, loss in row.items()]
        for layer, row in losses.items()
    }
    chosen = within_budget(options, request.slots_bytes(own) if request.budget is None else request.budget)
    counts = [int(chosen[layer].value or 0) if layer in chosen else kept for layer, kept in enumerate(own)]

    def placed(name: str, state: Mapping[int, Option], kl: float) -> dict[str, Any]:
        each = [state[layer].value if layer in state else "full" for layer in range(len(own))]
        return point(request, name, state, "slots", each, kl)

    curve = [
        placed(f"{count} each", {layer: row[place] for layer, row in options.items()}, kl)
        for place, (count, kl) in enumerate(zip(request.slots, together))
    ]
    choice = placed("chosen", chosen, measured.kl(measured.student(counts)))
    advice = f"nha.slots=[{','.join(map(str, counts))}]"
    result = search_result(request, measured.text, losses, choice, curve, advice, branch=BRANCH)
    return result | {"gate_init": measured.start}


class _Measured:
    """The model of a search, made anew for every choice of slots, and what it is measured on."""

    def __init__(self, request: SearchRequest, quiet: bool) -> None:
        recipe = request.recipe
        self.request, self.recipe, self.quiet = request, recipe, quiet
        self.place = working_device(recipe.runtime.device, recipe.runtime.threads)
        self.windows = {layer: own[0] for layer, own in request.windows.items()}
        self.start = recipe.nha.gate_init if recipe.nha.gate_init in NEEDS_TEXT else START
        self.folder = resolve_model(recipe.model)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.text: Calibration = calibration_text(
            recipe, tokenizer, request.sizes.context, with_recall=request.method == "recall", quiet=quiet
        )
        self.ids = calibration_ids(recipe, tokenizer, quiet=quiet)

    def student(self, slots: int | list[int]) -> Any:
        """The student with so many slots, in all layers or by layer, its gates started from text."""
        recipe = self.recipe
        nha = recipe.nha.model_copy(update={"slots": slots, "gate_init": self.start})
        dtype, length = getattr(torch, recipe.runtime.dtype), recipe.training_length
        model = load_student(self.folder, nha, dtype=dtype, seed=recipe.seed, length=length).to(self.place).eval()
        calibrate_gates(model, nha, self.ids, seed=recipe.seed)
        return model

    def with_slots(self, count: int) -> tuple[dict[int, dict[int, float]], float]:
        """Each layer's loss with so many slots, and `kl` with so many in all."""
        model = self.student(count)
        losses = layer_losses(
            self.request.method, model, self.text, self.request.windows, branch=BRANCH, quiet=self.quiet
        )
        return losses, self.kl(model)

    def kl(self, model: Any) -> float:
        """KL(teacher || student) in nats per token, with every layer that can be NHA as NHA."""
        return divergences(model, self.text, [self.windows], branch=BRANCH, quiet=self.quiet)[0]
