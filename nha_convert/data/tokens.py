"""Tokenises each source once: in parallel, onto disk, under a name made of what is tokenised and how."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from filelock import FileLock
from huggingface_hub import constants
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data_settings import SourceSettings
from ..errors import InputError, WorkError
from .chat import check_template, encode_conversation
from .sources import conversations, identity, texts
from .token_file import BATCH, TokenStream, TokenWriter

FORMAT = 1
"""Counts up when the same source and tokenizer would give other files."""
Encoded = tuple[NDArray[np.int32], NDArray[np.uint8] | None, bool]
"""A document's tokens without BOS, which of them have a loss (None: all), and whether BOS stood in front."""

_opened: WeakKeyDictionary[Any, dict[tuple[Any, ...], TokenStream]] = WeakKeyDictionary()
_digests: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def token_stream(
    source: SourceSettings,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    *,
    limit: int,
    quiet: bool = True,
    workers: int = 1,
    cache: str | Path | None = None,
) -> TokenStream:
    """The tokens of one split of a source, read from the cache or tokenised into it.

    Args:
        split: `train` or `held_out`.
        limit: stop after the 16 documents that reach this many tokens.
        quiet: no progress bar.
        workers: processes that tokenise; what comes out does not depend on their number.
        cache: folder; None is `nha_convert` in the cache of `datasets`.
    Raises:
        InputError: the source is not there or of another form, or the cache cannot be written.
        WorkError: a remote file could not be read to its end, or the disk is full.
    """
    kept = _opened.setdefault(tokenizer, {})
    asked = (source.model_dump_json(exclude={"name", "weight"}), split, limit, str(cache))
    if asked not in kept:
        if source.source == "chat":
            check_template(tokenizer, source.label)
        folder = Path(cache).expanduser() if cache else default_cache()
        key = _key(source, tokenizer, split)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{key}.lock"):
                found = _found(folder, key, limit)
                if found is None:
                    found = _tokenise(folder, key, source, tokenizer, split, limit, quiet=quiet, workers=workers)
        except OSError as error:
            raise _not_written(folder, error) from error
        kept[asked] = TokenStream(found, limit)
    return kept[asked]


def default_cache() -> Path:
    """`nha_convert` in the folder where `datasets` caches."""
    home = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return Path(home).expanduser() / "nha_convert"


def _not_written(folder: Path, error: OSError) -> Exception:
    said = f"data.cache: {error.filename or folder}: {error.strerror or error}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return InputError(f"{said}; set data.cache to a folder that can be written")
    return WorkError(f"{said}; free some space or set data.cache to another folder, and run again with --resume")


# ---- names in the cache ---------------------------------------------------------------------------
def _key(source: SourceSettings, tokenizer: PreTrainedTokenizerBase, split: str) -> str:
    """A name made of the source's contents, the tokenizer and what is taken of each row."""
    parts: list[Any] = [FORMAT, source.source, identity(source, split), tokenizer_digest(tokenizer)]
    if source.source == "dataset":
        parts.append(source.column)
    elif source.source == "chat":
        how = [source.prompt, source.response] if source.prompt else [source.column]
        parts += [how, tokenizer.get_chat_template(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which tokens a text becomes."""
    if tokenizer not in _digests:
        if tokenizer.is_fast:
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state.pop("truncation", None)  # these two are of the last call, not of the tokenizer
            state.pop("padding", None)
        else:
            state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
        text = json.dumps(state, sort_keys=True, default=str)
        _digests[tokenizer] = hashlib.sha256(text.encode()).hexdigest()
    return _digests[tokenizer]


def _found(folder: Path, key: str, limit: int) -> Path | None:
    """A finished folder of this key that was read to its end or at least as far."""
    for path in sorted(folder.glob(f"{key}-*")):
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta["complete"] or meta["tokens"] >= limit:
            return path
    return None


# ---- tokenising -----------------------------------------------------------------------------------
def _tokenise(
    folder: Path,
    key: str,
    source: SourceSettings,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    limit: int,
    *,
    quiet: bool,
    workers: int,
) -> Path:
    """Writes beside and renames; under the key's lock nobody else writes there."""
    chat = source.source == "chat"
    beside, place = folder / f".{key}.partial", folder / f"{key}-{limit}"
    shutil.rmtree(beside, ignore_errors=True)
    documents: Iterable[Any] = conversations(source, split) if chat else texts(source, split)
    writer = TokenWriter(beside, masked=chat)
    complete, bos = True, not chat
    try:
        with tqdm(desc=f"tokens of {source.label}", unit_scale=True, disable=True if quiet else None) as bar:
            for batch in encoded(documents, tokenizer, chat=chat, workers=workers):
                for ids, mask, began in batch:
                    bos = bos or began
                    writer.add(ids, mask)
                bar.update(writer.tokens - bar.n)
                if writer.tokens >= limit:
                    complete = False  # or nobody looked whether anything comes after
                    break
        writer.close({"complete": complete, "bos": bos, "source": source.label, "split": split})
        os.replace(beside, place)
    except BaseException:
        writer.abandon()
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return place


def encoded(
    documents: Iterable[Any], tokenizer: PreTrainedTokenizerBase, *, chat: bool, workers: int
) -> Iterator[list[Encoded]]:
    """Batches of documents as tokens, in the documents' order whatever the number of workers.

    Raises:
        Exception: what reading or encoding a document raises, when its turn has come.
    """
    rest = iter(documents)
    batches = iter(lambda: list(islice(rest, BATCH)), [])
    if workers == 1:
        for batch in batches:
            yield encode(tokenizer, batch, chat)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take locks of the tokenizer's threads along
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(tokenizer, chat)) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        try:
            for result in _submitted(pool, batches):
                waiting.append(result)
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, batches: Iterator[list[Any]]) -> Iterator[Future[list[Encoded]]]:
    """The batches' results to come; a failure to read is the last one, so that it is met in its turn."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            failed: Future[list[Encoded]] = Future()
            failed.set_exception(error)
            yield failed
            return
        yield pool.submit(_encode_in_worker, batch)


def encode(tokenizer: PreTrainedTokenizerBase, batch: list[Any], chat: bool) -> list[Encoded]:
    """The tokens of some documents.

    Args:
        batch: texts, or with `chat` conversations.
    """
    if not chat:
        given = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        return [(np.asarray(ids, np.int32), None, False) for ids in given]
    rows: list[Encoded] = []
    for messages in batch:
        ids, mask = encode_conversation(tokenizer, messages)
        began = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        rows.append((np.asarray(ids[began:], np.int32), np.asarray(mask[began:], np.uint8), began))
    return rows


_worker: tuple[PreTrainedTokenizerBase, bool] | None = None


def _begin(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = tokenizer, chat


def _encode_in_worker(batch: list[Any]) -> list[Encoded]:
    assert _worker is not None
    return encode(_worker[0], batch, _worker[1])
