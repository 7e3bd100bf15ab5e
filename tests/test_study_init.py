"""The study of gate starts: what its table says, and that nothing is measured twice."""

from pathlib import Path
from typing import Any

import pytest

from tools import study_init
from tools.study_init import (
    Study,
    readme_rows,
    spread_of,
    study_recipe,
    table,
    tokens_given,
    tokens_to_reach,
    write_study,
)


def row(method: str, tokens: int, recovery: float, seed: int = 0, **recall: float) -> dict[str, Any]:
    told = {"teacher": "small", "method": method, "seed": seed, "tokens": tokens, "recovery": recovery}
    return told | {"recall": {name.removeprefix("at"): value for name, value in recall.items()}}


def test_tokens_to_reach() -> None:
    curve = {0: -1.0, 125_000: 0.4, 500_000: 0.6}
    assert tokens_to_reach(curve, 0.5) == "250k", "halfway in log tokens"
    assert tokens_to_reach(curve, 0.3) == "at most 125k" and tokens_to_reach(curve, 0.7) == "more than 500k"
    assert tokens_to_reach({0: 0.9}, 0.5) == "–"


def test_numbers() -> None:
    assert tokens_given("0,62.5k,1M") == [0, 62_500, 1_000_000]
    assert spread_of([0.5]) == "0.500" and spread_of([0.5, 0.7]) == "0.600 (0.500 to 0.700)"


def test_the_table() -> None:
    rows = [
        row("key", 1_000_000, 0.5, at64=0.25),
        row("clusters", 125_000, 0.4),
        row("clusters", 500_000, 0.5, seed=0),
        row("clusters", 500_000, 0.7, seed=1),
    ]
    results = {"teachers": {"small": {"nll": 1.0, "recall": {"64": 1.0}}}, "rows": rows}
    lines = table(results, "small")
    assert lines[0] == "| start | 125k | 500k | 1000k | tokens to `key` at 1M |"
    assert lines[2] == "| `key` | – | – | 0.500 | at most 1000k |"
    results["rows"] += [row(f"attended{rows}", 0, 0.3) for rows in (":1024", "", ":128")]
    again = [line.split("|")[1].strip() for line in table(results, "small")[2:7]]
    assert again == ["`key`", "`clusters`", "`attended`", "`attended:128`", "`attended:1024`"]
    assert lines[3] == "| `clusters` | 0.400 | 0.600 (0.500 to 0.700) | – | 250k |"
    assert "| teacher | | 1.00 |" in lines and "| `key` | 1000k | 0.25 |" in lines


def test_readme_tells_seeds_and_their_range() -> None:
    rows = [row("key", 1_000_000, 0.5), row("attended", 250_000, 0.5), row("attended", 250_000, 0.7, seed=1)]
    results = {"teachers": {"small": {"nll": 1.0, "recall": {}}}, "rows": rows}
    assert readme_rows(results) == [["small", "–", "0.500, 1 seed", "0.600 (0.500 to 0.700), 2 seeds", "–"]]


def test_what_people_wrote_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_init, "OUT", tmp_path / "gate-init")
    results = {"teachers": {}, "rows": [row("key", 0, -1.0)]}
    write_study(results)
    path = tmp_path / "gate-init.md"
    path.write_text("before\n" + path.read_text() + "after\n")
    results["rows"].append(row("spread", 0, -0.2))
    write_study(results)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert text.count("## Teacher") == 1 and "| `spread` | -0.200 |" in text


def test_a_measured_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_init, "OUT", tmp_path / "gate-init")
    made: list[tuple[str, int, int]] = []
    study = Study.__new__(Study)
    study.name = "small"
    monkeypatch.setattr(study, "_run", lambda *run: made.append(run) or {"recovery": 0.5, "recall": {}})
    first = study.measured("key", 0, 1000)
    assert study.measured("key", 0, 1000) == first and made == [("key", 0, 1000)]
    study_init.keep(row=row("spread", 1000, 0.4))  # by another process
    study.measured("key", 1, 1000)
    assert made[1:] == [("key", 1, 1000)]
    there = [(one["method"], one["seed"]) for one in study_init.kept()["rows"]]
    assert there == [("key", 0), ("spread", 0), ("key", 1)]


def test_runs_differ_in_nothing_else() -> None:
    one, other = study_recipe("embedded", "key", 0, 250_000), study_recipe("embedded", "clusters", 1, 250_000)
    assert study_recipe("embedded", "attended:128", 0, 0).nha.gate_init_rows == 128
    assert one.nha.gate_init == "key" and other.nha.gate_init == "clusters" and other.seed == 1
    assert one.stages == other.stages and one.stages[0].tokens == 250_000 and one.data == other.data
    assert one.nha.slots == 64 and one.nha.window == 32 and one.nha.windows(4) == [32] * 4
