"""The documents of a recipe's sources, in a fixed order, and which of them are held out.

Held-out text never enters training: stdlib files by hash, the last 5 % of text files, every 20th row of a data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..corpus import stdlib_files, stdlib_texts
from ..data_settings import SourceSettings
from ..errors import InputError
from ..text_sources import find_place, text_files
from .tables import cell, every, rows, versions

SPLITS = ("train", "held_out")
HELD_OUT_EVERY = 20
"""One row in so many of a dataset is held out; the same share of the end of text files."""

Messages = list[dict[str, Any]]


def texts(source: SourceSettings, split: str) -> Iterable[str]:
    """The documents of one split of a source of text, in a fixed order.

    Args:
        source: `stdlib`, `text` or `dataset`; recall documents are made, not read.
        split: `train` or `held_out`.
    Raises:
        InputError: nothing is found at `source.path`, or it has no such column.
        WorkError: a remote file could not be read to its end.
    """
    _check_split(split)
    if source.source == "stdlib":
        return stdlib_texts(split)
    if source.source == "text":
        return _file_texts(str(source.path), split)
    columns = (str(cell(row, source.column, source) or "") for row in rows(source))
    return every(columns, HELD_OUT_EVERY, split == "held_out")


def conversations(source: SourceSettings, split: str) -> Iterator[Messages]:
    """The conversations of one split of a `chat` source, as lists of {role, content}, in a fixed order.

    Raises:
        InputError: nothing is found at `source.path`, it has no such columns, or no conversations in them.
        WorkError: a remote file could not be read to its end.
    """
    _check_split(split)
    return every((_messages(row, source) for row in rows(source)), HELD_OUT_EVERY, split == "held_out")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, found {split!r}")


def _messages(row: dict[str, Any], source: SourceSettings) -> Messages:
    if source.prompt is not None and source.response is not None:
        prompt = str(cell(row, source.prompt, source, "prompt") or "")
        response = str(cell(row, source.response, source, "response") or "")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    messages = cell(row, source.column, source)
    good = isinstance(messages, list) and bool(messages)
    if not good or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        raise InputError(
            f"data.sources: {source.path}, column {source.column!r}: a list of {{role, content}} is needed, found "
            f"{json.dumps(messages, default=str)[:80]}; set `column`, or `prompt` and `response`"
        )
    return [{key: value for key, value in one.items() if value is not None} for one in messages]


def _file_texts(path: str, split: str) -> Iterator[str]:
    """Text files up to 95 % of all their characters, or from there to the end."""
    files = text_files(path)
    total = sum(len(_text(file)) for file in files)  # read twice rather than held
    boundary, start = total - total // HELD_OUT_EVERY, 0
    for file in files:
        page = _text(file)
        cut = min(max(boundary - start, 0), len(page))
        part = page[:cut] if split == "train" else page[cut:]
        start += len(page)
        if part:
            yield part


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


# ---- what a source holds -------------------------------------------------------------------------
def identity(source: SourceSettings, split: str) -> str:
    """A digest of what a split holds: files' contents where they are local, a revision where they are not.

    Raises:
        InputError: nothing is found.
    """
    if source.source == "stdlib":
        return _digest([*map(_file_digest, stdlib_files(split))])
    if source.source == "text":
        return _digest([*map(_file_digest, text_files(str(source.path))), split])
    place = find_place(source)
    held = [*map(_file_digest, map(Path, place.files))] if place.local else versions(source)
    return _digest([place.kind, place.format, held, source.split, split])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        about = path.stat()
        return _content_digest(str(path), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise InputError(f"data.sources: {path}: cannot be read ({error.strerror}); make it readable") from error


@lru_cache(maxsize=65536)
def _content_digest(path: str, size: int, changed: int) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
