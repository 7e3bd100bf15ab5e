"""Does an exported folder load alone and compute what the run computed? A fresh process answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import get_max_memory
from rich.console import Console

from ..errors import InputError
from .manifest import read_manifest
from .verify_files import code_problems, compare_files, compare_teacher, read_nha_config

PROBE = Path(__file__).resolve().with_name("checkpoint_probe.py")
CHECK_FILE = "export_check.safetensors"
ERRORS = (
    ("logit_error", "the run's logits"),
    ("cached_error", "the full forward pass when decoding with cache"),
    ("padded_error", "those of the same row without its padding"),
)
"""Measured differences, in units of the largest logit, that must stay within the bound."""
TOKENS = (
    ("greedy_equal", "greedy generation gives other tokens with cache than without"),
    ("chunked_equal", "greedy generation gives other tokens when the prompt is read in chunks"),
    ("beams_equal", "beam search gives other tokens with cache than without"),
    ("vocabulary_fits", "the tokenizer has ids that the model has no embedding for"),
)
TEACHER = (
    ("max_teacher_difference", "loaded with all windows full"),
    ("max_set_windows_difference", "after set_windows('full')"),
)


def verify_checkpoint(
    checkpoint: Path | str,
    teacher: Path | str | None = None,
    expected: Path | None = None,
    *,
    trust_code: bool = False,
    offload: bool = False,
    quiet: bool = False,
    python: str | None = None,
) -> dict[str, Any]:
    """Reload a checkpoint in a fresh process without our package, and check it.

    That process runs the model code in the folder, as anybody does who loads it with `trust_remote_code=True`. So the
    code must be what this version of the package writes, byte for byte; other code is reported and not run, unless
    `trust_code` says that its author is trusted. Pickled weights are never read.

    Args:
        checkpoint: a folder that carries its code (`auto_map`), as `export` and `swap` write it.
        teacher: folder, Hub id or `embedded`: untouched tensors must be the teacher's bytes, and if none was touched
            the logits with all windows full must be the teacher's, bit for bit.
        expected: safetensors with `input_ids` [B,T] and the run's `logits` [B,T,V]; None takes the run folder's
            own where the checkpoint lies in one.
        trust_code: run code that another version, or somebody else, wrote.
        offload: leave on disk what this machine's free memory does not hold; needs accelerate.
        quiet: no progress.
        python: interpreter to use; None is this one.
    Returns:
        {"passed", "failures": [text], "max_logit_difference", "max_cached_difference", "greedy_equal", ...}; a number
        that was not measured is absent. "manifest" is False for what `swap` writes: its files have no recorded hashes,
        and no card is asked for.
    Raises:
        InputError: not a checkpoint folder, no code in it, or `expected` or `teacher` is not there.
    """
    checkpoint = Path(checkpoint).expanduser().resolve()
    config = read_nha_config(checkpoint)
    manifest = read_manifest(checkpoint)
    expected = _expected_file(checkpoint, expected)
    teacher_dir = None
    if teacher is not None:
        from ..model_source import resolve_model

        teacher_dir = resolve_model(str(teacher)).resolve()
    result: dict[str, Any] = {}
    with nullcontext() if quiet or not sys.stderr.isatty() else Console(stderr=True).status("verifying"):
        failures = compare_files(checkpoint, manifest)
        changed: list[str] | None = None
        if teacher_dir is not None:
            changed, wrong = compare_teacher(checkpoint, teacher_dir, manifest)
            failures += wrong
        foreign = [] if trust_code else code_problems(checkpoint, config)
        failures += [
            f"{problem}; nothing was run: --trust-code runs it, `nha-convert export {checkpoint} OUT` replaces it"
            for problem in foreign
        ]
        if not foreign:
            job = {
                "checkpoint": str(checkpoint),
                "expected": str(expected) if expected else None,
                "teacher": str(teacher_dir) if teacher_dir and changed == [] else None,
                "memory": int(get_max_memory()["cpu"]) if offload else None,
                "tokenizer": (checkpoint / "tokenizer_config.json").is_file(),
            }
            result, error = _run_probe(job, python or sys.executable)
            failures += [error] if error else judge(result)
    if changed is not None:
        result["changed_base_tensors"] = len(changed)
    found = {"checkpoint": str(checkpoint), "manifest": manifest is not None, **result}
    return {"passed": not failures, "failures": failures, **found}


def _expected_file(checkpoint: Path, expected: Path | None) -> Path | None:
    if expected is None:
        beside = checkpoint.parent / CHECK_FILE
        return beside if beside.is_file() else None
    if not Path(expected).is_file():
        raise InputError(f"{expected}: no such file; it holds the logits that the checkpoint must reproduce")
    return Path(expected).resolve()


def _run_probe(job: dict[str, Any], python: str) -> tuple[dict[str, Any], str | None]:
    """The probe's measurements, or the last lines of what it said when it failed."""
    with tempfile.TemporaryDirectory(prefix="nha-verify-") as folder:
        work = Path(folder)
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [python, "-I", str(PROBE), str(work / "job.json"), str(work / "result.json")],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not (work / "result.json").is_file():
            said = _last_words(done.stderr) or f"exit {done.returncode}"
            return {}, f"the checkpoint does not load or run alone: {said}"
        result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
        return result, None


def _last_words(stderr: str) -> str:
    """The last line of a traceback, and the innermost place it names."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', stderr)
    return " ".join([*lines[-1:], *(f"({Path(file).name}:{line})" for file, line in places[-1:])])


def judge(result: dict[str, Any]) -> list[str]:
    """What the probe's measurements break, in words. A comparison with NaN fails."""
    bound = result["bound"]
    failures = [
        f"logits differ from {what} by {result[key]:.3g} of the largest logit; the bound is {bound:g}"
        for key, what in ERRORS
        if key in result and not result[key] <= bound
    ]
    failures += [what for key, what in TOKENS if not result.get(key, True)]
    failures += [
        f"{how}, logits differ from the teacher's by {result[key]:.3g}; untouched weights must give equality"
        for key, how in TEACHER
        if result.get(key, 0.0) != 0.0
    ]
    return failures
