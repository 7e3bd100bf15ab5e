"""What goes wrong around training, by name: a full disk, a lost rank, too little memory, a missing logger."""

from __future__ import annotations

import errno
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ..errors import InputError, WorkError
from .checkpoints import latest_checkpoint, remove_checkpoints
from .engine import Engine, RankLostError
from .job import StageJob

_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_SILENCE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|socket", re.IGNORECASE)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error of a write, or one that it came from, says that there is no space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, SafetensorError) and _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_a_full_disk(job: StageJob, what: str) -> Iterator[None]:
    """Inside, a write that finds no space ends as one line; what it left half done is removed.

    Args:
        what: was being written, for the message.
    Raises:
        WorkError: no space; the last whole checkpoint is kept, and named.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        places = list(job.folder.glob("checkpoint-*"))
        remove_checkpoints(job.folder, keep=places)
        found, _ = latest_checkpoint(job.folder)
        kept = "no checkpoint of this stage was there before" if found is None else f"{found[0]} is kept"
        raise WorkError(
            f"stage {job.name}: no space left on the disk of {job.run_dir} for {what}; {kept}; free some space and "
            f"{job.how_to_resume}"
        ) from error


@contextmanager
def naming_lost_ranks(engine: Engine, job: StageJob) -> Iterator[None]:
    """Inside, a message between ranks that fails or finds no answer in time ends as one line on every rank left.

    Raises:
        RankLostError: names the ranks that do not answer.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or _SILENCE.search(str(error))
        if engine.world == 1 or isinstance(error, torch.OutOfMemoryError) or not known:
            raise
        lost = engine.lost_ranks()
        who = f"rank {', '.join(map(str, lost))} of {engine.world}" if lost else f"one of {engine.world} ranks"
        raise RankLostError(
            f"stage {job.name}: {who} is gone or has not answered for runtime.rank_timeout = {engine.timeout:g} "
            f"seconds, so rank {engine.rank} stops too; the last checkpoint is kept; {job.how_to_resume}"
        ) from error


@contextmanager
def naming_too_little_memory(job: StageJob) -> Iterator[None]:
    """Inside, a device without memory for a batch ends as one line.

    Raises:
        WorkError: it names the setting that makes the batch smaller without changing what is learned.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = job.recipe.runtime.micro_batch or job.settings.batch_size
        raise WorkError(
            f"stage {job.name}: the device's memory does not hold {rows} x {job.settings.sequence_length} tokens "
            f"({str(error).splitlines()[0]}); lower runtime.micro_batch, set runtime.gradient_checkpointing=true, or "
            f"use runtime.engine=fsdp2, and {job.how_to_resume}"
        ) from error


def not_finite(job: StageJob, step: int, what: str, layer: int) -> WorkError:
    """The error of a step whose loss or gradient (`what`) is not finite; no weight was touched by it.

    Args:
        step: from 1.
        layer: where it is worst.
    """
    return WorkError(
        f"stage {job.name}, step {step}: the {what} is not finite, worst in layer {layer}; lower "
        f"stages.{job.index}.learning_rate (now {job.settings.learning_rate:g}) and run into another --out; "
        f"{job.folder} keeps what was trained before"
    )


def check_reporting(report_to: str) -> None:
    """
    Raises:
        InputError: `runtime.report_to` names a library that is not installed.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise InputError(
            f"runtime.report_to: {report_to} is not installed; pip install {report_to}, or set runtime.report_to=none"
        )
