"""Training windows and held-out text from a recipe's sources, the same on every run of the same recipe.

Item i of a stage's dataset depends on (seed, stage, i) alone: nothing has to be replayed to resume, and no
global random state is read. Held-out text never enters a training window: stdlib files by hash, the last
5 % of text files, every 20th row of a dataset.
"""

from __future__ import annotations

import glob
import json
import random
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .corpus import stdlib_texts
from .errors import InputError
from .recall_documents import RecallGenerator
from .recipe import Recipe, SourceSettings

SPLITS = ("train", "held_out")
HELD_OUT_EVERY = 20
"""One row in so many of a dataset is held out; the same share of the end of text files."""
LEAST_LIMIT = 4_000_000
"""Tokens that a source is read up to even where the stages use fewer: small corpora are taken whole."""
LEAST_HELD_OUT = 65_536
"""Held-out tokens that are read for the recall evaluation's filler even where fewer are scored."""

_streams: WeakKeyDictionary[Any, dict[tuple[Any, ...], array[int]]] = WeakKeyDictionary()


# ---- texts ---------------------------------------------------------------------------------------
def texts(source: SourceSettings, split: str) -> Iterable[str]:
    """The documents of one split of a source of text, in a fixed order.

    Args:
        source: `stdlib`, `text` or `dataset`; recall documents are made, not read.
        split: `train` or `held_out`.
    Raises:
        InputError: nothing is found at `source.path`, or it has no such column.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, found {split!r}")
    if source.source == "stdlib":
        return stdlib_texts(split)
    if source.source == "text":
        return _file_texts(str(source.path), split)
    rows = enumerate(_rows(source))
    return (text for index, text in rows if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "held_out"))


def _file_texts(path: str, split: str) -> Iterator[str]:
    """Text files up to 95 % of all their characters, or from there to the end."""
    place = Path(path).expanduser()
    files = sorted(place.rglob("*.txt")) if place.is_dir() else sorted(map(Path, glob.glob(str(place), recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files:
        raise InputError(f"data.sources: no text found at {path!r}; give a file, a glob or a folder of .txt files")
    pages = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    total = sum(map(len, pages))
    boundary, start = total - total // HELD_OUT_EVERY, 0
    for page in pages:
        cut = min(max(boundary - start, 0), len(page))
        part = page[:cut] if split == "train" else page[cut:]
        start += len(page)
        if part:
            yield part


def _rows(source: SourceSettings) -> Iterator[str]:
    """The text column of a local .jsonl or .parquet file, or of a Hub dataset (streamed)."""
    path = str(source.path)
    place = Path(path).expanduser()
    rows: Iterable[dict[str, Any]]
    if place.is_file():
        if place.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"data.sources: {path}: a .jsonl or .parquet file is needed; for plain text: source: text")
        rows = _jsonl(place) if place.suffix == ".jsonl" else _parquet(place)
    else:
        rows = _hub(path, source.split)
    for row in rows:
        if source.column not in row:
            raise InputError(
                f"data.sources: {path} has no column {source.column!r}; its columns: {', '.join(map(str, row))}; "
                "set `column`"
            )
        yield str(row[source.column] or "")


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data.sources: {path}:{number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise InputError(f"data.sources: {path}:{number}: an object is needed, found {type(row).__name__}")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise InputError(f"data.sources: {path}: not a parquet file ({error})") from error
    for batch in file.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.sources: dataset {name!r} (split {split!r}) is neither a local file nor readable from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


# ---- tokens --------------------------------------------------------------------------------------
def token_stream(
    source: SourceSettings, tokenizer: PreTrainedTokenizerBase, split: str, *, limit: int, quiet: bool = True
) -> array[int]:
    """The tokens of one split of a source, documents one after the other without special tokens.

    Args:
        limit: stop after the document that reaches this many tokens.
        quiet: no progress bar.
    Returns:
        int32 token ids; kept in memory as long as the tokenizer lives, so it is tokenised once.
    """
    kept = _streams.setdefault(tokenizer, {})
    key = (source.source, source.path, source.split, source.column, split, limit)
    if key not in kept:
        ids = array("i")
        documents = iter(texts(source, split))
        with tqdm(desc=f"tokens of {source.source}", unit_scale=True, disable=True if quiet else None) as bar:
            while len(ids) < limit and (batch := list(islice(documents, 16))):
                for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                    ids.extend(row)
                bar.update(len(ids) - bar.n)
        kept[key] = ids
    return kept[key]


def _text_sources(recipe: Recipe) -> list[SourceSettings]:
    return [source for source in recipe.data.sources if source.source != "recall"]


def _train_limit(recipe: Recipe) -> int:
    return max(LEAST_LIMIT, sum(stage.tokens for stage in recipe.stages))


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: int, quiet: bool) -> list[int]:
    """Held-out tokens of all text sources, each with its weight's share."""
    sources = _text_sources(recipe)
    weight = sum(source.weight for source in sources)
    limit = max(LEAST_HELD_OUT, recipe.data.held_out_tokens)
    ids: list[int] = []
    for source in sources:
        share = round(wanted * source.weight / weight)
        ids += token_stream(source, tokenizer, "held_out", limit=limit, quiet=quiet)[:share]
    return ids


def held_out_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True) -> torch.Tensor:
    """What no stage trains on, mixed as the sources are: evaluation windows of text and of recall documents.

    Text alone hardly asks a small model for its memory; the recall windows do, at their source's weight.

    Returns:
        int64 [N], N = `data.held_out_tokens`, or fewer where the sources' held-out part is smaller.
    Raises:
        InputError: there is less than one evaluation window of it, or recall is asked of a tokenizer without words.
    """
    length, wanted = recipe.evaluate.sequence_length, recipe.data.held_out_tokens
    text = _held_out(recipe, tokenizer, wanted, quiet)
    if len(text) < length:
        raise InputError(
            f"data.held_out_tokens: evaluate.sequence_length = {length} tokens of held-out "
            f"text are needed, found {len(text)}; give more text (5 % of it is held out) or raise data.held_out_tokens"
        )
    total = sum(source.weight for source in recipe.data.sources)
    share = sum(source.weight for source in recipe.data.sources if source.source == "recall") / total
    sources = _text_sources(recipe)
    if not share and len(sources) == 1:
        return torch.tensor(text, dtype=torch.long)
    size = length - 1  # what `eval_windows` takes at a time, after BOS
    recall = _recall_generator(tokenizer, recall_filler(recipe, tokenizer, quiet=quiet)) if share else None
    if recall is not None:
        recall.rng.seed(f"{recipe.seed}/held out")
    limit = max(LEAST_HELD_OUT, wanted)
    streams = [token_stream(source, tokenizer, "held_out", limit=limit, quiet=quiet) for source in sources]
    taken = [0] * len(sources)
    ids: list[int] = []
    for window in range(max(1, wanted // size)):
        if recall is not None and int((window + 1) * share) > int(window * share):
            ids += recall.document(size).input_ids
            continue
        turn = min(range(len(sources)), key=lambda index: (taken[index] + 1) / sources[index].weight)
        start = taken[turn] * size
        if start + size > len(streams[turn]):
            break  # less text than was asked for: the mix stays as the weights say
        ids += streams[turn][start : start + size]
        taken[turn] += 1
    if not any(taken):
        raise InputError(
            f"data.sources: the held-out part of a text source is shorter than one evaluation window of {length} "
            "tokens; give more text (5 % of it is held out) or lower evaluate.sequence_length"
        )
    return torch.tensor(ids, dtype=torch.long)


def _recall_generator(tokenizer: PreTrainedTokenizerBase, filler: Sequence[int]) -> RecallGenerator:
    try:
        return RecallGenerator(tokenizer, filler)
    except ValueError as error:
        raise InputError(f"data.sources: {error}") from error


def recall_filler(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True) -> list[int]:
    """Held-out token ids that fill the gaps of the recall evaluation's prompts."""
    return _held_out(recipe, tokenizer, max(LEAST_HELD_OUT, recipe.data.held_out_tokens), quiet)


# ---- windows -------------------------------------------------------------------------------------
class WindowDataset(Dataset):
    """Windows of T tokens, BOS first where the tokenizer has one; item i depends on (seed, stage, i) alone.

    Args:
        streams: (weight, tokens) per source; None as tokens draws a recall document.
        length: items.
        sequence_length: T.
        bos: id put in front of every window, or None.
        recall: makes the recall documents; needed where a stream is None.
        seed: anything with a fixed repr; drawn from together with the item's number.
    """

    def __init__(
        self,
        streams: list[tuple[float, array[int] | None]],
        *,
        length: int,
        sequence_length: int,
        bos: int | None,
        recall: RecallGenerator | None,
        seed: object,
    ) -> None:
        self.streams = [stream for _, stream in streams]
        self.bounds = list(accumulate(weight for weight, _ in streams))
        self.length, self.sequence_length, self.seed = length, sequence_length, seed
        self.prefix = [] if bos is None else [bos]
        self.recall = recall

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, both int64 [T]."""
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = random.Random(f"{self.seed!r}/{index}")
        stream = self.streams[bisect(self.bounds[:-1], rng.random() * self.bounds[-1])]
        count = self.sequence_length - len(self.prefix)
        if stream is None:
            assert self.recall is not None
            self.recall.rng = rng
            ids = self.recall.document(count).input_ids
        else:
            start = rng.randrange(len(stream) - count + 1)
            ids = stream[start : start + count].tolist()
        input_ids = torch.tensor(self.prefix + ids, dtype=torch.long)  # [T]
        return {"input_ids": input_ids, "labels": input_ids.clone()}


def training_dataset(
    recipe: Recipe, stage_index: int, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True
) -> WindowDataset:
    """All windows of one stage, in the order they are trained on: `steps * batch_size` of them.

    Raises:
        InputError: a source has fewer tokens than one window, or recall is asked of a tokenizer without words.
    """
    stage = recipe.stages[stage_index]
    limit = _train_limit(recipe)
    streams: list[tuple[float, array[int] | None]] = []
    for source in recipe.data.sources:
        if source.source == "recall":
            streams.append((source.weight, None))
            continue
        stream = token_stream(source, tokenizer, "train", limit=limit, quiet=quiet)
        if len(stream) < stage.sequence_length:
            raise InputError(
                f"data.sources: {source.path or source.source} has {len(stream)} tokens to train on, fewer than one "
                f"window (stages.{stage_index}.sequence_length = {stage.sequence_length}); give more text"
            )
        streams.append((source.weight, stream))
    recall = None
    if any(stream is None for _, stream in streams):
        filler = array("i")
        for _, tokens in streams:
            filler.extend(tokens or ())
        recall = _recall_generator(tokenizer, filler)
    return WindowDataset(
        streams,
        length=stage.steps * stage.batch_size,
        sequence_length=stage.sequence_length,
        bos=tokenizer.bos_token_id,
        recall=recall,
        seed=(recipe.seed, stage_index),
    )
