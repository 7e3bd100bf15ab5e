"""The items of a recipe's stages: which sources a stage reads, how far, and as what."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..recall_documents import RecallGenerator
from ..recipe import Recipe, SourceSettings
from .rows import PackedDataset
from .token_file import Joined, TokenStream
from .tokens import token_stream
from .windows import Stream, WindowDataset

LEAST_LIMIT = 4_000_000
"""Tokens that a source is read up to even where the stages use fewer: small corpora are taken whole."""


def recall_generator(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], sources: Sequence[SourceSettings]
) -> RecallGenerator:
    """What makes the recall documents of these sources; of several, each in its share.

    Raises:
        InputError: the tokenizer has too few words, or there is too little filler.
    """
    recall = [source for source in sources if source.source == "recall"]
    weight = sum(source.weight for source in recall)
    far = sum(source.weight * source.far for source in recall) / weight if recall else 0.0
    try:
        return RecallGenerator(tokenizer, filler, far=far)
    except ValueError as error:
        raise InputError(f"data.sources: {error}") from error


def source_limit(recipe: Recipe, source: SourceSettings) -> int:
    """Tokens that a source is read up to: its share of what all stages take."""
    wanted = 0.0
    for stage in recipe.stages:
        sources = recipe.data.of_stage(stage.sources)
        if source in sources:
            wanted += stage.tokens * source.weight / sum(one.weight for one in sources)
    return max(LEAST_LIMIT, math.ceil(wanted))


def train_stream(
    recipe: Recipe, source: SourceSettings, tokenizer: PreTrainedTokenizerBase, quiet: bool
) -> TokenStream:
    """A source's tokens to train on.

    Raises:
        InputError, WorkError: as `token_stream`.
    """
    return token_stream(
        source,
        tokenizer,
        "train",
        limit=source_limit(recipe, source),
        quiet=quiet,
        workers=recipe.data.workers,
        cache=recipe.data.cache,
    )


def training_dataset(
    recipe: Recipe, stage_index: int, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True
) -> WindowDataset | PackedDataset:
    """All items of one stage, in the order they are trained on: `steps * batch_size` of them.

    Raises:
        InputError: a source has fewer tokens than one window, none that the assistant said, or recall is asked of a
            tokenizer without words.
        WorkError: a remote source could not be read to its end.
    """
    stage = recipe.stages[stage_index]
    sources = recipe.data.of_stage(stage.sources)
    streams: list[tuple[float, Stream]] = []
    for source in sources:
        stream = None if source.source == "recall" else train_stream(recipe, source, tokenizer, quiet)
        if stream is not None:
            _check_enough(recipe, stage_index, source, stream)
        streams.append((source.weight, stream))
    common = {
        "length": stage.steps * stage.batch_size,
        "sequence_length": stage.sequence_length,
        "bos": tokenizer.bos_token_id,
        "recall": None,
        "seed": (recipe.seed, stage_index),
    }
    if any(stream is None for _, stream in streams):
        texts = [stream for _, stream in streams if stream is not None]
        if not texts:  # a stage of recall alone: the other stages' text fills its gaps
            others = [source for source in recipe.data.sources if source.source != "recall"]
            texts = [train_stream(recipe, source, tokenizer, quiet) for source in others]
        common["recall"] = recall_generator(tokenizer, Joined(texts), sources)
    if recipe.data.packing == "windows":
        return WindowDataset(streams, **common)
    padding = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    return PackedDataset(streams, padding=padding, **common)


def _check_enough(recipe: Recipe, stage_index: int, source: SourceSettings, stream: TokenStream) -> None:
    length, named = recipe.stages[stage_index].sequence_length, source.path or source.source
    if not len(stream) or (recipe.data.packing == "windows" and len(stream) < length):
        raise InputError(
            f"data.sources: {named} has {len(stream)} tokens to train on, fewer than one "
            f"window (stages.{stage_index}.sequence_length = {length}); give more text"
        )
    if not stream.labelled:
        raise InputError(
            f"data.sources: {named} has no token that the assistant said, so nothing to learn from; conversations "
            "need messages of the role `assistant`"
        )
