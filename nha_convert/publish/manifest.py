"""export.json: what an export holds, and the hash of every file but the card. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..weights.tensor_files import file_hashes

MANIFEST, CARD = "export.json", "README.md"


def write_manifest(work: Path, *, changed: list[str] | None, new: list[str], base_model: str | None) -> None:
    """Record the finished content of a folder.

    Args:
        changed: names of base tensors that differ from the base model's; None where they were not compared.
        new: names of tensors that the base model does not have.
        base_model: Hub id, `embedded` or a folder's name; None where it is not known.
    """
    names = [path.relative_to(work).as_posix() for path in sorted(work.rglob("*")) if path.is_file()]
    manifest = {
        "changed": changed,
        "new": new,
        "base_model": base_model,
        "files": file_hashes(work, [name for name in names if name not in (CARD, MANIFEST)]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Content of export.json, or None where there is none.

    Raises:
        InputError: it is no manifest, or names a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, changed = content["files"], content["changed"]
        named = isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
        if not named or not (changed is None or isinstance(changed, list)):
            raise ValueError("`files` must map names to hashes, `changed` must be a list or null")
        outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"{outside[0]!r} is outside the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no manifest of an export ({error}); export the model again") from error
    return dict(content)


def exported_files(folder: Path) -> list[str]:
    """Names of all files of an export, the card and the manifest included.

    Raises:
        InputError: the folder was not written by `export`, or one of its files is missing or was changed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(
            f"{folder}: holds no {MANIFEST}, so it is no finished export; write one: nha-convert export {folder} OUT"
        )
    wrong = changed_files(folder, manifest)
    if wrong:
        raise InputError("\n".join(f"{folder}: {line}; export the model again" for line in wrong))
    return sorted([*manifest["files"], MANIFEST, *([CARD] if (folder / CARD).is_file() else [])])


def changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is no longer as it was exported, one line per file; the card may be edited."""
    recorded = manifest["files"]
    missing = [name for name in recorded if not (folder / name).is_file()]
    found = file_hashes(folder, set(recorded) - set(missing))
    return [f"{name}: is missing" for name in missing] + [
        f"{name}: was changed after the export" for name, digest in found.items() if digest != recorded[name]
    ]
