"""What it costs to start gates from text, before the first stage. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantities import BYTES
from .recipe import Recipe
from .settings_types import NEEDS_TEXT, calibration_rows

if TYPE_CHECKING:
    from .plan import Dimensions

EVALUATIONS = 75
"""Of the regressions' loss and gradient: `gate_attended.FIT_STEPS`, and a quarter more for line searches."""


def gates_start(recipe: Recipe, sizes: Dimensions) -> dict[str, Any] | None:
    """Text and FLOPs of the start of gates.

    The matrix products of one pass of the decoder, and with `attended` the regressions of all slots. Softmax attention
    of the pass, and clusters and the search against the layers' outputs, are not counted.

    Args:
        recipe: whose full layers are named.
    Returns:
        {"method", "tokens", "flops", "bytes"}; None where gates start without text. The bytes are those of the states
        before and after a layer, and of its queries, keys, values and heads' outputs, which are there at once.
    """
    nha = recipe.nha
    windows = nha.windows(sizes.layers)
    if nha.gate_init not in NEEDS_TEXT or not any(window is not None for window in windows):
        return None
    length = recipe.training_length or recipe.evaluate.sequence_length
    tokens = calibration_rows(length, nha.gate_init_rows) * length
    head = sizes.vocabulary * sizes.hidden * (2 - sizes.tied)  # embeddings and head, which the pass has no product of
    flops = 2 * (sizes.active_parameters - head) * tokens
    if nha.gate_init == "attended":
        slots = sum(own for window, own in zip(windows, nha.slots_by_layer(sizes.layers)) if window is not None)
        written = sum(window is not None for window in windows) if nha.gate == "routed" else 0  # write_proj's rows
        flops += 4 * tokens * sizes.hidden * sizes.groups * (slots + written) * EVALUATIONS
    channels = 2 * sizes.hidden + 2 * (sizes.heads + sizes.groups) * sizes.head_dim
    held = tokens * channels * BYTES[recipe.runtime.dtype]
    return {"method": nha.gate_init, "tokens": tokens, "flops": flops, "bytes": held}
