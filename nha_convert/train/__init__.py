"""Staged distillation on `transformers.Trainer`: `run_stage` is all that the pipeline needs."""

from .job import stage_folder
from .stage import run_stage

__all__ = ["run_stage", "stage_folder"]
