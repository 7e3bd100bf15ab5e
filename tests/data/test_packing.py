"""Packing: every token once per epoch, no row crossed, little waste, pieces in order."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_text import make_recipe, word_tokenizer

from nha_convert.data import PackedDataset, training_dataset
from nha_convert.data.packing import pack, row_order

LENGTHS = st.lists(st.integers(0, 70), max_size=60)


@given(LENGTHS, st.integers(8, 40), st.integers(0, 1), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_token_stands_in_one_place(lengths: list[int], size: int, extra: int, seed: int) -> None:
    counts = np.array(lengths, np.int64)
    packing = pack(counts, size, extra, seed)
    seen = sorted(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist()))
    covered = [(document, start + step) for document, start, length in seen for step in range(length)]
    assert covered == [(document, step) for document, length in enumerate(lengths) for step in range(length)]
    used = np.add.reduceat(packing.length + extra, packing.bounds[:-1]) if packing.rows else np.zeros(0)
    assert packing.rows == 0 or (used.max() <= size and used.min() > 0)
    whole = [length for document, start, length in seen if lengths[document] <= size - extra]
    assert whole == [length for length in lengths if 0 < length <= size - extra]  # none of these was cut


@given(LENGTHS, st.integers(8, 40), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_document_stay_in_order(lengths: list[int], size: int, seed: int) -> None:
    packing = pack(np.array(lengths, np.int64), size, 1, 0)
    order = row_order(packing, seed)
    assert sorted(order.tolist()) == list(range(packing.rows))
    place = np.argsort(order)
    row = np.repeat(np.arange(packing.rows), np.diff(packing.bounds))
    for document in set(packing.document.tolist()):
        mine = packing.document == document
        assert np.all(np.diff(place[row[mine]][np.argsort(packing.start[mine])]) > 0)


@pytest.mark.parametrize("size", [128, 512, 2048])
def test_rows_are_full(size: int) -> None:
    """Documents of web lengths (log-normal): at most 1 % of all places are padding."""
    rng = np.random.default_rng(size)
    lengths = np.exp(rng.normal(5.5, 1.2, 20_000)).astype(np.int64) + 1
    packing = pack(lengths, size, 1, 0)
    pieces = -(-lengths // (size - 1))
    waste = 1 - (lengths + pieces).sum() / (packing.rows * size)
    assert waste <= 0.01
    orders = [row_order(packing, seed) for seed in (0, 1)]
    assert np.mean(orders[0] == orders[1]) < 0.01


def documents(folder: Path, count: int = 60) -> Path:
    """Rows of text of 1 to 300 letters, each with its number: no two are equal."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 300, count).tolist()
    rows = [f"{number}:" + chr(97 + number % 26) * size for number, size in enumerate(sizes)]
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return path


def packed(folder: Path, *, epochs: int = 3, **changes: Any) -> PackedDataset:
    recipe = make_recipe([{"source": "dataset", "path": str(documents(folder))}], packing="documents", **changes)
    recipe.stages[0].tokens = epochs * 200 * 96
    dataset = training_dataset(recipe, 0, word_tokenizer("<s>"))
    assert isinstance(dataset, PackedDataset)
    return dataset


def test_an_epoch_has_every_token_once(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    (source,) = dataset.sources
    assert source is not None and len(dataset) > 2 * len(source)
    bos = word_tokenizer("<s>").bos_token_id
    everything = Counter(source.stream.array(0, len(source.stream)).tolist())
    orders = []
    for epoch in range(2):
        found: Counter[int] = Counter()
        order = []
        for number in range(epoch * len(source), (epoch + 1) * len(source)):
            item = dataset[number]
            assert set(item) == {"input_ids", "labels", "position_ids"}
            assert all(value.dtype == torch.long and value.shape == (96,) for value in item.values())
            pieces = source.pieces(number)
            order.append(pieces)
            real = sum(length + 1 for _, _, length in pieces)
            ids = item["input_ids"][:real]
            found.update(ids[ids != bos].tolist())
            starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
            expected = np.cumsum([0, *(length + 1 for _, _, length in pieces)]).tolist()
            assert starts == (expected if real < 96 else expected[:-1])  # padding is a document of its own
            assert (item["input_ids"][starts] == bos).sum() == len(pieces)
            told = item["labels"] != -100
            assert not told[starts].any() and not told[real:].any() and told.sum() == real - len(pieces)
            assert torch.equal(item["labels"][told], item["input_ids"][told])
            jumps = item["position_ids"].diff() != 1
            assert (jumps.nonzero().flatten() + 1).tolist() == starts[1:]
        assert found == everything
        orders.append(order)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_an_item_depends_on_seed_stage_and_number_alone(tmp_path: Path) -> None:
    forward = packed(tmp_path)
    first = [forward[index]["input_ids"] for index in range(300)]
    other = pickle.loads(pickle.dumps(packed(tmp_path)))  # as a worker of a data loader gets it
    again = [other[index]["input_ids"] for index in reversed(range(300))][::-1]
    assert all(map(torch.equal, first, again))
    assert len(pickle.dumps(forward)) < 100_000  # by path, not by content
    with pytest.raises(IndexError):
        forward[len(forward)]


def test_sources_come_in_their_shares_and_by_name(tmp_path: Path, folder: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"source": "dataset", "path": str(documents(tmp_path)), "weight": 3, "name": "rows"},
        {"source": "text", "path": str(folder / "0.txt"), "weight": 1},
        {"source": "recall", "weight": 1},
    ]
    recipe = make_recipe(sources, packing="documents")
    recipe.stages[0].tokens = 1000 * 96
    tokenizer = word_tokenizer("<s>")
    dataset = training_dataset(recipe, 0, tokenizer)
    assert isinstance(dataset, PackedDataset)
    shares = np.bincount(dataset.turn, minlength=3) / len(dataset)
    assert np.allclose(shares, [0.6, 0.2, 0.2], atol=0.05)
    for place in range(3):
        assert dataset.number[dataset.turn == place].tolist() == list(range((dataset.turn == place).sum()))
    made = dataset[int(np.flatnonzero(dataset.turn == 2)[0])]
    assert torch.equal(made["position_ids"], torch.arange(96)) and (made["labels"] != -100).all()
    recipe.stages[1].sources = ["rows", "recall"]
    second = training_dataset(recipe, 1, tokenizer)
    assert isinstance(second, PackedDataset) and len(second.sources) == 2
    recipe.stages[1].sources = ["recall"]  # its filler is the other sources' text
    alone = training_dataset(recipe, 1, tokenizer)
    assert isinstance(alone, PackedDataset) and alone.sources == [None]
    assert dataset.fingerprint != second.fingerprint != alone.fingerprint
    assert dataset.fingerprint == training_dataset(recipe, 0, word_tokenizer("<s>")).fingerprint


def test_held_out_documents_are_never_packed(tmp_path: Path) -> None:
    """The same documents at every sequence length, and none of them in a row that is trained on."""
    tokenizer = word_tokenizer("<s>")
    rows = documents(tmp_path).read_text().splitlines()
    held_out = {line.split('"')[3].split(":")[0] for line in rows[19::20]}
    for length in (32, 96, 256):
        recipe = make_recipe([{"source": "dataset", "path": str(tmp_path / "rows.jsonl")}], packing="documents")
        recipe.stages[0] = recipe.stages[0].model_copy(update={"sequence_length": length, "tokens": 300 * 96})
        dataset = training_dataset(recipe, 0, tokenizer)
        assert isinstance(dataset, PackedDataset) and dataset.sources[0] is not None
        stream = dataset.sources[0].stream
        numbers = {
            tokenizer.decode(stream[int(start) : int(start) + 4]).split(":")[0] for start in stream.starts[:-1].tolist()
        }
        assert len(numbers) == 57 and not numbers & held_out
