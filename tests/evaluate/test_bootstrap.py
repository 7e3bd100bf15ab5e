"""Intervals by drawing windows anew: against the normal approximation, paired, seeded, and where they are undefined."""

import pytest
import torch

from nha_convert.evaluate.bootstrap import bootstrap_interval, gap_of_sums, mean_of_sums, recovery_of_sums
from nha_convert.evaluate.table import memory_recovery


def test_a_mean_has_its_standard_error() -> None:
    sums = torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4 + 50
    interval = bootstrap_interval(mean_of_sums, (sums, torch.full((200,), 10.0)))
    assert interval is not None
    reach = 1.96 * sums.std().item() / 200**0.5 / 10
    assert interval[0] == pytest.approx(sums.mean().item() / 10 - reach, abs=0.15 * reach)
    assert interval[1] == pytest.approx(sums.mean().item() / 10 + reach, abs=0.15 * reach)


def test_windows_of_unequal_length_count_by_their_tokens() -> None:
    totals, counts = torch.tensor([30.0, 1.0]), torch.tensor([10.0, 1.0])
    interval = bootstrap_interval(mean_of_sums, (totals, counts))
    assert interval == [1.0, 3.0]  # one window twice, and the mean of both, (30 + 1) / 11, between


def test_differences_are_paired() -> None:
    """Windows differ by far more than the models do, and the gap is the same in all."""
    easy = torch.arange(40.0) * 100
    interval = bootstrap_interval(gap_of_sums, (easy + 5, easy, torch.full((40,), 10.0)))
    assert interval == pytest.approx([0.5, 0.5])


def test_recovery() -> None:
    teacher, count = torch.full((20,), 200.0), torch.full((20,), 100.0)
    student, window = teacher + torch.linspace(5, 15, 20), teacher + 40
    value = recovery_of_sums(*(x.sum()[None] for x in (student, teacher, window, count))).item()
    assert value == pytest.approx(memory_recovery(2.1, 2.0, 2.4)) and value == pytest.approx(0.75)
    interval = bootstrap_interval(recovery_of_sums, (student, teacher, window, count))
    assert interval is not None and 0.68 < interval[0] < 0.74 and 0.76 < interval[1] < 0.82
    assert bootstrap_interval(recovery_of_sums, (student, teacher, teacher, count)) is None


def test_seed_and_few_windows() -> None:
    sums, counts = torch.arange(30.0), torch.ones(30)
    one, again, other = (bootstrap_interval(mean_of_sums, (sums, counts), seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other
    assert bootstrap_interval(mean_of_sums, (sums[:1], counts[:1])) is None
