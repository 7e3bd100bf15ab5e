"""Documents that only memory can predict: what they ask for was stated, at the distance they say, near and far."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from made_text import make_recipe, word_tokenizer

from nha_convert.data import training_dataset
from nha_convert.data.stage_data import recall_generator
from nha_convert.recall_documents import FAR, RecallDocument, RecallGenerator
from nha_convert.recipe import SourceSettings

FILLER = list(range(33, 90)) * 400  # no word among these ids


def generator(far: float, seed: int = 0) -> RecallGenerator:
    return RecallGenerator(word_tokenizer("<s>"), FILLER, seed, far)


def answers(made: RecallGenerator, document: RecallDocument) -> list[tuple[int, list[int], int]]:
    """Of every answer its key, its value and its distance."""
    words, ids = set(made.words), document.input_ids
    found = []
    for (start, end), distance in zip(document.answers, document.distances, strict=True):
        key = max(place for place in range(start) if ids[place] in words)
        found.append((ids[key], ids[start:end], distance))
    return found


@pytest.mark.parametrize("length", [200, 513, 1280])
def test_far_documents_state_all_before_they_ask(length: int) -> None:
    made = generator(far=1.0)
    words = set(made.words)
    for _ in range(40):
        document = made.document(length)
        ids = document.input_ids
        assert len(ids) == length and document.answers
        for (start, end), (key, value, distance) in zip(document.answers, answers(made, document), strict=True):
            assert set(value) <= words and len(value) == end - start
            stated = [place for place in range(start - distance) if ids[place] in words]
            assert [ids[place] for place in stated[-1 - len(value) :]] == [key, *value]
            assert stated[-1] == start - distance - 2  # one piece ends the statement
        keys = [key for key, _, _ in answers(made, document)]
        assert len(set(keys)) == len(keys)
        first_asked = min(start for start, _ in document.answers)
        assert all(start - far < first_asked for (start, _), far in zip(document.answers, document.distances))


@pytest.mark.parametrize("length", [1280, 16384])
def test_distances_reach_the_rows_length(length: int) -> None:
    far, near = (
        [distance for _ in range(80) for distance in made.document(length).distances]
        for made in (generator(1.0), generator(0.0))
    )
    assert sum(distance < FAR for distance in far) < len(far) / 20  # of rows that are full of statements
    assert max(far) > 0.85 * length
    parts = [length / 2**place for place in range(5) if length / 2**place >= 2 * FAR]
    counts = [sum(part / 2 < distance <= part for distance in far) for part in parts]
    assert min(counts) > len(far) / 20  # no distance dominates: the upper half, the quarter below it, ...
    assert sum(distance > length / 2 for distance in near) < len(near) / 15


@pytest.mark.parametrize("length", [5, 12, 40])
def test_a_short_row_asks_for_less(length: int) -> None:
    made = generator(far=1.0)
    for _ in range(20):
        document = made.document(length)
        assert len(document.input_ids) == length
        assert all(end <= length for _, end in document.answers)


def test_without_far_nothing_else_is_drawn() -> None:
    """The share decides, and 0 draws no number: rows of older recipes stay what they were."""
    plain = generator(0.0)
    rows = repr([plain.document(96).input_ids for _ in range(8)])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "f3fd93a818a75994"  # as before there was a share
    mixed, asked = generator(0.5), []
    real = RecallGenerator._far_document
    mixed._far_document = lambda *given: asked.append(given) or real(mixed, *given)  # type: ignore[method-assign]
    for _ in range(200):
        mixed.document(96)
    assert 70 < len(asked) < 130  # 100, and 4 standard deviations to both sides


def test_several_sources_share_in_what_is_far(folder: Path) -> None:
    sources = [
        SourceSettings(source="recall", name="near", weight=3.0),
        SourceSettings(source="recall", name="far", weight=1.0, far=0.8),
        SourceSettings(source="stdlib", weight=9.0),
    ]
    assert recall_generator(word_tokenizer("<s>"), FILLER, sources).far == pytest.approx(0.2)
    assert recall_generator(word_tokenizer("<s>"), FILLER, sources[2:]).far == 0


@pytest.mark.parametrize("packing, before", [("windows", "6e7714f40c022126"), ("documents", "3be179e4c525bb73")])
def test_rows_of_another_share_are_another_text(folder: Path, packing: str, before: str) -> None:
    """A run that is resumed with another share is told so; one from before there was a share goes on."""

    def dataset(**settings: Any) -> Any:
        recall = {"source": "recall", "name": "made", **settings}
        recipe = make_recipe([{"source": "text", "path": str(folder)}, recall], packing=packing)
        recipe.stages[0].sources = ["made"]
        return training_dataset(recipe, 0, word_tokenizer("<s>"))

    plain, far = dataset(), dataset(far=1.0)
    assert plain.fingerprint == before != far.fingerprint
    assert not any((plain[row]["input_ids"] == far[row]["input_ids"]).all() for row in range(8))


def test_far_belongs_to_recall_and_is_a_share() -> None:
    with pytest.raises(ValueError, match="`far` belongs to `source: recall`, found `source: stdlib`"):
        SourceSettings(source="stdlib", far=0.5)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        SourceSettings(source="recall", far=1.5)
