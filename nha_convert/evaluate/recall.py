"""Recall by generation: a value stated far back is asked for, and only the exact answer counts.

Legend: N prompts, P tokens of a prompt, A tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from nha_convert.devices import input_device
from nha_convert.evaluate.nll import evaluating
from nha_convert.evaluate.recall_tasks import TOKENS_PER_STATEMENT, AssociativeRecall, RecallTask, TaskGenerator
from nha_convert.recall_documents import RecallDocument

PROMPT_BUDGET = 16384
"""Prompt tokens per call of `generate`."""


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (95 % by default) that holds for small counts and near 0 and 1.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def recall_distances(multiples: Sequence[float], window: int, context: int, answer: int) -> tuple[list[int], list[int]]:
    """Distances in tokens, and those that the trained context has no room for.

    A prompt of `context` tokens also holds the asked statement, the answer and something before them, for which
    a sixteenth of the distance (at least 32 tokens) is set aside.

    Args:
        multiples: distances in windows.
        window: tokens of the exact window.
        context: positions the model was trained for.
        answer: tokens of the answer.
    Returns:
        (measured, left out), both in tokens.
    """
    distances = sorted({round(multiple * window) for multiple in multiples if round(multiple * window) > 0})
    fits = [distance for distance in distances if distance + max(32, distance // 16) + answer <= context]
    return fits, [distance for distance in distances if distance not in fits]


def prompt_span(distance: int, pairs: int, span: int) -> int:
    """Tokens of a prompt: twice the distance, room for all pairs, at most `span`."""
    return min(span, max(2 * distance, TOKENS_PER_STATEMENT * pairs))


def recall_by_generation(
    model: Any,
    tokenizer: Any,
    filler: Sequence[int],
    *,
    distances: Sequence[int],
    pairs: int = 16,
    prompts: int = 32,
    span: int = 1024,
    value_length: int = 1,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Exact-match recall of one value among `pairs`, by greedy generation with the model's cache.

    The prompts of one distance have equal length and go through all surface forms in turn, so models asked with
    the same seed and filler are asked the same questions.

    Args:
        tokenizer: gives the words; its BOS, if it has one, stands in front of every prompt.
        filler: ids of ordinary text between the statements; none of it trained on.
        distances: tokens from the end of the asked statement to the end of the question.
        span: longest prompt allowed, in tokens without BOS and answer.
        value_length: tokens of a value; all of them have to be right.
    Returns:
        distance -> {"exact_match", "low", "high" (Wilson, 95 %), "prompts", "span"}; where `pairs` statements do
        not fit, {"left_out": reason} instead.
    """
    task = AssociativeRecall(pairs=pairs, queries=1, value_length=value_length)
    return ask_task(
        model, tokenizer, filler, task, distances=distances, prompts=prompts, span=span, seed=seed, quiet=quiet
    )


def ask_task(
    model: Any,
    tokenizer: Any,
    filler: Sequence[int],
    task: RecallTask,
    *,
    distances: Sequence[int],
    prompts: int = 32,
    span: int = 1024,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Exact match of a task's answers, by greedy generation with the model's cache.

    The prompts of one distance have equal length. Models asked with the same tokenizer, filler and seed are asked the
    same questions.

    Args:
        tokenizer, filler: as `recall_by_generation`.
        distances: tokens from the end of what has to be remembered to the end of the question.
        prompts: questions per distance.
        span: longest prompt allowed, in tokens without BOS and answer.
    Returns:
        distance -> {"exact_match", "low", "high" (Wilson, 95 %), "prompts", "span"}; where the task does not fit,
        {"left_out": reason} instead.
    """
    results: dict[str, dict[str, Any]] = {}
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    with (
        evaluating(model),
        tqdm(total=prompts * len(distances), desc="recall", leave=False, disable=True if quiet else None) as bar,
    ):
        for distance in distances:
            try:
                generator = TaskGenerator(tokenizer, filler, seed=seed + distance)
                length, documents = task_documents(generator, task, distance, prompts, span)
            except ValueError as error:
                results[str(distance)] = {"left_out": str(error)}
                bar.update(prompts)
                continue
            ids = torch.tensor([lead + document.input_ids for document in documents])  # [N,P+A]
            hits = _exact_matches(model, tokenizer, ids, task.answer, bar)
            low, high = wilson_interval(hits, prompts)
            results[str(distance)] = {
                "exact_match": hits / prompts,
                "low": low,
                "high": high,
                "prompts": prompts,
                "span": length,
            }
    return results


def task_documents(
    generator: TaskGenerator, task: RecallTask, distance: int, prompts: int, span: int
) -> tuple[int, list[RecallDocument]]:
    """Documents of one distance and their common length: the shortest tried, up to `span`, that the task fits into.

    Raises:
        ValueError: it does not even fit into `span`.
    """
    start = generator.rng.getstate()
    length = prompt_span(distance, task.statements, span)
    while True:
        generator.rng.setstate(start)
        try:
            return length, [task.document(generator, distance, length, index) for index in range(prompts)]
        except ValueError:
            if length >= span:
                raise
            length = min(span, 2 * length)


def _exact_matches(model: Any, tokenizer: Any, ids: Tensor, answer: int, bar: Any) -> int:
    """Prompts whose last `answer` tokens the model generates exactly; ids [N,P+A]."""
    settings = _greedy(tokenizer, answer)
    batch = max(1, PROMPT_BUDGET // ids.shape[1])
    hits = 0
    for rows in ids.split(batch):
        rows = rows.to(input_device(model))
        prompt, expected = rows[:, :-answer], rows[:, -answer:]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)  # [B,<=P+A]
        generated = output[:, prompt.shape[1] :]
        if generated.shape == expected.shape:  # shorter only if every row ended early, and so none is right
            hits += int((generated == expected).all(-1).sum())
        bar.update(len(rows))
    return hits


def _greedy(tokenizer: Any, answer: int) -> GenerationConfig:
    """Plain greedy decoding whatever the model's own generation settings say (Qwen2.5 has a repetition penalty)."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=answer,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=padding if padding is not None else 0,
    )
