"""Tokens on disk: made once, found again by content, the same from any number of workers, whole or not at all."""

import errno
import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_text import word_tokenizer

from nha_convert.data import texts, token_stream, tokens
from nha_convert.data.token_file import BATCH, Joined, TokenStream, TokenWriter
from nha_convert.errors import InputError, WorkError
from nha_convert.recipe import SourceSettings

LIMIT = 10**9


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number} " * (number % 13)}) + "\n" for number in range(400)))
    return path


def source_of(path: Path, **settings: Any) -> SourceSettings:
    return SourceSettings(source="dataset", path=str(path), **settings)


def test_documents_come_back_as_they_were(rows: Path) -> None:
    tokenizer = word_tokenizer("<s>")
    stream = token_stream(source_of(rows), tokenizer, "train", limit=LIMIT)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(source_of(rows), "train")]
    flat = [token for document in wanted for token in document]
    assert len(stream) == len(flat) and list(stream) == flat and stream[3:50:2] == flat[3:50:2]
    assert stream[-1] == flat[-1] and stream[7] == flat[7]
    bounds = stream.starts.tolist()
    assert [stream[start:end] for start, end in zip(bounds, bounds[1:])] == wanted
    assert stream.mask(0, 5) is None and stream.bos
    with pytest.raises(IndexError):
        stream[len(stream)]
    joined = Joined([stream, [], stream])
    assert len(joined) == 2 * len(flat) and joined[len(flat) - 9 : len(flat) + 9] == flat[-9:] + flat[:9]
    assert joined[len(flat)] == flat[0] and joined[-1] == flat[-1]


def test_the_limit_cuts_at_a_batch_of_documents(rows: Path) -> None:
    tokenizer = word_tokenizer("<s>")
    whole = token_stream(source_of(rows), tokenizer, "train", limit=LIMIT)
    ends = whole.starts.tolist()
    for limit in (1, ends[BATCH], ends[BATCH] + 1, ends[5 * BATCH] - 1, LIMIT):
        short = token_stream(source_of(rows), tokenizer, "train", limit=limit)
        assert short.folder == whole.folder  # what was read further serves
        expected = next((ends[at] for at in range(BATCH, len(ends), BATCH) if ends[at] >= limit), ends[-1])
        assert len(short) == expected and list(short) == whole[:expected]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were tokenised, and not found."""
    made: list[str] = []
    real = tokens._tokenise
    monkeypatch.setattr(
        tokens, "_tokenise", lambda f, k, source, *a, **o: made.append(source.label) or real(f, k, source, *a, **o)
    )
    return made


def test_found_again_by_content_alone(rows: Path, counted: list[str], tmp_path: Path) -> None:
    def stream(path: Path = rows, tokenizer: Any = None, **settings: Any) -> Any:
        return token_stream(source_of(path, **settings), tokenizer or word_tokenizer("<s>"), "train", limit=LIMIT)

    first = stream()
    assert stream(weight=5, name="other").folder == first.folder and len(counted) == 1
    used = word_tokenizer("<s>")
    used("a b c", padding="max_length", max_length=9, truncation=True) if used.pad_token else used(
        "a", truncation=True, max_length=2
    )
    assert stream(tokenizer=used).folder == first.folder and len(counted) == 1
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(rows.read_bytes())
    assert stream(copy).folder == first.folder and len(counted) == 1
    copy.write_text(copy.read_text().replace("row 399", "ROW 399"))
    assert stream(copy).folder != first.folder and len(counted) == 2
    larger = word_tokenizer("<s>")
    larger.add_tokens(["row"])
    assert stream(tokenizer=larger).folder != first.folder and len(counted) == 3


def test_read_further_when_more_is_wanted(rows: Path, counted: list[str]) -> None:
    short = token_stream(source_of(rows), word_tokenizer(None), "train", limit=10)
    longer = token_stream(source_of(rows), word_tokenizer(None), "train", limit=2000)
    assert len(counted) == 2 and longer.folder != short.folder and longer[: len(short)] == list(short)
    again = token_stream(source_of(rows), word_tokenizer(None), "train", limit=10)
    assert len(counted) == 2 and list(again) == list(short)


def test_workers_change_nothing(rows: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        cache = tmp_path / f"cache {workers}"
        stream = token_stream(source_of(rows), word_tokenizer("<s>"), "train", limit=1500, workers=workers, cache=cache)
        found.append([(stream.folder / name).read_bytes() for name in ("tokens.bin", "starts.bin", "meta.json")])
    assert found[0] == found[1]


def test_a_failure_that_lies_beyond_the_limit_is_not_met(rows: Path, tmp_path: Path) -> None:
    """With workers documents are read ahead; what goes wrong there counts when its turn comes."""

    def documents() -> Any:
        yield from ["some words here"] * (3 * BATCH)
        raise InputError("broken")

    for workers in (1, 2):
        batches = tokens.encoded(documents(), word_tokenizer(None), chat=False, workers=workers)
        assert [len(next(batches)) for _ in range(3)] == [BATCH] * 3
        with pytest.raises(InputError, match="broken"):
            next(batches)


def fails_after(count: int, error: BaseException) -> Callable[..., None]:
    real, calls = TokenWriter.add, [0]

    def add(self: TokenWriter, *args: Any) -> None:
        calls[0] += 1
        if calls[0] > count:
            raise error
        real(self, *args)

    return add


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            WorkError,
            "data.cache: .*No space left on device; free some",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_half_a_file_is_never_found(
    rows: Path, token_cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: Any, message: str | None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "add", fails_after(40, error))
        with pytest.raises(seen, match=message):
            token_stream(source_of(rows), word_tokenizer(None), "train", limit=LIMIT)
    assert [path.name for path in token_cache.iterdir() if not path.name.endswith(".lock")] == []
    key = tokens._key(source_of(rows), word_tokenizer(None), "train")
    (token_cache / f".{key}.partial").mkdir()  # as a kill leaves it
    (token_cache / f".{key}.partial" / "tokens.bin").write_bytes(b"half of it")
    assert len(token_stream(source_of(rows), word_tokenizer(None), "train", limit=LIMIT)) > 1000


def test_a_cache_that_cannot_be_written(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="data.cache: .*; set data.cache to a folder that can be written"):
        token_stream(source_of(rows), word_tokenizer(None), "train", limit=9, cache=tmp_path / "file")


def test_two_at_once_tokenise_once(rows: Path, counted: list[str]) -> None:
    """As the processes of one machine do when training starts."""
    tokenizers = [word_tokenizer("<s>") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        streams = list(
            pool.map(lambda tokenizer: token_stream(source_of(rows), tokenizer, "train", limit=LIMIT), tokenizers)
        )
    assert len(counted) == 1 and len({stream.folder for stream in streams}) == 1
    assert list(streams[3]) == list(streams[0])


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    """A gigabyte of tokens (a file with a hole) is opened and read from in a few kilobytes of memory."""
    writer = TokenWriter(tmp_path / "key-9", masked=False)
    writer.add(np.arange(4, dtype=np.int32))
    writer.close({"complete": True, "bos": True})
    count = 1 << 28
    with (tmp_path / "key-9" / "tokens.bin").open("r+b") as file:
        file.truncate(4 * count)
    (tmp_path / "key-9" / "starts.bin").write_bytes(np.array([0, count], "<i8").tobytes())
    meta = json.loads((tmp_path / "key-9" / "meta.json").read_text())
    (tmp_path / "key-9" / "meta.json").write_text(json.dumps(meta | {"tokens": count}))
    tracemalloc.start()
    stream = TokenStream(tmp_path / "key-9", count)
    assert len(stream) == count and stream[1:4] == [1, 2, 3] and stream[count - 5 :] == [0] * 5
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
