"""lm-evaluation-harness on a model in memory, and the folder of our own tasks for it; imports it when used."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nha_convert.errors import InputError, WorkError, nearest

INSTALL = "pip install 'nha-convert[eval]'"


def task_folder() -> Path:
    """The folder of the recall tasks that `lm_eval --include_path` takes."""
    return Path(__file__).resolve().parent / "lm_eval_tasks"


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses what cannot be run, before a model is loaded.

    Raises:
        InputError: the harness is not installed, or it has no task of such a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"--tasks {','.join(tasks)}: lm-evaluation-harness is not installed; {INSTALL}")
    known = _manager({}).all_tasks
    for task in tasks:
        if task not in known:
            close = nearest(task, known)
            hint = f", did you mean `{close}`?" if close else ""
            raise InputError(
                f"--tasks {task}: the harness has no such task or group{hint}; `lm_eval ls tasks` lists them, and "
                f"ours are {', '.join(sorted(name for name in known if name.startswith('nha_')))}"
            )


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    window: int = 64,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """What the harness measures on a loaded model, with its own defaults for few-shot examples and decoding.

    Args:
        model, tokenizer: the model as it stands, in its present mode, branch and windows.
        tasks: names of tasks or groups, ours (`nha_recall`) included.
        window: tokens that a distance of 1 stands for in our own tasks.
        limit: documents per task; None is all.
    Returns:
        task or group -> {metric: value, "<metric>_stderr": value where the harness has one}.
    Raises:
        WorkError: a task could not be run, such as one whose data cannot be downloaded.
    """
    simple_evaluate = import_module("lm_eval").simple_evaluate
    reader_class = import_module("lm_eval.models.huggingface").HFLM
    context = int(model.config.max_position_embeddings)
    wanted = {"tokenizer": tokenizer, "window": window, "context": context}
    training = model.training
    model.eval()
    try:
        with _undisturbed(model):
            reader = reader_class(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            found = simple_evaluate(
                model=reader, tasks=list(tasks), limit=limit, task_manager=_manager(wanted), log_samples=False
            )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WorkError(f"--tasks {','.join(tasks)}: lm-evaluation-harness stopped: {reason}") from error
    finally:
        model.train(training)
    if found is None:  # another process of a launcher has them
        return {}
    return {
        task: {
            _metric(key): float(value) for key, value in row.items() if isinstance(value, (int, float)) and "," in key
        }
        for task, row in {**found["results"], **(found.get("groups") or {})}.items()
    }


def _manager(metadata: dict[str, Any]) -> Any:
    return import_module("lm_eval.tasks").TaskManager(include_path=str(task_folder()), metadata=metadata)


def _metric(key: str) -> str:
    """`acc_stderr,none` as `acc_stderr`; another filter than none stays in the name."""
    name, _, chosen = key.partition(",")
    return name if chosen == "none" else f"{name} ({chosen})"


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Inside, the harness says only what goes wrong, and the model's own sampling settings do not speak."""
    kept, log = model.generation_config, logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    model.generation_config = type(kept)(bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = kept
        log.setLevel(level)
