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

from rich.console import Console

from .errors import InputError
from .tensor_files import file_hashes, same_bytes, stored_tensors

PROBE = Path(__file__).resolve().with_name("checkpoint_probe.py")
CHECK_FILE = "export_check.safetensors"
MANIFEST = "export.json"


def verify_checkpoint(
    checkpoint: Path | str,
    teacher: Path | str | None = None,
    expected: Path | None = None,
    *,
    quiet: bool = False,
    python: str | None = None,
) -> dict[str, Any]:
    """Reload a checkpoint in a fresh process without our package, and check it.

    Args:
        checkpoint: a folder that carries its code (`auto_map`), as `export` writes it.
        teacher: folder, Hub id or `embedded`: untouched tensors must be the teacher's bytes, and if none was touched
            the logits with all windows full must be the teacher's, bit for bit.
        expected: safetensors with `input_ids` [B,T] and the run's `logits` [B,T,V]; None takes the run folder's
            own where the checkpoint lies in one.
        quiet: no progress.
        python: interpreter to use; None is this one.
    Returns:
        {"passed", "failures": [text], "max_logit_difference", "max_cached_difference", "greedy_equal", ...}; a number
        that was not measured is absent.
    Raises:
        InputError: not a checkpoint folder, no code in it, or `expected` or `teacher` is not there.
    """
    checkpoint = Path(checkpoint).expanduser().resolve()
    _check_folder(checkpoint)
    expected = _expected_file(checkpoint, expected)
    teacher_dir = None
    if teacher is not None:
        from .convert import resolve_model

        teacher_dir = resolve_model(str(teacher)).resolve()
    with Console(stderr=True).status("verifying in a fresh process") if _shows(quiet) else nullcontext():
        failures = _compare_files(checkpoint)
        changed: list[str] | None = None
        if teacher_dir is not None:
            changed, wrong = _compare_teacher(checkpoint, teacher_dir)
            failures += wrong
        job = {
            "checkpoint": str(checkpoint),
            "expected": str(expected) if expected else None,
            "teacher": str(teacher_dir) if teacher_dir and changed == [] else None,
            "tokenizer": (checkpoint / "tokenizer_config.json").is_file(),
        }
        result, error = _run_probe(job, python or sys.executable)
    if error:
        failures.append(error)
    else:
        failures += _judge(result)
    if changed is not None:
        result["changed_base_tensors"] = len(changed)
    return {"passed": not failures, "failures": failures, "checkpoint": str(checkpoint), **result}


def _shows(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def _check_folder(checkpoint: Path) -> None:
    config = checkpoint / "config.json"
    if not config.is_file():
        raise InputError(
            f"{checkpoint}: holds no config.json, so it is no checkpoint; `nha-convert export RUN OUT` makes one"
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config}: cannot be read as JSON ({error}); export the model again") from error
    if not str(found.get("model_type", "")).startswith("nha_") or "auto_map" not in found:
        raise InputError(
            f"{checkpoint}: config.json has model_type {found.get('model_type')!r} and "
            f"{'an' if 'auto_map' in found else 'no'} auto_map; verify needs an NHA checkpoint that carries its code: "
            "`nha-convert export RUN OUT` makes one"
        )


def _expected_file(checkpoint: Path, expected: Path | None) -> Path | None:
    if expected is None:
        beside = checkpoint.parent / CHECK_FILE
        return beside if beside.is_file() else None
    if not Path(expected).is_file():
        raise InputError(f"{expected}: no such file; it holds the logits that the checkpoint must reproduce")
    return Path(expected).resolve()


def _compare_files(checkpoint: Path) -> list[str]:
    """Every file that export recorded against its hash."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return []
    recorded = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    missing = [name for name in recorded if not (checkpoint / name).is_file()]
    found = file_hashes(checkpoint, set(recorded) - set(missing))
    return [f"{name}: is missing" for name in missing] + [
        f"{name}: was changed after the export" for name, digest in found.items() if digest != recorded[name]
    ]


def _compare_teacher(checkpoint: Path, teacher: Path) -> tuple[list[str], list[str]]:
    """Names of base tensors that differ from the teacher's bytes, and what is wrong about that."""
    ours, theirs = stored_tensors(checkpoint), stored_tensors(teacher)
    missing = sorted(set(theirs) - set(ours))
    changed = sorted(name for name in set(theirs) & set(ours) if not same_bytes(ours[name], theirs[name]))
    wrong = [f"{name}: is in the teacher's weights, not in the checkpoint's" for name in missing]
    manifest = checkpoint / MANIFEST
    if manifest.is_file():
        allowed = set(json.loads(manifest.read_text(encoding="utf-8"))["changed"])
        wrong += [
            f"{name}: differs from the teacher's, and no stage trained it" for name in changed if name not in allowed
        ]
    return changed, wrong


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
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not (work / "result.json").is_file():
            return (
                {},
                f"the checkpoint does not load or run alone: {_last_words(done.stderr) or f'exit {done.returncode}'}",
            )
        result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
        return result, None


def _last_words(stderr: str) -> str:
    """The last line of a traceback, and the innermost place it names."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', stderr)
    return " ".join([*lines[-1:], *(f"({Path(file).name}:{line})" for file, line in places[-1:])])


def _judge(result: dict[str, Any]) -> list[str]:
    """What the measurements break, in words. A comparison with NaN fails."""
    bound, failures = result["bound"], []
    for key, what in (
        ("logit_error", "the run's logits"),
        ("cached_error", "the full forward pass when decoding with cache"),
    ):
        if key in result and not result[key] <= bound:
            failures.append(
                f"logits differ from {what} by {result[key]:.3g} of the largest logit; the bound is {bound:g}"
            )
    if not result["greedy_equal"]:
        failures.append("greedy generation gives other tokens with cache than without")
    if result.get("max_teacher_difference", 0.0) != 0.0:
        failures.append(
            f"with all windows full, logits differ from the teacher's by {result['max_teacher_difference']:.3g}; "
            "untouched weights must give equality"
        )
    if not result.get("vocabulary_fits", True):
        failures.append("the tokenizer has ids that the model has no embedding for")
    return failures
