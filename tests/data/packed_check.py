"""Packed documents against the same documents alone, through a student and a cross-entropy loss."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nha_convert.convert import load_student
from nha_convert.data import PackedDataset, training_dataset
from nha_convert.recipe import Recipe
from nha_convert.settings import NHASettings

LENGTH = 96
SIZES = (5, 9, 14, 22, 31, 40, 47, 63, 70, 150)
"""Letters of each document; the byte tokenizer makes as many tokens, and the last does not fit into a row."""


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token with a label, from the logits [B, T, V] of the token before, summed."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def packed_rows(folder: Path, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """One epoch of rows of `LENGTH` tokens."""
    text = "the quick brown fox jumps over the lazy dog. " * 4
    lines = [f'{{"text": "{(chr(65 + number) * 2 + text)[:size]}"}}\n' for number, size in enumerate(SIZES)]
    (folder / "rows.jsonl").write_text("".join(lines))
    recipe = Recipe.model_validate(
        {
            "model": "pico",
            "output": "unused",
            "data": {"sources": [{"source": "dataset", "path": str(folder / "rows.jsonl")}], "packing": "documents"},
            "stages": [{"kind": "align", "tokens": 32 * LENGTH, "sequence_length": LENGTH}],
        }
    )
    dataset = training_dataset(recipe, 0, tokenizer)
    assert isinstance(dataset, PackedDataset) and dataset.sources[0] is not None
    return [dataset[index] for index in range(len(dataset.sources[0]))]


def packed_against_alone(
    model_folder: Path, rows: list[dict[str, torch.Tensor]], *, told: bool = True
) -> dict[str, float]:
    """Runs a student on all rows as one batch, and on each of their documents alone.

    Args:
        told: the model is given the rows' position ids; without them it takes each row for one document.
    Returns:
        `logits`: largest difference; `loss`: relative difference of the sums; `gradients`: the largest
        ||difference|| / ||gradient|| over the parameters; `documents`, `parameters`: how many there were.
    """
    model = load_student(model_folder, NHASettings(window=8, slots=8, sinks=1), dtype=torch.float32, seed=0)
    model.requires_grad_(True)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    positions = batch["position_ids"] if told else None
    together = model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).logits
    whole = loss_sum(together, batch["labels"])
    whole.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    alone, logits_apart, documents = 0.0, 0.0, 0
    for number, row in enumerate(rows):
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], LENGTH]):
            logits = model(input_ids=row["input_ids"][None, start:end], use_cache=False).logits
            logits_apart = max(logits_apart, (logits[0] - together[number, start:end]).abs().max().item())
            loss = loss_sum(logits, row["labels"][None, start:end])
            loss.backward()
            alone, documents = alone + loss.item(), documents + 1
    apart = [
        ((tensor.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-12)).item()
        for name, tensor in model.named_parameters()
        if name in gradients
    ]
    return {
        "logits": logits_apart,
        "loss": abs(alone - whole.item()) / whole.item(),
        "gradients": max(apart),
        "documents": documents,
        "parameters": len(apart),
    }
