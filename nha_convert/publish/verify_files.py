"""What can be said of a checkpoint's files without running anything of it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..remote_code import code_files
from ..weights.tensor_files import same_bytes
from ..weights.weight_files import stored_tensors
from .manifest import CARD, MANIFEST, changed_files


def read_nha_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of an NHA checkpoint that carries its code.

    Raises:
        InputError: there is none, or it is of another model.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise InputError(
            f"{checkpoint}: holds no config.json, so it is no checkpoint; `nha-convert export RUN OUT` makes one"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind, code = str(found.get("model_type", "")), found.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as a JSON object ({error}); export the model again") from error
    if not kind.startswith("nha_") or not isinstance(code, dict):
        raise InputError(
            f"{checkpoint}: config.json has model_type {kind!r} and {'an' if code else 'no'} auto_map; verify needs an "
            "NHA checkpoint that carries its code: `nha-convert export RUN OUT` makes one"
        )
    return dict(found)


def compare_files(checkpoint: Path, manifest: dict[str, Any] | None) -> list[str]:
    """Every recorded file against its hash, and what is there without being recorded.

    A folder without a manifest (what swap writes) has nothing to compare with.
    """
    if manifest is None:
        return []
    problems = changed_files(checkpoint, manifest)
    if not (checkpoint / CARD).is_file():
        problems.append(f"{CARD}: is missing; the card says how to load the model and which licence holds")
    known = {*manifest["files"], MANIFEST, CARD}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if name not in known and _is_read(path):
            problems.append(f"{name}: is not in {MANIFEST}, and Python or transformers would read it; delete it")
    return problems


def _is_read(path: Path) -> bool:
    return path.is_file() and path.suffix in (".py", ".pyc", ".so", ".pth", ".safetensors", ".bin", ".jinja")


def code_problems(checkpoint: Path, config: dict[str, Any]) -> list[str]:
    """In what a checkpoint's code is not the code that this version of the package writes.

    Nothing is imported. Code that passes is ours, whoever made the checkpoint.
    """
    ours = code_files()
    problems = []
    for kind, where in sorted(config["auto_map"].items()):
        module = str(where).rpartition(".")[0]
        if not isinstance(where, str) or f"{module}.py" not in ours:
            problems.append(f"config.json: auto_map gives {kind} as {where!r}, which is not a file of this package")
    tokenizer = checkpoint / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in json.loads(tokenizer.read_text(encoding="utf-8")):
        problems.append("tokenizer_config.json: auto_map names code of its own for the tokenizer")
    missing = [name for name in ours if not (checkpoint / name).is_file()]
    other = [name for name in ours if name not in missing and (checkpoint / name).read_bytes() != ours[name].encode()]
    if missing:
        problems.append(f"{', '.join(missing)}: missing, but the model's code needs it")
    if other:
        problems.append(f"{', '.join(other)}: not the code of this version of nha-convert")
    return problems


def compare_teacher(checkpoint: Path, teacher: Path, manifest: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Names of base tensors that differ from the teacher's bytes, and what is wrong about that."""
    ours, theirs = stored_tensors(checkpoint), stored_tensors(teacher)
    missing = sorted(set(theirs) - set(ours))
    changed = sorted(name for name in set(theirs) & set(ours) if not same_bytes(ours[name], theirs[name]))
    wrong = [f"{name}: is in the teacher's weights, not in the checkpoint's" for name in missing]
    allowed = None if manifest is None else manifest["changed"]
    if allowed is not None:
        wrong += [
            f"{name}: differs from the teacher's, and no stage trained it" for name in changed if name not in allowed
        ]
    return changed, wrong
