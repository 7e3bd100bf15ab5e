"""Rows of data sets, read one after the other through `datasets`: local files, URLs, saved folders and the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data_settings import SourceSettings
from ..errors import InputError, WorkError
from ..text_sources import Place, find_place

Row = dict[str, Any]


def rows(source: SourceSettings) -> Iterator[Row]:
    """The rows of a `dataset` or `chat` source, file after file, in a fixed order; nothing is held in memory.

    Raises:
        InputError: there is no such data set, split or file, or a local file is damaged.
        WorkError: a file could not be read to its end from where it is; the message names it.
    """
    place = find_place(source)
    if place.kind == "saved":
        yield from _saved(source)
        return
    builder = _builder(source, place)
    try:
        table = _table(builder, source, place)
    except Exception as error:  # a builder's own, the network's or pyarrow's
        raise _unreadable(source, place, error, list(place.files)) from error
    if place.kind == "hub" and not source.streaming:
        yield from table
        return
    files = [str(file) for file in (builder.config.data_files or {}).get(source.split, ())]
    count = table.num_shards
    for number in range(count):
        named = [files[number]] if len(files) == count else files
        try:
            yield from table.shard(num_shards=count, index=number)
        except (InputError, WorkError):
            raise
        except Exception as error:  # whatever a format's reader, pyarrow or the network raises
            raise _unreadable(source, place, error, named) from error


def versions(source: SourceSettings) -> list[Any]:
    """What tells one version of a remote data set from another: its revision, or what its server says of each file.

    Raises:
        InputError: it cannot be found.
    """
    place = find_place(source)
    asked: list[Any] = [source.path, source.config, source.data_files, source.split]
    revision = str(source.revision)
    if place.kind == "hub" and len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return [*asked, revision]  # a commit: nobody has to be asked
    builder = _builder(source, place)
    files = (builder.config.data_files or {}).get(source.split, [])
    origin = [list(one) for one in getattr(files, "origin_metadata", ())]
    return [*asked, builder.config.name, [str(file) for file in files] or builder.hash, origin]


def _builder(source: SourceSettings, place: Place) -> Any:
    from datasets import load_dataset_builder

    try:
        if place.kind == "hub":
            return load_dataset_builder(
                source.path, source.config, data_files=source.data_files, revision=source.revision
            )
        return load_dataset_builder(place.format, data_files={source.split: list(place.files)})
    except ImportError as error:
        raise InputError(
            f"data.sources: {source.path}: this kind of address needs another package ({error}); "
            "for http: pip install 'fsspec[http]'"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(source, place, error, list(place.files)) from error


def _table(builder: Any, source: SourceSettings, place: Place) -> Any:
    if place.kind == "hub" and not source.streaming:
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    return builder.as_streaming_dataset(split=source.split)


def _saved(source: SourceSettings) -> Iterator[Row]:
    """A folder that `save_to_disk` wrote; with several splits, the source's."""
    from datasets import DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(Path(str(source.path)).expanduser()))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"data.sources: {source.path}: a damaged data set ({_first_line(error)})") from error
    if isinstance(table, DatasetDict):
        if source.split not in table:
            raise InputError(
                f"data.sources: {source.path} has no split {source.split!r}; allowed: {', '.join(table)}; set `split`"
            )
        table = table[source.split]
    yield from table


def _unreadable(source: SourceSettings, place: Place, error: Exception, files: list[str]) -> Exception:
    """What to say of rows that could not be read: the file and, of jsonl, the line."""
    said = _first_line(error)
    if place.kind == "hub" and not files:
        return InputError(
            f"data.sources: dataset {source.path!r} (split {source.split!r}) is neither a local file nor readable "
            f"from the Hub: {said}"
        )
    if not place.local:
        named = files[0] if len(files) == 1 else f"one of {len(files)} files from {files[0]}" if files else source.path
        return WorkError(
            f"data.sources: {named}: could not be read to its end ({said}); nothing of it was used. Run again "
            "with --resume when it can be reached"
        )
    for file in files:
        if place.format == "json" and (line := _bad_line(Path(file))):
            return InputError(f"data.sources: {file}:{line}")
    what = "not a parquet file" if place.format == "parquet" else f"no readable {place.format} file"
    return InputError(f"data.sources: {', '.join(files)}: {what} ({said})")


def _bad_line(path: Path) -> str:
    """`NUMBER: what is wrong` of the first line of a jsonl file that is no object; empty where all are."""
    if path.suffix != ".jsonl":
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{number}: not JSON ({error.msg})"
            if not isinstance(row, dict):
                return f"{number}: an object is needed, found {type(row).__name__}"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cell(row: Row, column: str, source: SourceSettings, key: str = "column") -> Any:
    """A row's value.

    Raises:
        InputError: the rows have no such column.
    """
    if column not in row:
        raise InputError(
            f"data.sources: {source.path} has no column {column!r}; its columns: {', '.join(map(str, row))}; "
            f"set `{key}`"
        )
    return row[column]


def every(items: Iterable[Any], step: int, held_out: bool) -> Iterator[Any]:
    """Of each `step` items the last one, or the others."""
    return (item for index, item in enumerate(items) if (index % step == step - 1) == held_out)
