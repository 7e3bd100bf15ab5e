"""Runs one stage of a recipe: fresh, resumed, or read back when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import training_dataset
from ..errors import InputError, WorkError
from ..files import write_json
from ..modeling.attention_nha import nha_layers
from ..recipe import Recipe
from .align import AlignTrainer
from .checkpoints import latest_checkpoint, load_tensors, remove_checkpoints, trained_tensors, write_tensors
from .distill import DistillTrainer
from .job import StageJob
from .trainer import NHATrainer


def run_stage(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    index: int,
    run_dir: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Trains `recipe.stages[index]` in place, or loads its result where it is done.

    Writes stages/NN-name/{checkpoint-N, trained.safetensors, done.json} and rows of metrics.jsonl in the run folder.

    Args:
        model: the student as the stage before left it, on the device it is to be trained on.
        run_dir: the run folder.
        resume: go on from the last complete checkpoint; else what an unfinished stage left is removed.
        quiet: no progress bars.
    Returns:
        The model (adapters merged, in eval mode) and the content of done.json.
    Raises:
        InputError: the stage cannot train this model, or the folder holds work of other settings.
        WorkError: SIGTERM, a loss that is not finite, or no memory; checkpoints are kept.
    """
    job = StageJob(recipe, index, Path(run_dir), quiet)
    if job.done.exists():
        done = json.loads(job.done.read_text(encoding="utf-8"))
        job.check_identity(done["identity"], job.done)
        load_tensors(model, job.trained)
        return model.eval(), done
    _check(model, recipe, index)
    checkpoint = _starting_point(job, resume)
    dataset = training_dataset(recipe, index, tokenizer, quiet=quiet)
    use_cache = model.config.use_cache
    trainer = (AlignTrainer if job.settings.kind == "align" else DistillTrainer)(model, job, dataset)
    try:
        _train(trainer, checkpoint)
        tensors = trainer.merge() if isinstance(trainer, DistillTrainer) else trained_tensors(model)
    finally:
        model.config.use_cache = use_cache
    write_tensors(job.trained, tensors)
    done = _summary(trainer, tensors)
    write_json(job.done, done)
    remove_checkpoints(job.folder)
    return model.requires_grad_(False).eval(), done


def _check(model: Any, recipe: Recipe, index: int) -> None:
    kind = recipe.stages[index].kind
    if kind == "align" and not nha_layers(model):
        raise InputError(
            f"stages.{index} (align): nothing to train, every layer keeps full attention; set nha.window to a number"
        )
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index:
        raise InputError(
            f"runtime.device: training uses the first visible GPU, found {device}; "
            f"use CUDA_VISIBLE_DEVICES={device.index} and --set runtime.device=cuda"
        )


def _starting_point(job: StageJob, resume: bool) -> Path | None:
    """The checkpoint to go on from, with the metrics of later steps removed; None starts afresh."""
    found = latest_checkpoint(job.folder) if resume else None
    if found is not None:
        job.check_identity(found[1]["identity"], found[0])
    path = None if found is None else found[0]
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_checkpoints(job.folder, keep=path)
    job.metrics().cut(0 if found is None else found[1]["step"])
    return path


def _train(trainer: NHATrainer, checkpoint: Path | None) -> None:
    job = trainer.job
    try:
        with job.stopping_on_sigterm():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"stage {job.name}: the device's memory does not hold a batch of {job.settings.batch_size} x "
            f"{job.settings.sequence_length} tokens ({str(error).splitlines()[0]}); lower stages.{job.index}.batch_size"
        ) from error
    finally:
        trainer.stage_callback.close()
    if job.stop.is_set():
        raise WorkError(
            f"stage {job.name}: stopped by SIGTERM at step {trainer.state.global_step} of {trainer.state.max_steps}, "
            f"which is saved; {job.how_to_resume}"
        )


def _summary(trainer: NHATrainer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The content of done.json; `first` and `last` hold loss and per-layer errors, of step 1 and of the last row."""
    job, settings = trainer.job, trainer.job.settings
    return {
        "stage": job.name,
        "kind": settings.kind,
        "identity": job.identity(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * settings.batch_size * settings.sequence_length,
        "trained_parameters": sum(tensor.numel() for group in trainer.groups for tensor in group["params"]),
        "saved_tensors": len(tensors),
        "first": trainer.meter.first,
        "last": trainer.meter.last,
        "seconds": round(trainer.meter.seconds, 1),
    }
