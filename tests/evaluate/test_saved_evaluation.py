"""`eval RUN --save`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nha_convert import pipeline
from nha_convert.app import app
from nha_convert.errors import InputError
from nha_convert.recipe import parse_recipe
from nha_convert.saved_evaluation import check_save, save_evaluation, settings_to_save
from nha_convert.settings import EvaluateSettings

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


def measured(task: str, **final: Any) -> dict[str, Any]:
    """What `evaluate_checkpoint` gives where this task was asked; NLL that a run must not take over."""
    settings = {"tasks": [task], "task_pairs": [4], "task_prompts": 16, "task_distances": [1.0]}
    settings |= {"layer_ablation": "layer_ablation" in final, "tokens": 512}
    row = {"nll": 9.0, "tasks": {task: [CELL]}}
    return {"teacher": row, "final": row | final, "settings": settings}


def test_what_a_run_lacks_is_added_and_nothing_else(run: Path) -> None:
    cells = {"mqar": [CELL]}
    save_evaluation(run, measured("mqar", layer_ablation=[GAIN]), ["tasks", "layer_ablation"])
    kept = json.loads((run / "eval.json").read_text())
    assert kept["final"] == {"nll": 4.0, "recall": {}, "tasks": cells, "layer_ablation": [GAIN]}
    assert kept["teacher"] == {"nll": 3.9, "recall": {}, "tasks": cells}
    assert kept["aligned"] == {"nll": 4.2} and "harness" not in kept
    asked = {"tasks": ["recall", "mqar"], "layer_ablation": True, "tokens": 512}
    assert kept["settings"]["evaluate"] == asked | {"task_pairs": [4], "task_prompts": 16, "task_distances": [1.0]}
    for name in ("teacher", "final"):
        assert json.loads((run / "evaluation" / f"{name}.json").read_text()) == kept[name]


def test_a_second_call_takes_nothing_away(run: Path) -> None:
    save_evaluation(run, measured("mqar", layer_ablation=[GAIN]), ["tasks", "layer_ablation"])
    save_evaluation(run, measured("needle"), ["tasks"])
    for task in ("arc_easy", "hellaswag"):
        harness = {name: {task: {"acc": 0.5}} for name in ("teacher", "final")}
        save_evaluation(run, measured("copy") | {"harness": harness}, ["harness"])
    kept = json.loads((run / "eval.json").read_text())
    asked = [list(kept[name]["tasks"]) for name in ("teacher", "final")]
    assert asked == [["mqar", "needle"]] * 2, "copy was measured and not named"
    assert kept["final"]["layer_ablation"] == [GAIN] and kept["settings"]["evaluate"]["layer_ablation"]
    assert kept["settings"]["evaluate"]["tasks"] == ["recall", "mqar", "needle"]
    assert list(kept["harness"]["final"]) == list(kept["harness"]["teacher"]) == ["arc_easy", "hellaswag"]


def test_what_would_not_fit_is_refused(run: Path) -> None:
    def check(*overrides: str, harness: bool = False, others: tuple[str, ...] = ()) -> list[str]:
        return check_save(run, overrides, harness=harness, others=others)

    assert check("evaluate.layer_ablation=true", "evaluate.task_prompts=8") == ["tasks", "layer_ablation"]
    assert check(harness=True) == ["harness"]
    with pytest.raises(InputError, match="--text, --set evaluate.tokens, --set nha.window would not fit"):
        check("evaluate.tokens=16k", "nha.window=full", "evaluate.task_prompts=8", others=("--text",))
    with pytest.raises(InputError, match="nothing to add; name it, such as"):
        check()
    with pytest.raises(InputError, match="no finished run folder"):
        check_save(run / "evaluation", ["evaluate.layer_ablation=true"], harness=False, others=[])
    (run / "eval.json").write_text("{")
    with pytest.raises(InputError, match="eval.json: cannot be read as JSON"):
        check("evaluate.layer_ablation=true")


def test_only_what_is_saved_is_measured() -> None:
    asked = EvaluateSettings(tasks=["recall", "mqar"], layer_ablation=True)
    assert settings_to_save(asked, ["tasks"]) == asked.model_copy(update={"tasks": ["mqar"], "layer_ablation": False})
    assert settings_to_save(asked, ["layer_ablation"]) == asked.model_copy(update={"tasks": ["recall"]})
    with pytest.raises(InputError, match="names none beside recall"):
        settings_to_save(EvaluateSettings(), ["tasks"])


def test_a_run_on_local_files_is_asked_later(word_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, from another folder than the model's and the text's; the run's other numbers stay."""
    (tmp_path / "text.txt").write_text("all that glitters is not gold\n" * 900)
    recipe = {
        "model": str(word_llama),
        "nha": {"slots": 4, "window": 8, "gate_init": "spread"},
        "data": {"sources": [{"source": "text", "path": str(tmp_path / "text.txt")}], "held_out_tokens": 4096},
        "stages": [],
        "evaluate": {"sequence_length": 32, "tokens": 128, "recall_pairs": 2, "recall_prompts": 2}
        | {"recall_distances": [2], "benchmark": False},
        "runtime": {"device": "cpu", "threads": 1},
    }
    out = tmp_path / "run"
    pipeline.run(parse_recipe(yaml.safe_dump(recipe), "small"), out, quiet=True)
    before = json.loads((out / "eval.json").read_text())
    monkeypatch.chdir(out)
    asked = ["tasks=[mqar]", "task_pairs=[2]", "task_distances=[2]", "task_prompts=2", "layer_ablation=true"]
    options = [part for one in asked for part in ("--set", f"evaluate.{one}")]
    answer = CliRunner().invoke(app, ["eval", str(out), "--save", *options])
    assert answer.exit_code == 0, answer.output
    assert f"added to {out / 'eval.json'}" in answer.output.replace("\n", "")
    after = json.loads((out / "eval.json").read_text())
    assert [len(after[name].pop("tasks")["mqar"]) for name in ("teacher", "final")] == [1, 1]
    assert [gain["layer"] for gain in after["final"].pop("layer_ablation")] == [0, 1]
    assert {key: after[key] for key in ("teacher", "final")} == {key: before[key] for key in ("teacher", "final")}
    assert "Not measured" not in (out / "report.html").read_text().partition("Layers of the final model")[2][:4000]
