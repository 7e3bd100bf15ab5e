"""From losses to layers and windows: the budget is kept, and greedy is as good as trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from nha_convert.errors import InputError
from nha_convert.search.choose import (
    Option,
    efficient,
    greedy_path,
    loss_of,
    neediest,
    size_of,
    upgrades,
    within_budget,
)

SIZES = (10, 20, 40, 100)


def random_layers(seed: int, layers: int = 4) -> dict[int, list[Option]]:
    """Losses that fall with size, but not always by less and less; the last option is full attention."""
    rng = random.Random(seed)
    found = {}
    for layer in range(layers):
        losses = sorted((rng.random() ** 3 for _ in SIZES[1:]), reverse=True) + [0.0]
        found[layer] = [
            Option(None if size == SIZES[-1] else size, size, loss) for size, loss in zip(SIZES, losses, strict=True)
        ]
    return found


def best(layers: dict[int, list[Option]], budget: int) -> float:
    """The least loss of all choices that fit."""
    every = itertools.product(*layers.values())
    return min(sum(one.loss for one in choice) for choice in every if sum(one.size for one in choice) <= budget)


def missed(layers: dict[int, list[Option]], budget: int) -> float:
    """What the first step along the greedy path that does not fit would have saved; 0 where all fit."""
    used = sum(efficient(options)[0].size for options in layers.values())
    for _, small, large in upgrades(layers):
        used += large.size - small.size
        if used > budget:
            return small.loss - large.loss
    return 0.0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [40, 75, 130, 200, 290, 400, 1000])
def test_greedy_against_every_choice(seed: int, budget: int) -> None:
    layers = random_layers(seed)
    chosen = within_budget(layers, budget)
    assert set(chosen) == set(layers)
    assert size_of(chosen) <= budget
    least = best(layers, budget)
    assert least - 1e-12 <= loss_of(chosen) <= least + missed(layers, budget) + 1e-12


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("full", range(5))
def test_full_or_not_is_chosen_as_well_as_can_be(seed: int, full: int) -> None:
    """With two options of the same sizes in every layer nothing beats taking the neediest ones."""
    layers = {layer: [options[0], options[-1]] for layer, options in random_layers(seed).items()}
    chosen = within_budget(layers, 4 * SIZES[0] + full * (SIZES[-1] - SIZES[0]))
    assert loss_of(chosen) == pytest.approx(best(layers, size_of(chosen)))
    needy = neediest({layer: options[0].loss for layer, options in layers.items()}, full)
    assert [layer for layer, option in chosen.items() if option.value is None] == needy


def test_greedy_is_not_always_the_best() -> None:
    """What the bound is for: one large gain that the better rate of a small one leaves no room for."""
    layers = {0: [Option(8, 1, 0.3), Option(None, 2, 0.0)], 1: [Option(8, 1, 2.0), Option(None, 11, 0.0)]}
    assert best(layers, 12) == pytest.approx(0.3)
    assert loss_of(within_budget(layers, 12)) == pytest.approx(2.0)
    assert missed(layers, 12) == pytest.approx(2.0)


def test_what_is_left_buys_what_is_off_the_hull() -> None:
    layers = {0: [Option(8, 1, 1.0), Option(16, 5, 0.9), Option(None, 10, 0.0)]}
    assert [option.size for option in efficient(layers[0])] == [1, 10]
    assert within_budget(layers, 6) == {0: layers[0][1]}


def test_options_that_cost_more_and_save_nothing_are_never_taken() -> None:
    layers = {0: [Option(8, 1, 0.5), Option(16, 2, 0.5), Option(32, 3, 0.7), Option(None, 2, 0.1)]}
    assert efficient(layers[0]) == [layers[0][0], layers[0][3]]
    assert within_budget(layers, 10) == {0: layers[0][3]}


def test_a_layer_that_gains_from_its_window_keeps_it() -> None:
    """A negative loss: the layer is better than full attention as it is, and more bytes are no use."""
    assert within_budget({0: [Option(8, 1, -0.1), Option(None, 5, 0.0)]}, 10)[0].value == 8


def test_the_path_goes_from_the_smallest_to_the_least_loss() -> None:
    layers = random_layers(1)
    path = greedy_path(layers)
    assert size_of(path[0]) == 4 * SIZES[0]
    assert loss_of(path[-1]) == 0
    losses, sizes = [loss_of(state) for state in path], [size_of(state) for state in path]
    assert losses == sorted(losses, reverse=True) and sizes == sorted(sizes)
    rates = [(a - b) / (d - c) for a, b, c, d in zip(losses, losses[1:], sizes, sizes[1:])]
    assert rates == sorted(rates, reverse=True)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(InputError, match="--memory: the smallest windows take 40 bytes of cache, the budget is 39"):
        within_budget(random_layers(0), 39)


def test_of_equal_layers_the_first_is_kept() -> None:
    assert neediest({2: 0.5, 0: 0.5, 1: 0.1, 3: 0.9}, 2) == [0, 3]
