"""One optimizer step of every kind of stage, by one process or by the ranks that torchrun starts.

    torchrun --nproc_per_node N ranks.py TEACHER RESULT

Rank 0 writes RESULT: {case: {"loss": ..., "gradients": {name: tensor}}} for DDP and FSDP2, whole batches and cut ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from nha_convert import modeling  # noqa: F401  (registers the NHA classes)
from nha_convert.convert import load_student
from nha_convert.recipe import Recipe
from nha_convert.train.engine import Engine, start_engine, stop_engine, whole
from nha_convert.train.job import StageJob
from nha_convert.train.objectives import make_objective
from nha_convert.train.trainer import NHATrainer

ROWS, LENGTH = 5, 48
LOSSES = [{"function": "kl", "temperature": 2.0}, {"function": "ce", "weight": 0.3}, {"function": "hidden"}]
KINDS: dict[str, dict[str, Any]] = {
    "align": {"kind": "align"},
    "hidden": {"kind": "hidden", "lora": {"rank": 2, "alpha": 4}},
    "distill": {"kind": "distill", "losses": LOSSES, "lora": {"rank": 2, "alpha": 4}},
    "finetune": {"kind": "finetune", "train": ["gates", "all"]},
}


class Packed(Dataset):
    """Rows of two documents each, with another share of unlabelled tokens in every row."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(index)
        input_ids = torch.randint(0, 256, (LENGTH,), generator=rng)
        cut = 10 + 5 * index
        labels = input_ids.clone()
        labels[: 3 * index] = -100
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]),
        }


class Stopped(Exception):
    """The gradients are there."""


class Recorder(NHATrainer):
    """Stops where the gradients of the first step are whole and not yet clipped."""

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        self.engine.sum_whole_gradients(self.learned)
        self.meter.end_step()
        self.meter.fold(self.engine)
        self.gradients = {
            name: whole(tensor.grad).clone()
            for name, tensor in self.objective.model.named_parameters()
            if tensor.grad is not None
        }
        raise Stopped


def recipe_of(stage: dict[str, Any], **runtime: Any) -> Recipe:
    """One stage of one step."""
    common = {"tokens": ROWS * LENGTH, "sequence_length": LENGTH, "batch_size": ROWS, "warmup": 0.0}
    return Recipe.model_validate(
        {
            "model": "pico",
            "output": "unused",
            "nha": {"slots": 8, "window": 8, "sinks": 1},
            "data": {"sources": [{"source": "stdlib"}]},
            "stages": [{**common, **stage}],
            "runtime": {"device": "cpu", **runtime},
        }
    )


def step(teacher: Path, recipe: Recipe, engine: Engine) -> dict[str, Any]:
    """Loss, gradients and items of the first step, put together from all ranks."""
    device = torch.device("cpu")
    model = load_student(teacher, recipe.nha, dtype=torch.float32, seed=0)
    objective = make_objective(model, recipe.stages[0], seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # adapters that do something: the second matrix starts at zero
        for name, tensor in model.named_parameters():
            if ".lora_B." in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=rng))
    training = engine.sharded(objective, device) if engine.kind == "fsdp2" else objective
    spread = [tensor for tensor in training.model.parameters() if isinstance(tensor, DTensor)]
    assert bool(spread) is (engine.kind == "fsdp2")
    assert all(tensor.to_local().numel() <= -(-len(tensor) // engine.world) * tensor[0].numel() for tensor in spread)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(training, StageJob(recipe, 0, Path(folder), quiet=True), Packed(), device, engine)
        try:
            trainer.train()
        except Stopped:
            return {"loss": trainer.meter.sums, "gradients": trainer.gradients, "items": sorted(trainer.meter.items)}
    raise AssertionError("no step was made")


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for kind, stage in KINDS.items():
        for name in ("ddp", "fsdp2"):
            for micro in (None, 2):
                recipe = recipe_of(stage, engine=name, micro_batch=micro)
                engine = start_engine(recipe.runtime, torch.device("cpu"))
                found[kind, name, micro] = step(Path(sys.argv[1]), recipe, engine)
    if engine.main:
        torch.save(found, sys.argv[2])
    stop_engine()


if __name__ == "__main__":
    main()
