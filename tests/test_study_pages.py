"""The studies' pages, and README's tables, are what their scripts write of the rows that were measured."""

import sys
from pathlib import Path

import pytest
import torch

from tools import (
    readme,
    study_capacity,
    study_curve,
    study_init,
    study_layers,
    study_memory,
    study_quarter,
    study_slot_reads,
    study_training,
)

STUDIES = Path(__file__).resolve().parents[1] / "docs" / "studies"
SCRIPTS = {
    "capacity": (study_capacity, ["--table"]),
    "curve": (study_curve, []),
    "gate-init": (study_init, []),
    "layers": (study_layers, []),
    "layers-qwen3": (study_layers, ["--out", str(STUDIES / "layers-qwen3")]),
    "memory": (study_memory, []),
    "quarter": (study_quarter, []),
    "slot-reads": (study_slot_reads, []),
    "training": (study_training, []),
}
"""Each script with what makes it measure nothing."""


def test_every_study_is_here() -> None:
    assert {path.stem for path in STUDIES.glob("*.md")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_what_its_rows_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = SCRIPTS[name]
    written: dict[Path, str] = {}
    monkeypatch.setattr(module, "write_text", lambda path, text: written.update({Path(path): text}))
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *arguments])
    readme_before = readme.README.read_text(encoding="utf-8")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text(readme_before, encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    page = STUDIES / f"{name}.md"
    assert written == {page: page.read_text(encoding="utf-8")}
    assert readme.README.read_text(encoding="utf-8") == readme_before
