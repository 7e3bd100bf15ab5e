"""Reads a run folder back."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .convert import load_student
from .errors import InputError
from .gate_inputs import GATES
from .model_source import resolve_model
from .recipe import Recipe, load_recipe
from .train import run_stage
from .train.checkpoints import load_tensors


def load_final(run_dir: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, Recipe]:
    """The final model of a run folder, rebuilt from the teacher and the stages' trained tensors.

    Raises:
        InputError: not a run folder, or a stage of it has not finished.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").exists():
        raise InputError(f"{run_dir}: no recipe.yaml, so this is not a run folder; make one with `nha-convert run`")
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    teacher_dir = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    dtype = getattr(torch, recipe.runtime.dtype)
    model = load_student(teacher_dir, recipe.nha, dtype=dtype, seed=recipe.seed, length=recipe.training_length)
    if (run_dir / GATES).exists():
        load_tensors(model, run_dir / GATES)
    for index in range(len(recipe.stages)):
        folder = next(iter((run_dir / "stages").glob(f"{index + 1:02d}-*/done.json")), None)
        if folder is None:
            raise InputError(
                f"{run_dir}: stage {index + 1} is not finished; finish it with `nha-convert run {run_dir}/recipe.yaml "
                f"--out {run_dir} --resume`"
            )
        model, _ = run_stage(model, tokenizer, recipe, index, run_dir, resume=True, quiet=True)
    return model.eval(), tokenizer, recipe
