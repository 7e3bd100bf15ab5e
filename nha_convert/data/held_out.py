"""Held-out text: what no stage trains on, the same documents at every sequence length."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..recipe import Recipe, SourceSettings
from .stage_data import recall_generator
from .token_file import TokenStream
from .tokens import token_stream

LEAST_HELD_OUT = 65_536
"""Held-out tokens that are read for the recall evaluation's filler even where fewer are scored."""


def _text_sources(recipe: Recipe) -> list[SourceSettings]:
    return [source for source in recipe.data.sources if source.source != "recall"]


def _streams(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, quiet: bool) -> list[TokenStream]:
    """The held-out tokens of each text source."""
    data = recipe.data
    limit = max(LEAST_HELD_OUT, data.held_out_tokens)
    return [
        token_stream(source, tokenizer, "held_out", limit=limit, quiet=quiet, workers=data.workers, cache=data.cache)
        for source in _text_sources(recipe)
    ]


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: int, quiet: bool) -> list[int]:
    """Held-out tokens of all text sources, each with its weight's share."""
    sources = _text_sources(recipe)
    weight = sum(source.weight for source in sources)
    ids: list[int] = []
    for source, stream in zip(sources, _streams(recipe, tokenizer, quiet)):
        ids += stream[: round(wanted * source.weight / weight)]
    return ids


def recall_filler(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True) -> list[int]:
    """Held-out token ids that fill the gaps of the recall evaluation's prompts."""
    return _held_out(recipe, tokenizer, max(LEAST_HELD_OUT, recipe.data.held_out_tokens), quiet)


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
    recall = None
    if share:
        filler = recall_filler(recipe, tokenizer, quiet=quiet)
        recall = recall_generator(tokenizer, filler, recipe.data.sources)
        recall.rng.seed(f"{recipe.seed}/held out")
    streams = _streams(recipe, tokenizer, quiet)
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
