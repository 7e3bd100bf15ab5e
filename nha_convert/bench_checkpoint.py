"""Times a model beside its teacher and says where: the content of bench.json."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import modeling  # noqa: F401  (registers the NHA classes)
from .devices import find_device
from .errors import InputError, WorkError
from .evaluate.benchmark import measure
from .inference_windows import change_windows
from .model_source import resolve_model
from .modeling.attention_nha import nha_layers
from .provenance import provenance
from .settings import EvaluateSettings, NHASettings

BENCH = "bench.json"
"""In a run folder."""
OWN_TEACHER = "the student's own weights in teacher mode"


def bench_checkpoint(
    checkpoint: Path,
    settings: EvaluateSettings,
    *,
    teacher: str | None = None,
    device: str = "auto",
    windows: NHASettings | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Times a checkpoint on disk beside its teacher.

    Args:
        checkpoint: folder of an NHA model.
        teacher: Hub id, folder or `embedded`; None takes the checkpoint itself in teacher mode, which costs the same.
        windows: other windows than the checkpoint's (`change_windows`); None leaves them.
    Returns:
        As `bench_models`.
    Raises:
        InputError: something cannot be loaded, or no layer of the checkpoint runs NHA.
        WorkError: not one context fits into memory.
    """
    place = find_device(device)
    model = _load(checkpoint, place)
    if windows is not None:
        change_windows(model, windows)
    if not any(layer.runs_nha for _, layer in nha_layers(model)):
        raise InputError(
            f"{checkpoint}: no layer of it runs NHA, so there is nothing to compare; give a converted checkpoint "
            "with a window that is not full in at least one layer"
        )
    other = None
    if teacher is not None:
        other = _load(resolve_model(teacher), place)
        if nha_layers(other):
            raise InputError(f"--teacher {teacher}: is an NHA model itself; name the model it was made from")
    result = bench_models(model, settings, teacher=other, name=teacher, quiet=quiet)
    if not result["decode"]:
        least = min(settings.benchmark_contexts)
        raise WorkError(f"{checkpoint}: not even {least} tokens of context fit into memory; give fewer with --contexts")
    return result


def bench_models(
    model: Any, settings: EvaluateSettings, *, teacher: Any | None = None, name: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Times a student beside its teacher.

    Args:
        model: an NHA model.
        teacher, name: an ordinary model of its own, and what it is called; None for teacher mode.
    Returns:
        What `measure` gives, with {"teacher" (who it was), "windows", "max_position_embeddings", "environment",
        "settings", "seconds"}; "decode" is empty where not one context fits into memory.
    """
    started = time.perf_counter()
    silent = quiet or not sys.stderr.isatty()
    measured = measure(model, settings, teacher=teacher, say=(lambda _: None) if silent else _say)
    return {
        "teacher": OWN_TEACHER if teacher is None else str(name),
        **measured,
        "windows": model.config.nha_windows,
        "max_position_embeddings": int(model.config.max_position_embeddings),
        "environment": _environment(model),
        "settings": {key: value for key, value in settings.model_dump(mode="json").items() if "benchmark" in key},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _environment(model: Any) -> dict[str, Any]:
    stamp, device = provenance(), model.device
    return stamp | {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else stamp["machine"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _load(folder: Path, place: torch.device) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(place).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
