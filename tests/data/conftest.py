"""Text to read, and a cache of tokens of each test's own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's tokens are cached; `datasets` itself read its own folder when it was imported."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "nha_convert"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three text files of numbered lines: nothing stands in them twice."""
    for name in range(3):
        lines = [f"file {name} line {line}" for line in range(400)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path
