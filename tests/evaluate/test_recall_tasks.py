"""Every task's documents: exact distances, one right answer, the same for the same seed; what they ask of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.corpus import stdlib_texts
from nha_convert.evaluate.recall import ask_task, task_documents
from nha_convert.evaluate.recall_tasks import (
    TASKS,
    AssociativeRecall,
    Copy,
    MultiKeyNeedle,
    MultiValueNeedle,
    Needle,
    RecallTask,
    TaskGenerator,
    VariableTracking,
    tasks_named,
)
from nha_convert.modeling.attention_nha import branch_mode, teacher_mode
from nha_convert.recall_documents import RecallDocument
from nha_convert.recipe import embedded_teacher
from nha_convert.settings import EvaluateSettings, NHASettings

EVERY = [
    AssociativeRecall(pairs=4),
    AssociativeRecall(pairs=12, queries=3, value_length=2),
    Needle(),
    MultiKeyNeedle(),
    MultiValueNeedle(),
    VariableTracking(),
    VariableTracking(chains=1, hops=3),
    Copy(),
]


@pytest.fixture
def generator(word_tokenizer: Any, filler: list[int]) -> TaskGenerator:
    return TaskGenerator(word_tokenizer, filler, seed=4)


def first_place(document: RecallDocument, ids: list[int]) -> int:
    """Index after the first occurrence of some ids."""
    row = document.input_ids
    return next(at for at in range(len(ids), len(row) + 1) if row[at - len(ids) : at] == ids)


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_documents_are_what_they_say(task: RecallTask, generator: TaskGenerator, words: set[int]) -> None:
    for distance in (128, 257):
        span, documents = task_documents(generator, task, distance, 9, 800)
        assert len(documents) == 9 and distance < span <= 800
        for document in documents:
            ((start, end),) = document.answers
            assert document.distances == [distance]
            assert (start, end) == (span, len(document.input_ids)) and end - start == task.answer
            assert set(document.input_ids[start:end]) <= words
        assert len({tuple(document.input_ids) for document in documents}) == 9


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_same_seed_same_questions(task: RecallTask, word_tokenizer: Any, filler: list[int]) -> None:
    def made(seed: int) -> list[list[int]]:
        return [
            document.input_ids
            for document in task_documents(TaskGenerator(word_tokenizer, filler, seed), task, 128, 4, 600)[1]
        ]

    assert made(7) == made(7) != made(8)


def test_needle_stands_at_its_distance(generator: TaskGenerator) -> None:
    for task in (Needle(), MultiKeyNeedle()):
        _, documents = task_documents(generator, task, 150, 8, 700)
        code, close = generator.encode(" The code of"), generator.encode(".")
        for document in documents:
            row, (start, _) = document.input_ids, document.answers[0]
            assert sum(row[at : at + len(code)] == code for at in range(start)) == task.statements
            key = row[start - len(generator.encode("? It is")) - 1]
            line = [*code, key, *generator.encode(" is"), row[start], *close]
            assert start - first_place(document, line) == 150


def test_values_of_one_key_are_asked_in_order(generator: TaskGenerator) -> None:
    _, documents = task_documents(generator, MultiValueNeedle(), 200, 8, 700)
    for document in documents:
        row, (start, end) = document.input_ids, document.answers[0]
        key = row[start - len(generator.encode(", in order:")) - 1]
        head = [*generator.encode(" A code of"), key, *generator.encode(" is")]
        stated = [row[at + len(head)] for at in range(start) if row[at : at + len(head)] == head]
        assert stated == row[start:end] and len(set(stated)) == 4
        line = [*head, stated[0], *generator.encode(".")]
        assert start - first_place(document, line) == 200


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 1)])
def test_variables_lead_to_the_value(generator: TaskGenerator, words: set[int], shape: tuple[int, int]) -> None:
    """Following the assignments from the asked variable gives the answer, which stands in one line only."""
    chains, hops = shape
    _, documents = task_documents(generator, VariableTracking(chains, hops), 160, 8, 700)
    equals = generator.encode(" =")
    for document in documents:
        row, (start, end) = document.input_ids, document.answers[0]
        places = [at for at in range(1, start) if row[at : at + len(equals)] == equals and row[at - 1] in words]
        lines = [(row[at - 1], row[at + len(equals)]) for at in places]
        table = dict(lines)
        assert len(lines) == len(table) == chains * (1 + hops)
        for index, (_, value) in enumerate(lines):  # what is assigned was assigned before, or is a value
            assert value not in table or value in dict(lines[:index])
        name, steps = row[start - 2], 0
        while name in table:
            name, steps = table[name], steps + 1
        assert [name] == row[start:end] and steps == 1 + hops
        assert row[:start].count(name) == 1
        assert start - (row.index(name) + 1 + len(generator.encode("\n"))) == 160


def test_a_list_is_copied(generator: TaskGenerator) -> None:
    _, documents = task_documents(generator, Copy(cue=2, length=5), 90, 8, 400)
    for document in documents:
        row, (start, end) = document.input_ids, document.answers[0]
        after = first_place(document, [*row[start - 2 : end], *generator.encode("\n")])
        assert start - after == 90


def test_earlier_questions_stand_answered(generator: TaskGenerator, words: set[int]) -> None:
    """Four questions at the end, every answer the one stated, as many earlier ones as the distance has room for."""
    for distance, least in ((200, 4), (40, 1)):
        _, documents = task_documents(generator, AssociativeRecall(pairs=6), distance, 14, 700)
        for document in documents:
            seen = [token for token in document.input_ids if token in words]
            stated, asked = dict(zip(seen[:12:2], seen[1:12:2])), list(zip(seen[12::2], seen[13::2]))
            assert len(stated) == 6 and least <= len(asked) <= 4
            assert all(stated[key] == value for key, value in asked)
            assert len({key for key, _ in asked}) == len(asked)
            if least == 4:
                assert len(asked) == 4
    single = generator.prompt(pairs=6, distance=200, span=400)
    assert len([token for token in single.input_ids if token in words]) == 12 + 2


def test_text_longer_than_the_filler_goes_round(word_tokenizer: Any, filler: list[int]) -> None:
    generator = TaskGenerator(word_tokenizer, filler, seed=0)
    text = generator.text(2 * len(filler) + 5)
    assert len(text) == 2 * len(filler) + 5 and text[len(filler) : 2 * len(filler)] == filler
    span, (document,) = task_documents(generator, Needle(), 6000, 1, 9000)
    assert len(document.input_ids) == span + 1 and document.answers == [(span, span + 1)]


@pytest.mark.parametrize(
    ("task", "distance", "reason"),
    [
        (MultiValueNeedle(), 16, "do not fit"),
        (VariableTracking(chains=2, hops=9), 40, "do not fit"),
        (Copy(), 4, "do not fit"),
        (AssociativeRecall(pairs=97), 500, "the vocabulary has 96"),
        (VariableTracking(chains=20, hops=4), 500, "the vocabulary has 96"),
    ],
)
def test_what_does_not_fit(task: RecallTask, distance: int, reason: str, generator: TaskGenerator) -> None:
    with pytest.raises(ValueError, match=reason):
        task_documents(generator, task, distance, 2, 900)


def test_names() -> None:
    allowed = EvaluateSettings.model_fields["tasks"].annotation.__args__[0].__args__  # type: ignore[union-attr]
    assert set(allowed) == {"recall", *TASKS}
    assert tasks_named("mqar", [4, 8]) == [AssociativeRecall(pairs=4), AssociativeRecall(pairs=8)]
    assert [one.name for name in TASKS for one in tasks_named(name, [4])] == list(TASKS)


@torch.no_grad()
def test_the_teacher_recalls_and_a_masked_memory_does_not() -> None:
    """The small trained Llama finds words inside and beyond a window of 64; its window alone only those inside."""
    folder: Path = embedded_teacher()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filler = tokenizer(stdlib_texts("held_out")[0], add_special_tokens=False, verbose=False)["input_ids"]
    while len(filler) < 4096:
        filler = filler + filler
    student = load_student(folder, NHASettings(window=64, slots=8)).eval()
    options: dict[str, Any] = {"prompts": 8, "span": 260, "quiet": True}
    for task in (AssociativeRecall(pairs=4), Needle()):
        with teacher_mode(student):
            teacher = ask_task(student, tokenizer, filler, task, distances=[32, 200], **options)
        with branch_mode(student, "window"):
            window = ask_task(student, tokenizer, filler, task, distances=[32, 200], **options)
        assert min(cell["exact_match"] for cell in teacher.values()) >= 0.75
        assert window["32"]["exact_match"] >= 0.75 and window["200"]["exact_match"] <= 0.25
