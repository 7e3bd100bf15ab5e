"""A pico model trained in both stages; run as a script it is killed at a named place.

    python stages.py TEACHER RUN_DIR TEXT PLACE

PLACE: `step:I:N` (in step N of stage I), `optimizer:I:N` and `marker:I:N` (while step N of stage I is being saved),
`done:I` (after the tensors of stage I are written, before done.json), or `none`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

from nha_convert import modeling  # noqa: F401  (registers the NHA classes)
from nha_convert.convert import load_student
from nha_convert.recipe import Recipe
from nha_convert.train import checkpoints, run_stage, stage, trainer


def make_recipe(text: Path, **changes: Any) -> Recipe:
    """Nine steps of align and eight of distill at T = 48, W = 8; saved every four steps, logged every three."""
    common = {"sequence_length": 48, "batch_size": 2, "warmup": 0.2, "save_steps": 4}
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1}
    settings: dict[str, Any] = {
        "model": "pico",
        "output": "unused",
        "seed": 3,
        "nha": {"slots": 8, "window": 8, "sinks": 1, "gate_init": "spread"},
        "data": {"sources": [{"source": "text", "path": str(text)}]},
        "stages": [
            {"kind": "align", "tokens": 9 * 96, "learning_rate": 0.02, **common},
            {"kind": "distill", "tokens": 8 * 96, "learning_rate": 0.005, "lora": lora, **common},
        ],
        "evaluate": {"sequence_length": 48},
        "runtime": {"device": "cpu", "logging_steps": 3},
    }
    return Recipe.model_validate(settings | changes)


def base_model(teacher: Path, recipe: Recipe) -> Any:
    """The teacher as an NHA model whose layers all run the base attention."""
    model = load_student(teacher, recipe.nha, dtype=getattr(torch, recipe.runtime.dtype), seed=recipe.seed)
    model.set_windows("full")
    return model.eval()


def train(teacher: Path, run_dir: Path, recipe: Recipe, *, resume: bool = False) -> tuple[Any, list[dict[str, Any]]]:
    """All stages of a recipe; the model and each stage's done.json."""
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = load_student(teacher, recipe.nha, dtype=getattr(torch, recipe.runtime.dtype), seed=recipe.seed)
    summaries = []
    for index in range(len(recipe.stages)):
        model, summary = run_stage(
            model,
            tokenizer,
            recipe,
            index,
            run_dir,
            resume=resume,
            quiet=True,
            teacher=lambda: base_model(teacher, recipe),
        )
        summaries.append(summary)
    return model, summaries


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(place: str) -> Any:
    """A patch under which the process kills itself at `place`."""
    what, *numbers = place.split(":")
    index, step = [*map(int, numbers), 0, 0][:2]
    if what == "done":
        real_write = stage.write_json

        def write(path: Path, content: Any) -> None:
            if path.parent.name.startswith(f"{index + 1:02d}-"):
                _die()
            real_write(path, content)

        return mock.patch.object(stage, "write_json", write)
    real_step, real_finish = trainer.NHATrainer.training_step, checkpoints.finish_checkpoint
    real_write = checkpoints.write_tensors

    def here(self: Any) -> bool:
        return self.job.index == index and self.state.global_step == step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real_step(self, *args, **kwargs)
        return _die() if here(self) else result

    def write_tensors(path: Path, tensors: Any) -> None:
        real_write(path, tensors)
        if path.parent.name == f".checkpoint-{step}.partial" and path.parents[1].name.startswith(f"{index + 1:02d}-"):
            (path.parent / "optimizer.pt").write_bytes(b"half of it")
            _die()

    def finish(partial: Path, marker: dict[str, Any]) -> Any:
        stands = partial.parent.name.startswith(f"{index + 1:02d}-")
        return _die() if stands and marker["step"] == step else real_finish(partial, marker)

    if what == "step":
        return mock.patch.object(trainer.NHATrainer, "training_step", training_step)
    if what == "optimizer":
        return mock.patch.object(trainer, "write_tensors", write_tensors)
    if what == "marker":
        return mock.patch.object(trainer, "finish_checkpoint", finish)
    raise ValueError(f"no such place: {place}")


if __name__ == "__main__":
    teacher, run_dir, text = map(Path, sys.argv[1:4])
    with killed_at(sys.argv[4]):
        train(teacher, run_dir, make_recipe(text), resume=True)
