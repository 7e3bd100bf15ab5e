"""Documents and score of the recall tasks for lm-evaluation-harness, which loads this file by its path.

The same generators as `evaluate.tasks` make the documents, from the model's own tokenizer and a text file, or the text
of this machine's Python standard library; nothing is downloaded. The harness passes text, not ids, so a tokenizer that
joins pieces across the places where lines were put moves a distance by a few tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

import nha_convert.modeling  # noqa: F401  (registers the NHA classes)
from nha_convert.corpus import stdlib_texts
from nha_convert.evaluate.recall import recall_distances, task_documents
from nha_convert.evaluate.recall_tasks import RecallTask, TaskGenerator, tasks_named

DISTANCES = (0.5, 1, 2, 4, 8, 16, 32)
"""In windows; each has its metric in _nha_recall_common_yaml."""
PAIRS = (4, 8, 16, 32, 64, 128)
"""Keys of `mqar`; each has its metric, too."""
FILLER = 65_536
"""Tokens of text that documents are filled from."""
SPARE = 48
"""Positions kept free for the answer, and for what encoding the text anew may add."""


def filler_of(tokenizer: Any, text_file: str | None = None) -> list[int]:
    """Ids of a text file, or of the held-out part of the standard library.

    Raises:
        ValueError: the file cannot be read as UTF-8 text.
    """
    try:
        texts = [Path(text_file).read_text(encoding="utf-8")] if text_file else stdlib_texts("held_out")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"nha_recall: text {text_file}: cannot be read as UTF-8 text ({error}); name a file"
        ) from error
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= FILLER:
            break
    return ids[:FILLER]


def documents(
    name: str,
    *,
    pretrained: Any = None,
    tokenizer: Any = None,
    window: int = 64,
    context: int | None = None,
    distances: Sequence[float] = DISTANCES,
    pairs: Sequence[int] = PAIRS,
    prompts: int = 16,
    seed: int = 0,
    text: str | None = None,
    trust_remote_code: bool = False,
    **_: Any,
) -> dict[str, Dataset]:
    """One task's test split.

    Args:
        name: as in `evaluate.tasks`.
        pretrained: the model's name or folder, as in `--model_args`.
        tokenizer: another tokenizer's name or folder, or a tokenizer.
        window: tokens that a distance of 1 stands for; the same for all models that are to be compared.
        context: the longest prompt; the model's positions if None.
        distances: in windows; those that the context has no room for are left out.
        pairs: numbers of keys of `mqar`; those that a distance has no room for are left out.
        prompts: documents per distance (and number of pairs).
        seed: of the documents.
        text: a UTF-8 file that the documents are filled from; the standard library's held-out part if None.
    Returns:
        {"test": rows of "prompt", "answer", "task", "distance" (tokens), "windows", "pairs" (0 but for `mqar`)}.
    Raises:
        ValueError: neither model nor tokenizer is named, the text cannot be read, or nothing fits.
    """
    if pretrained is None and (tokenizer is None or context is None):
        raise ValueError(
            "nha_recall: name the model (--model_args pretrained=...), or tokenizer and context (--metadata)"
        )
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained, trust_remote_code=trust_remote_code)
    if context is None:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
        context = int(config.max_position_embeddings)
    generator = TaskGenerator(tokenizer, filler_of(tokenizer, text))
    rows: list[dict[str, Any]] = []
    for task in tasks_named(name, pairs):
        rows += _rows(task, generator, window, context - SPARE, distances, prompts, seed)
    if not rows:
        raise ValueError(
            f"nha_{name}: nothing fits into {context} positions at distances {distances} x {window} tokens"
        )
    return {"test": Dataset.from_list(rows)}


def _rows(
    task: RecallTask,
    generator: TaskGenerator,
    window: int,
    context: int,
    distances: Sequence[float],
    prompts: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    for multiple in distances:
        for distance in recall_distances([multiple], window, context, task.answer)[0]:
            generator.rng.seed(f"{seed}/{task}/{distance}")
            try:
                _, made = task_documents(generator, task, distance, prompts, context - task.answer)
            except ValueError:  # its statements do not fit at this distance
                continue
            for document in made:
                start, end = document.answers[0]
                prompt, answer = document.input_ids[:start], document.input_ids[start:end]
                yield {
                    "prompt": generator.tokenizer.decode(prompt, clean_up_tokenization_spaces=False),
                    "answer": generator.tokenizer.decode(answer, clean_up_tokenization_spaces=False),
                    "task": task.name,
                    "distance": distance,
                    "windows": float(multiple),
                    "pairs": task.details.get("pairs", 0),
                }


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the text begins with the answer, as whole words; over all, its distance's, and its pairs' documents."""
    hit = float(re.match(rf"{re.escape(doc['answer'].strip())}(?!\w)", results[0].strip()) is not None)
    metrics = {"exact_match": hit}
    if doc["windows"] in DISTANCES:
        metrics[f"exact_match_x{doc['windows']:g}"] = hit
    if doc["pairs"] in PAIRS:
        metrics[f"exact_match_p{doc['pairs']}"] = hit
    return metrics


mqar = partial(documents, "mqar")
needle = partial(documents, "needle")
needle_multikey = partial(documents, "needle_multikey")
needle_multivalue = partial(documents, "needle_multivalue")
variable_tracking = partial(documents, "variable_tracking")
copy = partial(documents, "copy")
