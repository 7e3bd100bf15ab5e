"""Writes small files beside and renames them: a finished file is never half there. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
