"""The page of the CPU benchmark, and how acceptance reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nha_convert.evaluate.benchmark import in_turns
from tools import acceptance_kernels, bench_cpu


def results(chunked: bool = True) -> dict[str, Any]:
    """As the benchmark writes them: the teacher twice as slow, in one turn three times."""
    both = in_turns({"teacher": [2.0, 3.0], "student": [1.0, 1.0]})
    decode = [
        {"context": context, "bytes": {"teacher": 1000 * context, "student": 16_000}, **both} for context in (128, 1024)
    ]
    prefill = dict.fromkeys(("whole", "faster", "one_call"), both) | ({"chunked": both} if chunked else {})
    return {"sizes": {"tokens": 4096, "chunk": 64}, "prefill": prefill, "attention": both, "decode": decode}


def test_ratios_are_those_of_the_turns() -> None:
    found = in_turns({"teacher": [2.0, 9.0, 4.0], "student": [1.0, 3.0, 4.0]})
    assert found["ratio"] == pytest.approx({"median": 2.0, "low": 1.2, "high": 2.8, "runs": 3})
    assert found["teacher"]["median"] == 4.0
    with pytest.raises(ValueError, match="shorter"):
        in_turns({"teacher": [2.0, 9.0], "student": [1.0]})


@pytest.mark.parametrize("chunked", [True, False])
def test_the_table(chunked: bool) -> None:
    rows = {row[0]: row[1:] for row in bench_cpu.table(results(chunked))}
    assert rows["prefill of 4096, each in one call"] == ("2.5 s", "1 s", "", "2.50x (2.10 to 2.90)")
    assert rows["prefill of 4096, the faster of each"][2] == ">= 2.5x"
    assert ("prefill of 4096, each in calls of 64" in rows) == chunked
    assert rows["attention alone, 4096 tokens, one layer"][0] == "2500 ms"
    assert [rows[f"decode per token at {context}"][2] for context in (128, 1024)] == ["", ">= 6x"]
    assert rows["cache at 1024"] == ("1.024 MB", "0.016 MB", ">= 50x", "64.00x")


def test_how_acceptance_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(acceptance_kernels, "_unchanged", lambda commit: True)
    page = results() | {"environment": {"commit": "0"}}
    (tmp_path / "cpu-bf16.json").write_text(json.dumps(page))
    found = acceptance_kernels.cpu()
    assert found["values"] == pytest.approx({"prefill": 2.5, "attention": 2.5, "decode": 2.5, "cache": 64})
    assert not found["met"] and "cache constant" in found["measured"]
    for row in (page["attention"], *page["decode"]):
        row["ratio"] = {"median": 9.0}
    (tmp_path / "cpu-bf16.json").write_text(json.dumps(page))
    assert acceptance_kernels.cpu()["met"]
