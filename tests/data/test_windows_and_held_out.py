"""Training windows and held-out text: deterministic, apart, made of the sources in their shares."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from made_text import as_text, make_recipe, word_tokenizer
from transformers import PreTrainedTokenizerFast

from nha_convert import data
from nha_convert.data import held_out_tokens, recall_filler, texts, token_stream, tokens, training_dataset
from nha_convert.errors import InputError
from nha_convert.recall_documents import RecallGenerator
from nha_convert.recipe import SourceSettings


@pytest.mark.parametrize("bos", ["<s>", None])
def test_windows_are_consecutive_text_behind_bos(folder: Path, bos: str | None) -> None:
    tokenizer = word_tokenizer(bos)
    dataset = training_dataset(make_recipe([{"source": "text", "path": str(folder)}]), 0, tokenizer)
    everything = "".join(texts(SourceSettings(source="text", path=str(folder)), "train"))
    assert len(dataset) == 64
    for item in (dataset[index] for index in range(len(dataset))):
        assert item["input_ids"].dtype == torch.long and item["input_ids"].shape == (96,)
        assert torch.equal(item["input_ids"], item["labels"])
        assert (item["input_ids"][0].item() == tokenizer.bos_token_id) == (bos is not None)
        assert torch.equal(item["position_ids"], torch.arange(96))
        assert as_text(tokenizer, item["input_ids"]) in everything
    assert len({tuple(dataset[index]["input_ids"].tolist()) for index in range(64)}) > 50


def test_an_item_depends_on_seed_stage_and_number_alone(folder: Path) -> None:
    tokenizer = word_tokenizer("<s>")
    sources = [{"source": "text", "path": str(folder)}, {"source": "recall"}]
    recipe = make_recipe(sources)
    forward = training_dataset(recipe, 0, tokenizer)
    first = [forward[index]["input_ids"] for index in range(12)]
    random.seed(5)
    torch.manual_seed(5)
    backward = training_dataset(recipe, 0, word_tokenizer("<s>"))
    again = [backward[index]["input_ids"] for index in reversed(range(12))][::-1]
    assert all(map(torch.equal, first, again))
    other_stage = training_dataset(recipe, 1, tokenizer)
    assert not any(torch.equal(other_stage[index]["input_ids"], first[index]) for index in range(12))
    recipe.seed = 1
    other_seed = training_dataset(recipe, 0, tokenizer)
    assert not any(torch.equal(other_seed[index]["input_ids"], first[index]) for index in range(12))
    with pytest.raises(IndexError):
        forward[64]


def test_sources_come_in_their_shares(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"source": "text", "path": str(folder), "weight": 1}, {"source": "recall", "weight": 3}]
    recipe = make_recipe(sources)
    recipe.stages[0].tokens = 400 * 96
    dataset = training_dataset(recipe, 0, word_tokenizer("<s>"))
    made: list[int] = []
    real = RecallGenerator.document
    monkeypatch.setattr(RecallGenerator, "document", lambda self, count: made.append(count) or real(self, count))
    assert {dataset[index]["input_ids"].shape for index in range(len(dataset))} == {(96,)}
    assert len(dataset) == 400 and set(made) == {95}
    assert 0.65 < len(made) / 400 < 0.85  # 0.75, and 4.6 standard deviations to both sides


def test_held_out_text_is_never_trained_on(folder: Path) -> None:
    source = SourceSettings(source="text", path=str(folder))
    train, held_out = ("".join(texts(source, split)) for split in data.SPLITS)
    everything = "".join((folder / f"{name}.txt").read_text() for name in range(3))
    assert train + held_out == everything
    assert len(held_out) == len(everything) // 20
    tokenizer = word_tokenizer("<s>")
    recipe = make_recipe([{"source": "text", "path": str(folder)}], held_out_tokens=200)
    tokens = held_out_tokens(recipe, tokenizer)
    assert tokens.dtype == torch.long and tokens.shape == (200,)
    assert held_out.startswith(as_text(tokenizer, tokens))
    assert as_text(tokenizer, torch.tensor(recall_filler(recipe, tokenizer))) == held_out


def test_held_out_text_is_mixed_as_the_sources_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text source has its share, and where one runs out the mix ends instead of shifting."""
    other = folder / "other"
    other.mkdir()
    (other / "digits.txt").write_text("7 " * 20_000)
    tokenizer = word_tokenizer("<s>")
    sources: list[dict[str, Any]] = [{"source": "text", "path": str(folder / "0.txt"), "weight": 1}]
    sources += [{"source": "text", "path": str(other), "weight": 1}, {"source": "recall", "weight": 2}]
    for wanted in (2000, 10**6):
        recipe = make_recipe(sources, held_out_tokens=wanted)
        size = recipe.evaluate.sequence_length - 1
        tokens = held_out_tokens(recipe, tokenizer)
        assert tokens.numel() % size == 0 and tokens.numel() <= wanted
        made: list[int] = []
        real = RecallGenerator.document
        monkeypatch.setattr(
            RecallGenerator, "document", lambda self, n, made=made, real=real: made.append(n) or real(self, n)
        )
        held_out_tokens(recipe, tokenizer)
        monkeypatch.setattr(RecallGenerator, "document", real)
        assert abs(len(made) * size / tokens.numel() - 0.5) <= size / tokens.numel()
        rows = [as_text(tokenizer, row) for row in tokens.view(-1, size)]
        digits = sum(set(row) <= {"7", " "} for row in rows)
        assert abs(digits - (len(rows) - len(made)) / 2) <= 1


def test_dataset_rows_are_held_out_every_twentieth(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {index} " for index in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = SourceSettings(source="dataset", path=str(tmp_path / name), column="body")
        train, held_out = (list(texts(source, split)) for split in data.SPLITS)
        assert held_out == rows[19::20]
        assert train == [row for row in rows if row not in held_out]


def test_a_source_is_tokenised_once_and_only_up_to_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer("<s>")
    source = SourceSettings(source="text", path=str(folder))
    short = token_stream(source, tokenizer, "train", limit=10)
    assert len(short) >= 10
    monkeypatch.setattr(tokens, "texts", lambda *_: pytest.fail("read again"))
    assert token_stream(source, tokenizer, "train", limit=10) is short


def test_stdlib_splits_do_not_overlap() -> None:
    source = SourceSettings(source="stdlib")
    train, held_out = (set(texts(source, split)) for split in data.SPLITS)
    assert len(train) > 100 and len(held_out) > 5
    assert not {text for text in train & held_out if text.strip()}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "text", "path": "{}/none*.txt"}, "no text found at"),
        ({"source": "dataset", "path": "{}/0.txt"}, "a .jsonl or .parquet file is needed"),
        ({"source": "dataset", "path": "{}/broken.jsonl"}, r"broken.jsonl:2: not JSON"),
        ({"source": "dataset", "path": "{}/good.jsonl", "column": "body"}, "has no column 'body'; its columns: text"),
        ({"source": "dataset", "path": "{}/good.jsonl"}, "has 5 tokens to train on, fewer than one window"),
        ({"source": "dataset", "path": "{}/no.parquet"}, "not a parquet file"),
    ],
)
def test_bad_sources_say_what_is_wrong(folder: Path, source: dict[str, str], message: str) -> None:
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "good.jsonl").write_text('{"text": "hello"}\n')
    (folder / "no.parquet").write_text("this is text")
    recipe = make_recipe([{**source, "path": source["path"].format(folder)}])
    with pytest.raises(InputError, match=message):
        training_dataset(recipe, 0, word_tokenizer(None))


def test_recall_needs_words(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = make_recipe([{"source": "text", "path": str(folder)}, {"source": "recall"}])
    with pytest.raises(InputError, match="recall needs 64 one-token words"):
        training_dataset(recipe, 0, tokenizer)


def test_too_little_held_out_text(folder: Path) -> None:
    recipe = make_recipe([{"source": "text", "path": str(folder / "0.txt")}])
    recipe.evaluate.sequence_length = 4096
    with pytest.raises(InputError, match="evaluate.sequence_length = 4096"):
        held_out_tokens(recipe, word_tokenizer(None))
