"""What `search --slots` is asked for: its part of `request`. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from ..recipe import Recipe
from ..settings_types import calibration_rows

if TYPE_CHECKING:
    from .request import SearchRequest


def slot_counts_named(named: str, full: int | None, windows: str | None, method: str | None) -> tuple[int, ...]:
    """Counts of slots to try, ascending.

    Raises:
        InputError: they are no numbers, or another option does not go with them.
    """
    if full is not None or windows is not None:
        other = "--full" if full is not None else "--windows"
        raise InputError(f"--slots {named}: chooses slots with windows as they are; leave {other} out")
    if method == "attention":
        raise InputError("--method: attention looks at the teacher alone, not at slots; leave it out or take another")
    parts = [part.strip() for part in named.strip("[] ").split(",")]
    numbers = sorted({int(part) for part in parts if part.isdigit()})
    if len(numbers) < 2 or numbers[0] < 1 or not all(part.isdigit() for part in parts):
        raise InputError(f"--slots: at least two numbers such as 16,64,256 are needed, found {named!r}")
    return tuple(numbers)


def windows_with_slots(
    recipe: Recipe, named: str, *, target: str, finished: bool, layers: int, overrides: list[str]
) -> dict[int, list[int]]:
    """The window of every layer whose slots are chosen: those that the recipe converts.

    Args:
        named: what `--slots` was given.
        finished: whether the target is an NHA checkpoint.
    Raises:
        InputError: the slots of this target cannot be chosen.
    """
    if finished:
        raise InputError(
            f"--slots {named}: {target} is finished, and its slots are those that its gates were trained with; name "
            "the recipe or the base model, or choose its windows with --windows"
        )
    if recipe.nha.auto is not None:
        raise InputError(
            f"--slots {named}: nha.full_attention_layers is {recipe.nha.full_attention_layers}; choose these layers "
            "first (--full N) and name them with --set"
        )
    if any(one.startswith("search.branch=") for one in overrides):
        raise InputError(f"--slots {named}: slots are measured as they are read; leave --set search.branch out")
    return {layer: [window] for layer, window in enumerate(recipe.nha.windows(layers)) if window is not None}


def check_slot_counts(request: SearchRequest, length: int) -> None:
    """Refuses counts of slots that cannot be measured or do not fit.

    Args:
        request: with `slots`.
        length: tokens of the rows they are measured on.
    Raises:
        InputError: they cannot.
    """
    assert request.slots is not None
    counts, nha = request.slots, request.recipe.nha
    named = ",".join(map(str, counts))
    if not request.windows:
        raise InputError(f"--slots {named}: every layer of {request.target} stays full; convert one (nha.window)")
    widest = max(own[0] for own in request.windows.values())
    if widest + nha.sinks >= length:
        raise InputError(
            f"nha.window: rows of {length} tokens fit into a window of {widest} and the sinks, so no slot is read; "
            "raise search.sequence_length or lower nha.window"
        )
    row = request.recipe.training_length or request.recipe.evaluate.sequence_length
    tokens = calibration_rows(row, nha.gate_init_rows) * max(0, row - nha.sinks)
    if counts[-1] > tokens:
        raise InputError(
            f"--slots {named}: gates start from {tokens} tokens, fewer than {counts[-1]}; lower it, or raise "
            "nha.gate_init_rows"
        )
    least = request.slots_bytes([counts[0]] * request.sizes.layers)
    if request.budget is not None and least > request.budget:
        raise InputError(
            f"--memory: {counts[0]} slots in every layer that is converted, and the others full, take "
            f"{least + request.beside} bytes of cache, {request.budget + request.beside} are allowed; raise it, or "
            "name a smaller count with --slots"
        )
    own = request.slots_bytes(nha.slots_by_layer(request.sizes.layers))
    if request.budget is None and least > own:
        raise InputError(
            f"--slots {named}: {counts[0]} slots in every layer take {least} bytes of cache, nha.slots = {nha.slots} "
            f"takes {own}, which is shared out; name a smaller count, raise nha.slots, or give --memory"
        )
