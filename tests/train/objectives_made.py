"""Objectives on pico models, batches, and one optimizer step of them, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nha_convert.convert import load_student
from nha_convert.settings import NHASettings
from nha_convert.stage_settings import AlignStage, DistillStage, FinetuneStage, HiddenStage, StageSettings
from nha_convert.train.objective import Objective
from nha_convert.train.objectives import make_objective

T, ROWS = 48, 4
CLASSES: dict[str, type[StageSettings]] = {
    "align": AlignStage,
    "hidden": HiddenStage,
    "distill": DistillStage,
    "finetune": FinetuneStage,
}


def settings(kind: str, **options: Any) -> StageSettings:
    """A stage of a kind, its tokens without meaning."""
    return CLASSES[kind].model_validate({"kind": kind, "tokens": 1, **options})


def student(teacher: Path, **options: Any) -> Any:
    """A student in fp32 with 8 slots, a window of 8 and one sink."""
    nha = NHASettings(**{"slots": 8, "window": 8, "sinks": 1, **options})
    return load_student(teacher, nha, dtype=torch.float32, seed=3)


def make(
    teacher: Path, kind: str, *, own_teacher: bool = False, nha: dict[str, Any] | None = None, **options: Any
) -> Any:
    """An objective whose adapters, where it has any, do something."""
    nha = nha or {}
    other = student(teacher, **nha) if own_teacher else None
    model = student(teacher, **nha)
    objective: Objective = make_objective(model, settings(kind, **options), seed=5, teacher=other)
    scramble(model)
    return objective


def scramble(model: Any) -> None:
    """Fills the adapters' second matrices, which start at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_B." in name:
                tensor.normal_(std=0.1)


def plain_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows of one document each, every token labelled."""
    torch.manual_seed(0)
    input_ids = torch.randint(0, 256, (rows, T))
    return {"input_ids": input_ids, "labels": input_ids.clone(), "position_ids": torch.arange(T).repeat(rows, 1)}


def packed_batch() -> dict[str, torch.Tensor]:
    """Rows of one document, of two, of three with a masked one, and one with hardly a label."""
    batch = plain_batch(ROWS)
    lengths = [[T], [20, T - 20], [9, 17, T - 26], [T - 5, 5]]
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch["labels"][2, 9:26] = -100
    batch["labels"][0, :7] = -100
    batch["labels"][3, 2:] = -100
    return batch


def step(
    objective: Objective, batch: dict[str, torch.Tensor], cuts: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, measured values and gradients of one optimizer step over a batch whose rows are cut at `cuts`."""
    bounds = [0, *cuts, len(batch["input_ids"])]
    parts = [{name: value[a:b] for name, value in batch.items()} for a, b in zip(bounds, bounds[1:])]
    items = torch.stack([objective.count(part) for part in parts]).sum()
    total, values = torch.zeros(()), {}
    objective.zero_grad()
    for part in parts:
        loss, measured = objective(part, items)
        loss.backward()
        total = total + loss.detach()
        for name, value in measured.items():
            assert not value.requires_grad
            values[name] = values.get(name, torch.zeros(())) + value
    gradients = {
        f"{group['name']}.{index}": tensor.grad.clone()
        for group in objective.groups()
        for index, tensor in enumerate(group["params"])
    }
    return total, values, gradients
