"""Streams from an HTTP server on this machine: read once, as far as needed, and never cut short in silence."""

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from made_text import make_recipe, word_tokenizer

from nha_convert.data import held_out_tokens, texts, token_stream, training_dataset
from nha_convert.errors import WorkError
from nha_convert.recipe import SourceSettings

pytest.importorskip("aiohttp")


@dataclass
class Server:
    """What is served, whose content was asked for, and where the connection breaks off.

    Attributes:
        broken: name -> bytes after which the connection is closed, whatever length was promised.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    served = Server("")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            if self.headers.get("Range"):  # without, only the file's size is looked at
                served.asked.append(self.path[1:])
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            body = served.files.get(self.path[1:])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if with_body and body is not None:
                try:
                    self.wfile.write(body[: served.broken.get(self.path[1:], len(body))])
                    if self.path[1:] in served.broken:
                        self.close_connection = True
                except OSError:
                    pass  # the reader has enough

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        served.url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield served
        running.shutdown()


def shards(form: str, count: int = 3, rows: int = 400) -> dict[str, bytes]:
    """Rows with their numbers, in files of their own."""
    made = {}
    for shard in range(count):
        texts = [f"row {shard * rows + number} " * 4 for number in range(rows)]
        if form == "jsonl":
            made[f"{shard}.jsonl"] = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        else:
            buffer = io.BytesIO()
            datasets.Dataset.from_dict({"text": texts}).to_parquet(buffer)
            made[f"{shard}.parquet"] = buffer.getvalue()
    return made


def source_of(server: Server, form: str) -> dict[str, Any]:
    files = [f"{server.url}/{name}" for name in sorted(server.files)]
    return {"source": "dataset", "path": "json" if form == "jsonl" else form, "data_files": files}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_stream_is_read_whole_and_in_order(server: Server, form: str) -> None:
    server.files = shards(form)
    wanted = [f"row {number} " * 4 for number in range(1200)]
    source = SourceSettings.model_validate(source_of(server, form))
    assert list(texts(source, "held_out")) == wanted[19::20]
    assert list(texts(source, "train")) == [row for row in wanted if row not in set(wanted[19::20])]
    one = SourceSettings(source="dataset", path=f"{server.url}/1.{form}")
    assert list(texts(one, "held_out")) == wanted[419:800:20]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_resumed_run_replays_nothing(server: Server, form: str) -> None:
    """The tokens were kept, so the second process asks for no content and gets the same items."""
    server.files = shards(form)
    recipe = make_recipe([source_of(server, form)], packing="documents", held_out_tokens=500)
    runs = []
    asked = []
    for _ in range(2):
        tokenizer = word_tokenizer("<s>")
        dataset = training_dataset(recipe, 0, tokenizer)
        runs.append([*(dataset[index]["input_ids"] for index in range(64)), held_out_tokens(recipe, tokenizer)])
        asked.append(len(server.asked))
    assert all(map(torch.equal, *runs)) and asked[0] == asked[1] > 0


def test_a_stream_is_read_as_far_as_it_is_needed(server: Server) -> None:
    server.files = shards("jsonl", count=4, rows=2000)
    source = SourceSettings.model_validate(source_of(server, "jsonl"))
    stream = token_stream(source, word_tokenizer(None), "train", limit=3000)
    assert 3000 <= len(stream) < 6000
    assert set(server.asked) == {"0.jsonl"}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("at", ["a line's end", "the middle"])
def test_a_shard_that_fails_midway_is_named(server: Server, form: str, at: str, token_cache: Path) -> None:
    server.files = shards(form)
    body = server.files[f"1.{form}"]
    server.broken[f"1.{form}"] = body.index(b"\n", len(body) // 2) + 1 if at == "a line's end" else len(body) // 2
    recipe = make_recipe([source_of(server, form)], packing="documents")
    with pytest.raises(WorkError, match=rf"data.sources: {server.url}/1.{form}: could not be read to its end"):
        training_dataset(recipe, 0, word_tokenizer(None))
    assert not [path for path in token_cache.glob("*") if (path / "tokens.bin").exists()]
    server.broken.clear()
    dataset = training_dataset(recipe, 0, word_tokenizer(None))
    assert dataset.sources[0] is not None and len(dataset.sources[0].stream.starts) == 1140 + 1


def test_a_file_that_is_not_there(server: Server) -> None:
    server.files = shards("jsonl")
    source = source_of(server, "jsonl")
    source["data_files"].append(f"{server.url}/9.jsonl")
    with pytest.raises(WorkError, match="9.jsonl"):
        list(texts(SourceSettings.model_validate(source), "train"))
