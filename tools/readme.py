"""README's measured tables: each stands between two markers of its name, written by the script that measured it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from nha_convert.files import write_text
from nha_convert.search.tables import table

README = Path(__file__).resolve().parents[1] / "README.md"


def write_block(name: str, header: list[str], rows: list[list[str]], note: str) -> None:
    """Puts a table and a note below it between the two markers `<!-- name -->`.

    Raises:
        ValueError: README has not two such markers.
    """
    marker = f"<!-- {name} -->"
    with FileLock(README.with_suffix(".lock")):
        parts = README.read_text(encoding="utf-8").split(marker)
        if len(parts) != 3:
            raise ValueError(f"README.md: two markers {marker} are needed, found {len(parts) - 1}")
        write_text(README, parts[0] + "\n".join([marker, *table(header, rows), "", note, marker]) + parts[2])
