"""A folder that appears under its name only when complete: made beside under a hidden name, renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .errors import InputError


def check_new_folder(out: Path) -> None:
    """Whether `out` is a new or empty folder.

    Raises:
        InputError: it is a file or holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another, or empty it: rm -r {out}")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Whether `out` lies where this user may write.

    Raises:
        InputError: it does not.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{out}: {existing} is not a folder that you may write to; choose another")


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, which becomes `out` when the block ends well and vanishes otherwise.

    What a killed process left is taken over and emptied; a lock on the folder tells it from another's work.

    Raises:
        InputError: another process is writing to `out` at the moment.
    """
    out = out.absolute()
    made = [folder for folder in out.parents if not folder.exists()]
    work = out.with_name(f".{out.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            made = []
            raise InputError(f"{out}: another process is writing to it; wait for it, or choose another") from error
        try:
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield work
            work.chmod(0o755)
            os.replace(work, out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except BaseException:
        for folder in made:
            with suppress(OSError):  # something else was put there meanwhile
                folder.rmdir()
        raise
    finally:
        os.close(lock)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is raised as KeyboardInterrupt inside the block, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
