"""Runs one stage of a recipe: fresh, resumed, or read back when it is done; by one process or by many together."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import training_dataset
from ..devices import world_of
from ..errors import InputError, WorkError
from ..files import write_json
from ..recipe import Recipe
from .by_layer import LayerwiseTrainer
from .checkpoints import (
    latest_checkpoint,
    load_tensors,
    read_marker,
    remove_checkpoints,
    trained_tensors,
    write_tensors,
)
from .engine import Engine, whole
from .faults import naming_a_full_disk, naming_lost_ranks, naming_too_little_memory
from .job import StageJob
from .objective import Objective
from .objectives import make_objective
from .trainer import NHATrainer
from .wrapping import prepared


def run_stage(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    index: int,
    run_dir: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    teacher: Callable[[], nn.Module] | None = None,
    engine: Engine | None = None,
    device: torch.device | None = None,
    base: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Trains `recipe.stages[index]` in place, or loads its result where it is done.

    Writes stages/NN-name/{checkpoint-N, trained.safetensors, done.json} and rows of metrics.jsonl in the run folder,
    which all processes see.

    Args:
        model: the student as the stage before left it, on the device it is to be trained on (under FSDP2 on the CPU).
        run_dir: the run folder.
        resume: go on from the last whole checkpoint; else what an unfinished stage left is removed.
        quiet: no progress line.
        teacher: gives the base model, on the student's device; called where `Recipe.needs_teacher` says so.
        engine: the processes that train together; one if not given.
        device: where this process computes; the model's if not given.
        base: folder of the base model; read where `Recipe.by_layer` says so. There the base tensors of `model` may be
            on disk (`load_streamed`).
    Returns:
        The model (adapters merged, in eval mode) and the content of done.json.
    Raises:
        InputError: the stage cannot train this model, or the folder holds work of other settings.
        WorkError: SIGTERM, a loss that is not finite, no memory, no space or a lost rank; checkpoints are kept.
    """
    engine = engine or Engine()
    job = StageJob(recipe, index, Path(run_dir), quiet)
    with naming_lost_ranks(engine, job), naming_a_full_disk(job, "the stage's files"):
        if engine.from_main(job.done.exists()):
            done = json.loads(job.done.read_text(encoding="utf-8"))
            job.check_identity(done["identity"], job.done)
            load_tensors(model, job.trained)
            return model.eval(), done
        device = device or next(model.parameters()).device
        _check(device, index)
        needs_teacher = recipe.needs_teacher(index)
        if needs_teacher and teacher is None:
            raise ValueError(f"{recipe.stages[index].label} needs a teacher, since the student's own weights change")
        frozen_teacher = teacher() if teacher is not None and needs_teacher else None
        use_cache, learned = model.config.use_cache, [tensor.requires_grad for tensor in model.parameters()]
        try:
            objective = make_objective(model, job.settings, seed=job.seed, teacher=frozen_teacher)
        except InputError:
            for tensor, before in zip(model.parameters(), learned):
                tensor.requires_grad_(before)
            raise
        checkpoint = engine.from_main(_starting_point(job, resume) if engine.main else None)
        with engine.main_first(f"{job.name}/data"):
            dataset = training_dataset(recipe, index, tokenizer, quiet=quiet or not engine.main)
        job.text = dataset.fingerprint
        if checkpoint is not None:
            job.check_text(read_marker(checkpoint).get("text", ""), checkpoint)
        trainer: NHATrainer | LayerwiseTrainer
        try:
            if recipe.by_layer(index):
                trainer, tensors = _train_by_layer(objective, job, dataset, device, base, checkpoint)
            else:
                trainer, tensors = _train(objective, job, dataset, device, engine, checkpoint)
        finally:
            model.config.use_cache = use_cache
        done = _summary(trainer, tensors)
        if engine.main:
            write_tensors(job.trained, tensors)
            write_json(job.done, done)
            remove_checkpoints(job.folder)
        return model.requires_grad_(False).eval(), engine.from_main(done)


def _check(device: torch.device, index: int) -> None:
    _, _, local = world_of(os.environ)
    if device.type == "cuda" and (device.index or 0) != local:
        raise InputError(
            f"runtime.device: training uses the first visible GPU, found {device}; "
            f"use CUDA_VISIBLE_DEVICES={device.index} and --set runtime.device=cuda"
        )


def _starting_point(job: StageJob, resume: bool) -> Path | None:
    """The checkpoint to go on from, with the metrics of later steps removed; None starts afresh."""
    found, torn = latest_checkpoint(job.folder) if resume else (None, [])
    for line in torn:
        print(f"warning: {line}", file=sys.stderr)
    if found is not None:
        job.check_identity(found[1]["identity"], found[0])
    path = None if found is None else found[0]
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_checkpoints(job.folder, keep=[] if path is None else [path])
    job.metrics().cut(0 if found is None else found[1]["step"])
    return path


def _train(
    objective: Objective, job: StageJob, dataset: Any, device: torch.device, engine: Engine, checkpoint: Path | None
) -> tuple[NHATrainer, dict[str, torch.Tensor]]:
    """Trains to the end; the trainer, and the tensors that the stage changed under the plain model's names."""
    training = engine.sharded(objective, device) if engine.kind == "fsdp2" else objective
    with prepared(training.model, job.recipe.runtime):
        trainer = NHATrainer(training, job, dataset, device, engine)
        _train_steps(trainer, checkpoint)
    if training is not objective:
        parameters = dict(objective.model.named_parameters())
        with torch.no_grad():
            for name, tensor in trained_tensors(training.model).items():
                parameters[name].copy_(whole(tensor))
    return trainer, objective.finish()


def _train_by_layer(
    objective: Objective, job: StageJob, dataset: Any, device: torch.device, base: Path | None, checkpoint: Path | None
) -> tuple[LayerwiseTrainer, dict[str, torch.Tensor]]:
    """`_train` with a few layers in memory at a time."""
    if base is None:
        raise ValueError("runtime.layers_at_once reads layers from the base model's folder, and none was given")
    trainer = LayerwiseTrainer(objective, job, dataset, device, base)
    _train_steps(trainer, checkpoint)
    return trainer, objective.finish()


def _train_steps(trainer: NHATrainer | LayerwiseTrainer, checkpoint: Path | None) -> None:
    job = trainer.job
    try:
        with job.stopping_on_sigterm(), naming_too_little_memory(job):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.close()
    if trainer.stopping:
        step = trainer.state.global_step
        kept = "which is saved" if step else "before the first checkpoint"
        raise WorkError(
            f"stage {job.name}: stopped by SIGTERM at step {step} of {trainer.state.max_steps}, {kept}; "
            f"{job.how_to_resume}"
        )


def _summary(trainer: NHATrainer | LayerwiseTrainer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The content of done.json; `first` and `last` hold loss and per-layer errors, of step 1 and of the last row."""
    job, settings = trainer.job, trainer.job.settings
    return {
        "stage": job.name,
        "kind": settings.kind,
        "identity": job.identity(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * settings.batch_size * settings.sequence_length,
        "trained_parameters": sum(tensor.numel() for tensor in trainer.learned),
        "saved_tensors": len(tensors),
        "first": trainer.meter.first,
        "last": trainer.meter.last,
        "seconds": round(trainer.meter.seconds, 1),
    }
