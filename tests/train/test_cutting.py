"""Every objective adds up: a batch cut into micro-batches gives the whole batch's loss, values and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import make, packed_batch, step

LOSSES = [
    {"function": "kl", "temperature": 2.0},
    {"function": "reverse_kl", "weight": 0.5},
    {"function": "ce", "weight": 0.2},
    {"function": "hidden", "weight": 0.3},
    {"function": "attention", "weight": 0.4},
]
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "align": ("align", {"memory_weight": 0.5}),
    "align adapters": ("align", {"train": ["gates", "lora"]}),
    "align projections": ("align", {"train": ["gates", "qkvo"], "own_teacher": True}),
    "hidden": ("hidden", {}),
    "distill": ("distill", {"losses": LOSSES}),
    "distill all": ("distill", {"losses": LOSSES, "train": ["gates", "all"], "own_teacher": True}),
    "finetune": ("finetune", {"train": ["gates", "no_mlp"]}),
}


@pytest.mark.parametrize("name", STAGES)
def test_any_cut_gives_the_loss_and_gradients_of_the_whole(pico: Path, name: str) -> None:
    kind, options = STAGES[name]
    objective = make(pico, kind, **options)
    batch = packed_batch()
    loss, values, gradients = step(objective, batch, [])
    assert loss.item() > 0 and values
    for cuts in ([1], [1, 2, 3], [3]):
        other_loss, other_values, other_gradients = step(objective, batch, cuts)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for key in values:
            torch.testing.assert_close(other_values[key], values[key], rtol=1e-5, atol=1e-9)
        together = torch.cat([gradient.flatten() for gradient in gradients.values()])
        other = torch.cat([gradient.flatten() for gradient in other_gradients.values()])
        assert (other - together).norm() <= 1e-5 * together.norm()
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["hidden", "distill", "finetune"])
def test_a_document_counts_as_if_alone(pico: Path, name: str) -> None:
    """The second document of a packed row: whatever stands before it unlabelled, and as a row of its own."""
    kind, options = STAGES[name]
    objective = make(pico, kind, **options)
    row = {key: value[1:2].clone() for key, value in packed_batch().items()}
    row["labels"][:, :20] = -100
    alone = {key: value[:, 20:] for key, value in row.items()}
    other = {**row, "input_ids": row["input_ids"].clone()}
    other["input_ids"][:, :20] = 255 - row["input_ids"][:, :20]
    assert objective.count(row) == objective.count(alone) == 48 - 20 - 1
    values = [step(objective, batch, []) for batch in (alone, row, other)]
    for loss, _, gradients in values[1:]:
        torch.testing.assert_close(loss, values[0][0], rtol=1e-5, atol=0)
        for key, gradient in gradients.items():
            wanted = values[0][2][key]
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), key
