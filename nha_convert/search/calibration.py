"""The text that layers are measured on: what a recipe trains on, and recall documents filled with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.stage_data import recall_generator, train_stream
from ..data.token_file import Joined
from ..data.windows import Stream, WindowDataset
from ..errors import InputError
from ..recall_documents import RecallDocument
from ..recipe import Recipe


@dataclass(frozen=True)
class Calibration:
    """Rows to measure on.

    Attributes:
        tokens: int64 [N * (T - 1)] of text, mixed as the recipe's sources are; a row is BOS and T - 1 of them.
        length: T.
        bos: id in front of every row, or None.
        documents: recall documents of T - 1 tokens; none where they were not asked for.
    """

    tokens: Tensor
    length: int
    bos: int | None
    documents: list[RecallDocument]

    @property
    def rows(self) -> Tensor:
        """int64 [N, T], or [N, T - 1] without BOS."""
        rows = self.tokens.view(-1, self.length - 1)
        return rows if self.bos is None else torch.cat((rows.new_full((len(rows), 1), self.bos), rows), 1)

    def questions(self, nearest: int) -> list[tuple[list[int], list[int]]]:
        """Documents with BOS, and the places in them of answers that were stated more than `nearest` tokens before.

        Raises:
            InputError: there are none.
        """
        lead = [] if self.bos is None else [self.bos]
        asked = [(lead + one.input_ids, _answers(one, nearest, len(lead))) for one in self.documents]
        asked = [(ids, places) for ids, places in asked if places]
        if not asked:
            raise InputError(
                f"search.sequence_length: rows of {self.length} tokens hold no answer stated more than {nearest} "
                "tokens before; raise it or search.tokens, or lower nha.window"
            )
        return asked


def calibration_text(
    recipe: Recipe, tokenizer: Any, context: int, *, with_recall: bool = False, quiet: bool = True
) -> Calibration:
    """Text of the sources' training part; it depends on the recipe and its seed alone.

    Args:
        recipe: its `data`, `search`, `evaluate.sequence_length` and `seed` are read.
        context: positions that the model was trained for; rows are no longer.
        with_recall: make recall documents, too: half as many as rows of text, at least 4.
    Raises:
        InputError: a source has fewer tokens than a row, or recall is asked of a tokenizer without words.
        WorkError: a remote source could not be read to its end.
    """
    length = min(recipe.search.sequence_length or recipe.evaluate.sequence_length, context)
    rows = max(1, recipe.search.tokens // length)
    streams: list[tuple[float, Stream]] = []
    for source in recipe.data.sources:
        stream = None if source.source == "recall" else train_stream(recipe, source, tokenizer, quiet)
        if stream is not None and len(stream) < length:
            raise InputError(
                f"data.sources: {source.path or source.source} has {len(stream)} tokens to train on, and a search reads"
                f" rows of {length}; give more text or lower search.sequence_length"
            )
        streams.append((source.weight, stream))
    texts = [stream for _, stream in streams if stream is not None]
    recall = None
    if with_recall or len(texts) < len(streams):
        recall = recall_generator(tokenizer, Joined(texts), recipe.data.sources)
    dataset = WindowDataset(
        streams, length=rows, sequence_length=length - 1, bos=None, recall=recall, seed=(recipe.seed, "search")
    )
    tokens = torch.cat([dataset[index]["input_ids"] for index in range(rows)])
    documents = []
    if with_recall and recall is not None:
        recall.rng.seed(f"{recipe.seed}/search/recall")
        documents = [recall.document(length - 1) for _ in range(max(4, rows // 2))]
    return Calibration(tokens, length, tokenizer.bos_token_id, documents)


def _answers(document: RecallDocument, nearest: int, lead: int) -> list[int]:
    """Places of the tokens of answers stated more than `nearest` tokens before, `lead` tokens in front."""
    spans = zip(document.answers, document.distances)
    return [lead + place for (start, end), distance in spans if distance > nearest for place in range(start, end)]
