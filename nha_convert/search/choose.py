"""From losses to layers and windows: the N neediest layers, or the best windows within a cache budget.

Pure arithmetic on a table of losses; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Option:
    """One thing that a layer can be.

    Attributes:
        value: its window, None for full attention; or its slots, where those are chosen.
        size: bytes of its cache.
        loss: what the layer loses so; 0 or more is usual, full attention has 0.
    """

    value: int | None
    size: int
    loss: float


def neediest(scores: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers of the largest score, ascending; of equal ones the first."""
    order = sorted(scores, key=lambda layer: (-scores[layer], layer))
    return sorted(order[:count])


def efficient(options: Sequence[Option]) -> list[Option]:
    """Those options that are worth their bytes: from the smallest on, each gains less per byte than the one before.

    The lower convex hull of (size, loss); what costs more without losing less is left out.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.size, one.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _rate(small: Option, large: Option) -> float:
    """Loss saved per byte."""
    return (small.loss - large.loss) / (large.size - small.size)


def upgrades(layers: Mapping[int, Sequence[Option]]) -> list[tuple[int, Option, Option]]:
    """(layer, from, to) of every step from the smallest caches to the smallest losses, the best rate first."""
    hulls = {layer: efficient(options) for layer, options in sorted(layers.items())}
    steps = [(layer, small, large) for layer, hull in hulls.items() for small, large in zip(hull, hull[1:])]
    return sorted(steps, key=lambda step: (-_rate(step[1], step[2]), step[0]))


def greedy_path(layers: Mapping[int, Sequence[Option]]) -> list[dict[int, Option]]:
    """What the greedy choice is at every size, from the smallest on."""
    state = {layer: efficient(options)[0] for layer, options in layers.items()}
    path = [dict(state)]
    for layer, _, large in upgrades(layers):
        state[layer] = large
        path.append(dict(state))
    return path


def within_budget(layers: Mapping[int, Sequence[Option]], budget: int) -> dict[int, Option]:
    """The greedy choice within a budget: the step that saves most per byte first, as long as it fits.

    Its loss exceeds the least possible by no more than the first step that does not fit would have saved.

    Args:
        layers: options of every layer.
        budget: bytes of all layers together.
    Raises:
        InputError: not even the smallest options fit.
    """
    state = {layer: efficient(options)[0] for layer, options in layers.items()}
    left = budget - size_of(state)
    if left < 0:
        raise InputError(
            f"--memory: the smallest windows take {budget - left} bytes of cache, the budget is {budget}; raise it, "
            "or give smaller ones with --windows or nha.slots"
        )
    for layer, small, large in upgrades(layers):
        if state[layer] == small and large.size - small.size <= left:
            state[layer] = large
            left -= large.size - small.size
    while True:  # what is left may still pay for options that are not the best per byte
        better = [
            (state[layer].loss - option.loss, -layer, option)
            for layer, options in layers.items()
            for option in options
            if option.loss < state[layer].loss and option.size - state[layer].size <= left
        ]
        if not better:
            return state
        _, minus, option = max(better, key=lambda one: (one[0], one[1], -one[2].size))
        left -= option.size - state[-minus].size
        state[-minus] = option


def size_of(state: Mapping[int, Option]) -> int:
    """Bytes of a choice."""
    return sum(option.size for option in state.values())


def loss_of(state: Mapping[int, Option]) -> float:
    """The sum of the layers' losses, each measured alone."""
    return sum(option.loss for option in state.values())
