"""What an `export` command asks for, checked before anything is loaded or written. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..command_options import require_run
from ..errors import InputError
from ..settings import ExportSettings
from ..work_folder import check_new_folder
from .manifest import MANIFEST, exported_files


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        source: run folder, or NHA checkpoint.
        out: folder to write; None pushes `source` as it is, an earlier export.
        is_run: whether `source` is a run folder.
    """

    source: Path
    out: Path | None
    is_run: bool


def export_request(
    source: Path,
    out: Path | None,
    *,
    push: str | None,
    private: bool,
    revision: str | None,
    teacher: str | None,
    max_shard_size: str | None,
) -> ExportRequest:
    """Checks the arguments of `export` against each other and against what is on the disk.

    Raises:
        InputError: they contradict each other, `source` is neither run nor checkpoint, or `out` holds something.
    """
    source = source.expanduser()
    if push is None and (private or revision is not None):
        raise InputError(f"{'--private' if private else '--revision'}: belongs to a push; add --push USER/NAME")
    if max_shard_size is not None:
        try:
            positive = float(ExportSettings(max_shard_size=max_shard_size).max_shard_size[:-2]) > 0
        except ValidationError:
            positive = False
        if not positive:
            raise InputError(f"--max-shard-size {max_shard_size}: give a number above 0 with KB, MB, GB or TB: 2GB")
    if out is None:
        return _push_alone(source, push, teacher, max_shard_size)
    is_run = not (source / "config.json").is_file()
    if is_run:
        require_run(source)
        if teacher is not None:
            raise InputError(f"--teacher {teacher}: a run's recipe names its model already; leave --teacher out")
    check_new_folder(out.expanduser())
    return ExportRequest(source, out.expanduser(), is_run)


def _push_alone(source: Path, push: str | None, teacher: str | None, max_shard_size: str | None) -> ExportRequest:
    if push is None:
        raise InputError("OUT: is missing; name the folder to write, or with --push an earlier export to send as it is")
    if teacher is not None or max_shard_size is not None:
        option = "--teacher" if teacher is not None else "--max-shard-size"
        raise InputError(f"{option}: changes what is written; give OUT, the folder to write")
    folder = next((one for one in (source, source / "export") if (one / MANIFEST).is_file()), source)
    exported_files(folder)
    return ExportRequest(folder, None, is_run=False)
