"""`eval RUN --save`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nha_convert.errors import InputError
from nha_convert.saved_evaluation import check_save, save_evaluation

CELL = {"distance": 64, "pairs": 4, "exact_match": 0.5, "low": 0.2, "high": 0.8, "prompts": 16}
GAIN = {"layer": 0, "nll": 4.1, "nll_gain": 0.1, "interval": [0.05, 0.15]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run that asked no tasks."""
    settings = {"seed": 0, "evaluate": {"tasks": ["recall"], "layer_ablation": False, "tokens": 512}}
    rows = {"teacher": {"nll": 3.9, "recall": {}}, "final": {"nll": 4.0, "recall": {}}}
    (tmp_path / "eval.json").write_text(json.dumps({**rows, "aligned": {"nll": 4.2}, "settings": settings}))
    (tmp_path / "evaluation").mkdir()
    for name, row in rows.items():
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps(row))
    return tmp_path


def measured(**final: Any) -> dict[str, Any]:
    settings = {"tasks": ["mqar"], "task_pairs": [4], "task_prompts": 16, "task_distances": [1.0]}
    settings |= {"layer_ablation": True, "tokens": 512}
    return {"teacher": {"nll": 9.0, "tasks": {"mqar": [CELL]}}, "final": {"nll": 9.0, **final}, "settings": settings}


def test_what_a_run_lacks_is_added_and_nothing_else(run: Path) -> None:
    added = save_evaluation(run, measured(tasks={"mqar": [CELL]}, layer_ablation=[GAIN]))
    assert added == ["teacher.tasks", "final.tasks", "final.layer_ablation"]
    kept = json.loads((run / "eval.json").read_text())
    assert kept["final"] == {"nll": 4.0, "recall": {}, "tasks": {"mqar": [CELL]}, "layer_ablation": [GAIN]}
    assert kept["teacher"] == {"nll": 3.9, "recall": {}, "tasks": {"mqar": [CELL]}}
    assert kept["aligned"] == {"nll": 4.2} and "harness" not in kept
    assert kept["settings"]["evaluate"]["tasks"] == ["recall", "mqar"] and kept["settings"]["evaluate"]["tokens"] == 512
    for name in ("teacher", "final"):
        assert json.loads((run / "evaluation" / f"{name}.json").read_text()) == kept[name]


def test_the_harness_is_added(run: Path) -> None:
    harness = {"teacher": {"arc_easy": {"acc": 0.5}}, "final": {"arc_easy": {"acc": 0.4}}}
    assert save_evaluation(run, measured() | {"harness": harness}) == ["teacher.tasks", "harness"]
    assert json.loads((run / "eval.json").read_text())["harness"] == harness


def test_what_would_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    check_save(run, ["evaluate.tasks=[mqar]", "evaluate.layer_ablation=true"], others=[])
    with pytest.raises(InputError, match="--text, --set evaluate.tokens, --set nha.window would not fit"):
        check_save(run, ["evaluate.tokens=16k", "nha.window=full", "evaluate.task_prompts=8"], others=["--text"])
    with pytest.raises(InputError, match="no finished run folder; use --json FILE"):
        check_save(tmp_path / "evaluation", [], others=[])
