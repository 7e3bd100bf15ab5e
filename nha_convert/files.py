"""Small files: read with one clear refusal, written beside and renamed. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import InputError


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({shown(str(error))}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is needed, found {type(content).__name__}")
    return content


def shown(text: str) -> str:
    """Text from a file, safe to print: one line, no control characters, not too long."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= 120 else clean[:100] + f"... ({len(clean)} characters)"
