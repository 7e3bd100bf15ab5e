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
from nha_convert.evaluate.suite import evaluate_student, evaluate_teacher, summary_table
from nha_convert.evaluate.table import table_notes, table_rows
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
