"""Rows of eval.json and the table that shows them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.evaluate.ablation import branch_ablation, memory_recovery
from nha_convert.evaluate.nll import agreement
from nha_convert.evaluate.position_table import position_rows
from nha_convert.evaluate.suite import evaluate_student, evaluate_teacher, summary_table
from nha_convert.evaluate.table import table_notes, table_rows
from nha_convert.evaluate.task_table import harness_rows, has_tasks, task_distances, task_rows
from nha_convert.settings import EvaluateSettings, NHASettings

SETTINGS = EvaluateSettings(
    sequence_length=64, tokens=300, recall_pairs=3, recall_prompts=8, recall_distances=[2, 4, 16]
)
HELD_OUT = torch.arange(400) * 37 % 251


def render(evaluation: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(summary_table(evaluation))
    return " ".join(capture.get().split())


@pytest.fixture(scope="module")
def student(word_llama: Path) -> Any:
    return load_student(word_llama, NHASettings(window=16, slots=8, sinks=2))


@pytest.fixture(scope="module")
def row(student: Any, word_tokenizer: Any, filler: list[int]) -> dict[str, Any]:
    return evaluate_student(
        student, word_tokenizer, HELD_OUT, filler, SETTINGS, label="final", with_window_recall=True, quiet=True
    )


def test_row_is_what_the_parts_measure(row: dict[str, Any], student: Any, word_tokenizer: Any) -> None:
    bos = word_tokenizer.bos_token_id
    ablation = branch_ablation(student, HELD_OUT[:300], 64, bos=bos)
    assert row["nll"] == pytest.approx(ablation["full"]["mean"], rel=1e-6)
    assert row["nll_buckets"] == pytest.approx(ablation["full"]["buckets"], rel=1e-6)
    for branch in ("window", "slots", "none"):
        assert row["ablation"][branch] == pytest.approx(ablation[branch]["mean"], rel=1e-6)
    close = agreement(student, HELD_OUT[:300], 64, bos=bos)
    assert (row["kl"], row["top1"]) == pytest.approx((close["kl"]["mean"], close["top1"]["mean"]), rel=1e-5)
    assert row["memory_recovery"] == memory_recovery(row["nll"], row["nll_teacher"], row["ablation"]["window"])
    assert row["branches"]["window_only"]["nll"] == row["ablation"]["window"]
    assert row["tokens"] == 300 and row["label"] == "final" and row["seconds"] > 0
    assert [layer["layer"] for layer in row["slot_mass"]] == [0, 1]
    json.dumps(row)


def test_every_mean_has_its_interval(row: dict[str, Any]) -> None:
    intervals = row["intervals"]
    assert intervals["bootstrap"] == {"confidence": 0.95, "windows": 5, "draws": 1000, "seed": 0}
    for metric in ("nll", "kl", "top1"):
        low, high = intervals[metric]
        assert low < row[metric] < high
    for branch in row["branches"].values():
        assert branch["intervals"]["nll"][0] < branch["nll"] < branch["intervals"]["nll"][1]
    low, high = intervals["nll_gain_of_slots"]
    assert low < row["ablation"]["window"] - row["nll"] < high
    low, high = intervals["nll_above_teacher"]
    assert low < row["nll"] - row["nll_teacher"] < high
    assert "memory_recovery" in intervals


def test_slots_are_described_per_layer_and_head(row: dict[str, Any]) -> None:
    usage = row["slot_usage"]
    assert usage["layers"] == [0, 1] and usage["tokens"] == 256 + 5  # and a BOS for each window
    for name in ("slot_mass", "effective_slots"):
        assert [len(heads) for heads in usage[name]] == [4, 4]
    for name in ("write_rate", "horizon_low", "horizon_median", "horizon_high"):
        assert [len(heads) for heads in usage[name]] == [2, 2]
    for layer, heads in zip(row["slot_mass"], usage["slot_mass"]):
        assert layer["mean"] == pytest.approx(sum(heads) / 4, rel=1e-5)


def test_a_normal_row_asks_nothing_more(row: dict[str, Any]) -> None:
    assert "tasks" not in row and "layer_ablation" not in row


def test_a_row_is_printed_with_its_layers(row: dict[str, Any]) -> None:
    said = render({"final": row})
    assert "Layers of the final model" in said and "evaluate.layer_ablation=true measures it" in said
    assert f"{sum(row['slot_usage']['effective_slots'][1]) / 4:.1f}" in said


def test_a_row_is_printed_by_position(row: dict[str, Any]) -> None:
    teacher = {"nll": row["nll_teacher"], "nll_buckets": {"0-16": 1.5}}
    window = {"nll_buckets": {"0-16": 2.5, "16-32": 3.5}}
    evaluation = {"teacher": teacher, "window_only": window, "final": row}
    cells = {
        bucket: (
            f"{row['nll_buckets'][bucket]:.4f}",
            f"{row['kl_buckets'][bucket]:.4f}",
            f"{row['top1_buckets'][bucket]:.3f}",
        )
        for bucket in ("0-16", "16-32", "32-64")
    }
    found = position_rows(evaluation)
    assert found[0] == ["0-16", "1.5000", "2.5000", *cells["0-16"]]
    assert found[1] == ["16-32", "–", "3.5000", *cells["16-32"]] and found[2] == ["32-64", "–", "–", *cells["32-64"]]
    assert "By position" in render(evaluation) and cells["32-64"][1] in render(evaluation)
    assert position_rows({"teacher": teacher}) == [] and "By position" not in render({"teacher": teacher})


TASK_SETTINGS = SETTINGS.model_copy(
    update={
        "tasks": ["mqar", "copy"],
        "task_pairs": [2, 60],
        "task_prompts": 4,
        "task_distances": [0.25, 4, 100],
        "layer_ablation": True,
    }
)


@pytest.fixture(scope="module")
def asked(student: Any, word_tokenizer: Any, filler: list[int]) -> dict[str, Any]:
    """An evaluation with tasks and every layer's own ablation."""
    measured = (word_tokenizer, HELD_OUT, filler, TASK_SETTINGS)
    return {
        "teacher": evaluate_teacher(student, *measured, quiet=True),
        "final": evaluate_student(student, *measured, label="final", quiet=True),
    }


def test_tasks_are_asked_of_both(asked: dict[str, Any]) -> None:
    for row in asked.values():
        assert "recall" not in row and list(row["tasks"]) == ["mqar", "copy"]
        places = [(cell["pairs"], cell["distance"]) for cell in row["tasks"]["mqar"]]
        assert places == [(pairs, distance) for pairs in (2, 60) for distance in (4, 64, 1600)]
        few, far, beyond = row["tasks"]["copy"]
        assert "left_out" in few and "do not fit" in few["left_out"] and few["distance"] == 4
        assert far["prompts"] == 4 and far["low"] <= far["exact_match"] <= far["high"]
        assert beyond["left_out"] == "no room in the trained context of 256 tokens"
    json.dumps(asked)


def test_a_layers_ablation_stands_in_the_row(asked: dict[str, Any], row: dict[str, Any], student: Any) -> None:
    gains = asked["final"]["layer_ablation"]
    assert [gain["layer"] for gain in gains] == [0, 1]
    assert asked["final"]["nll"] == row["nll"] and list(asked["final"]["branches"]) == list(row["branches"])
    for gain in gains:
        assert gain["nll_gain"] == pytest.approx(gain["nll"] - row["nll"]) and gain["nll_gain"] != 0
    assert all(layer.self_attn.nha_branch == "both" for layer in student.model.layers)


def test_rows_before_the_last_ask_no_tasks(student: Any, word_tokenizer: Any, filler: list[int]) -> None:
    early = evaluate_student(
        student, word_tokenizer, HELD_OUT, filler, TASK_SETTINGS, label="swapped", with_branches=False, quiet=True
    )
    assert "tasks" not in early and "layer_ablation" not in early


@pytest.mark.parametrize("task", ["needle", "recall"])
def test_another_seed_asks_other_questions(
    task: str, student: Any, word_tokenizer: Any, filler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[torch.Tensor] = []
    generate = student.generate
    monkeypatch.setattr(student, "generate", lambda ids, **rest: prompts.append(ids) or generate(ids, **rest))
    settings = TASK_SETTINGS.model_copy(update={"tasks": [task], "task_distances": [4.0], "recall_distances": [2]})
    for seed in (0, 0, 5):
        settings.seed = seed
        evaluate_teacher(student, word_tokenizer, HELD_OUT, filler, settings, quiet=True)
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[1], prompts[2])


def test_notes_name_the_final_rows_intervals(row: dict[str, Any]) -> None:
    intervals = row["intervals"] | {"nll_above_teacher": [0.01234, 0.05], "memory_recovery": [0.7, 0.9]}
    (note,) = (note for note in table_notes({"final": row | {"intervals": intervals}}) if "bootstrap" in note)
    assert note.endswith("over 5 windows: NLL above the teacher's 0.0123 to 0.0500, memory recovery 0.700 to 0.900.")
    without = row | {"intervals": intervals | {"memory_recovery": None, "nll_above_teacher": None}}
    assert not any("bootstrap" in note for note in table_notes({"final": without}))


def test_table_of_tasks_has_the_teacher_beside_the_student(asked: dict[str, Any]) -> None:
    cell = {"distance": 64, "pairs": 2, "exact_match": 0.5, "low": 0.25, "high": 0.75, "prompts": 4, "span": 128}
    asked = json.loads(json.dumps(asked))
    asked["final"]["tasks"]["mqar"][1] = cell
    asked["teacher"]["tasks"]["mqar"][1] = cell | {"exact_match": 0.9, "low": 0.8, "high": 1.0}
    lines = task_rows(asked)
    assert task_distances(asked) == [64]
    assert [line[:2] for line in lines if "60" not in line[0]] == [
        ["mqar, 2 pairs", "teacher"],
        ["mqar, 2 pairs", "final"],
        ["copy", "teacher"],
        ["copy", "final"],
    ]
    assert lines[0][2] == "0.90 ±0.10" and lines[1][2] == "0.50 ±0.25"
    assert [line[2] for line in lines if "60" in line[0]] == ["–", "–"]  # 60 pairs do not fit into 256 positions
    text = render(asked)
    assert "Student against teacher" in text and "Recall tasks" in text and "0.90 ±0.10" in text
    assert "4 questions per cell" in text and "copy at 1600" in text and "lm-evaluation-harness" not in text


def test_table_of_the_harness() -> None:
    values = {"acc": 0.5, "acc_stderr": 0.01, "exact_match (strict)": 0.25, "exact_match_stderr (strict)": 0.02}
    evaluation = {"harness": {"teacher": {"some_task": values | {"acc": 0.625}}, "final": {"some_task": values}}}
    assert harness_rows(evaluation) == [
        ["some_task", "acc", "0.6250 ±0.0100", "0.5000 ±0.0100"],
        ["some_task", "exact_match (strict)", "0.2500 ±0.0200", "0.2500 ±0.0200"],
    ]
    assert "0.6250 ±0.0100" in render(evaluation)
    assert harness_rows({}) == [] and task_rows({}) == [] and not has_tasks({})


def test_tasks_are_named_once_and_known() -> None:
    assert EvaluateSettings().tasks == ["recall"] and EvaluateSettings(tasks=[]).tasks == []
    with pytest.raises(ValueError, match="found twice: needle"):
        EvaluateSettings(tasks=["needle", "copy", "needle"])
    with pytest.raises(ValueError, match="needle_multikey"):
        EvaluateSettings(tasks=["needles"])


def test_recall_distances_are_multiples_of_the_window(row: dict[str, Any]) -> None:
    assert list(row["recall"]) == ["32", "64"]
    assert row["recall_left_out"] == {"256": "no room in the trained context of 256 tokens"}
    assert list(row["branches"]["window_only"]["recall"]) == ["32", "64"]
    assert "recall" not in row["branches"]["no_attention"]


def test_teacher_in_the_student_is_the_teacher(
    row: dict[str, Any], student: Any, word_llama: Path, word_tokenizer: Any, filler: list[int]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(word_llama)
    inside = evaluate_teacher(student, word_tokenizer, HELD_OUT, filler, SETTINGS, quiet=True)
    alone = evaluate_teacher(plain, word_tokenizer, HELD_OUT, filler, SETTINGS, window=16, quiet=True)
    for result in (inside, alone):
        result.pop("seconds")
    assert inside == alone
    assert row["nll_teacher"] == pytest.approx(alone["nll"], rel=1e-6)
    assert all(layer.self_attn.nha_mode == "student" for layer in student.model.layers)


def test_student_without_absorption_equals_its_teacher(
    word_llama: Path, word_tokenizer: Any, filler: list[int]
) -> None:
    student = load_student(word_llama, NHASettings(window=256, slots=8))
    result = evaluate_student(
        student,
        word_tokenizer,
        HELD_OUT,
        filler,
        SETTINGS,
        label="final",
        window=16,
        with_recall=False,
        with_branches=False,
        quiet=True,
    )
    assert list(result["branches"]) == ["window_only"] and list(result["ablation"]) == ["window"]
    assert result["nll"] == pytest.approx(result["nll_teacher"], abs=1e-6)
    assert result["top1"] == 1 and result["memory_recovery"] is None
    assert "recall" not in result


def test_table_shows_what_was_measured(row: dict[str, Any]) -> None:
    cell = {"exact_match": 0.75, "low": 0.41, "high": 0.93, "prompts": 8, "span": 64}
    teacher = {"nll": row["nll"] / 1.25, "recall": {"32": cell | {"exact_match": 1.0}}}
    final = row | {"recall": {"32": cell}}
    evaluation = {"teacher": teacher, "final": final, "memory_recovery": {"final": 0.4321}, **row["branches"]}
    text = render(evaluation)
    for expected in (
        f"{row['nll']:.4f}",
        "+25.00 %",
        f"{row['kl']:.4f}",
        f"{row['top1']:.3f}",
        "0.75",
        "1.00",
        "0.432",
    ):
        assert expected in text, expected
    assert "8 prompts per distance" in text and "at most ±0.26" in text
    assert "Recall at 256 tokens left out: no room in the trained context of 256 tokens." in text
    order = ["teacher", "window_only", "memory_only", "no_attention", "final"]
    assert [key for key, _ in table_rows(evaluation)] == order  # swapped and aligned were not measured
    assert [key for key, _ in table_rows(evaluation, complete=True)] == [*order[:-1], "swapped", "aligned", "final"]


def test_table_of_further_stages_and_of_nothing() -> None:
    evaluation = {"stage_10": {"nll": 2.0}, "stage_2": {"nll": 3.0}, "final": {"nll": 1.0}}
    assert [key for key, _ in table_rows(evaluation)] == ["stage_2", "stage_10", "final"]
    assert table_rows(evaluation)[0][1] == ["stage 2", "3.0000", "–", "–", "–", "–"]
    assert "Student against teacher" in render({})
    assert len(table_notes({})) == 1
