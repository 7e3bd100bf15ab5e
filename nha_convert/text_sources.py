"""Where a recipe's text lies: local files, URLs, saved data sets or the Hub. Looks, reads nothing. Imports no torch."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .data_settings import SourceSettings
from .errors import InputError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""File name endings that `datasets` can read, and what it calls their formats."""
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_WHAT = {"files": "local files", "urls": "URLs", "saved": "a folder of `save_to_disk`"}
_NEEDED = "a .jsonl or .parquet file is needed (.json, .arrow and .csv are read too); for plain text: source: text"


@dataclass(frozen=True)
class Place:
    """Where the rows of a `dataset` or `chat` source come from.

    Attributes:
        kind: `files` (local), `urls`, `saved` (a folder of `save_to_disk`) or `hub`.
        format: what `datasets` calls the files' format; empty for `saved` and `hub`.
        files: paths or URLs, in the order they are read.
    """

    kind: Literal["files", "urls", "saved", "hub"]
    format: str = ""
    files: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return self.kind in ("files", "saved")


def text_files(path: str) -> list[Path]:
    """The files of a `text` source, in order.

    Args:
        path: a file, a glob, or a folder, of which all `.txt` files count.
    Raises:
        InputError: there are none.
    """
    place = Path(path).expanduser()
    found = sorted(place.rglob("*.txt")) if place.is_dir() else sorted(map(Path, glob.glob(str(place), recursive=True)))
    files = [file for file in found if file.is_file()]
    if not files:
        raise InputError(f"data.sources: no text found at {path!r}; give a file, a glob or a folder of .txt files")
    return files


def find_place(source: SourceSettings) -> Place:
    """Where the rows of a `dataset` or `chat` source are; the Hub where nothing local has the name.

    Raises:
        InputError: a file that is not there or of no known format, files of several formats, or settings of a Hub
            data set for something that is none.
    """
    path = str(source.path)
    if source.data_files is not None and path in FORMATS.values():
        place = _of_files([file for given in source.data_files for file in _expanded(given)], format=path)
    else:
        place = _find(path)
    given: dict[str, object] = {"config": source.config, "revision": source.revision}
    if path not in FORMATS.values():
        given["data_files"] = source.data_files
    for key, value in given.items():
        if value is not None and place.kind != "hub":
            raise InputError(
                f"data.sources: {path}: `{key}` belongs to a Hub id, found {value!r} for {_WHAT[place.kind]}; "
                "leave it out"
            )
    return place


def _find(path: str) -> Place:
    place = Path(path).expanduser()
    if is_url(path):
        return _of_files([path])
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        files = sorted(str(file) for file in place.rglob("*") if file.is_file() and not file.name.startswith("."))
        return Place("saved", files=tuple(files))
    if place.is_dir():
        files = sorted(str(file) for file in place.rglob("*") if file.is_file() and format_of(file.name))
        if not files:
            raise InputError(f"data.sources: {path}: a folder without data files; {_NEEDED}")
        return _of_files(files)
    if place.exists() or glob.has_magic(path) or format_of(path):
        return _of_files(_expanded(path))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise InputError(
            f"data.sources: no file {path!r}; give a .jsonl or .parquet file, a folder of them or a Hub id"
        )
    return Place("hub")


def is_url(path: str) -> bool:
    """Whether this is no local path: `https://...`, `hf://...`, `s3://...`."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def format_of(name: str) -> str:
    """The format that a file name's ending stands for; empty where it stands for none."""
    bare = name.partition("?")[0] if is_url(name) else name
    path = Path(bare)
    return FORMATS.get((Path(path.stem) if path.suffix in _COMPRESSED else path).suffix, "")


def _expanded(path: str) -> list[str]:
    if is_url(path):
        return [path]
    found = sorted(file for file in glob.glob(str(Path(path).expanduser()), recursive=True) if Path(file).is_file())
    if not found:
        raise InputError(f"data.sources: no file {path!r}; give a .jsonl or .parquet file")
    return found


def _of_files(files: list[str], format: str = "") -> Place:
    formats = {format or format_of(file) for file in files}
    if "" in formats:
        odd = next(file for file in files if not format_of(file))
        raise InputError(f"data.sources: {odd}: {_NEEDED}")
    if len(formats) > 1:
        raise InputError(
            f"data.sources: {files[0]} and {len(files) - 1} more are of several formats "
            f"({', '.join(sorted(formats))}); give each format a source of its own"
        )
    urls = [file for file in files if is_url(file)]
    if urls and len(urls) < len(files):
        raise InputError("data.sources: `data_files` mixes URLs and local files; give each a source of its own")
    return Place("urls" if urls else "files", format=formats.pop(), files=tuple(files))
