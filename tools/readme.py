"""README's measured tables: each stands between two markers of its name, written by the script that measured it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def write_block(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> None:
    """Puts a table and a note below it between the two markers `<!-- name -->`.

    Raises:
        ValueError: README has not two such markers.
    """
    marker = f"<!-- {name} -->"
    parts = README.read_text(encoding="utf-8").split(marker)
    if len(parts) != 3:
        raise ValueError(f"README.md: two markers {marker} are needed, found {len(parts) - 1}")
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]
    README.write_text(parts[0] + "\n".join([marker, *table, "", note, marker]) + parts[2], encoding="utf-8")
