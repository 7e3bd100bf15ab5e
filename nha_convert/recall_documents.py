"""Documents that can only be predicted by remembering: keys and values, lists, repeated spans.

One generator serves three users: the teacher's training, the distillation data (`source: recall`)
and the recall evaluation. Documents are built from token ids, so a distance is a number of tokens
and an answer is an exact span, whatever the tokenizer. Imports no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# (before key, between key and value, after value) of a statement; (before key, after key) of its question.
# Every key and value is a word with its leading space, so no piece changes how its neighbours tokenise.
TEMPLATES: tuple[tuple[tuple[str, str, str], tuple[str, str]], ...] = (
    (("", " =", "\n"), ("", " =")),
    (("", ":", "\n"), ("", ":")),
    (("", " ->", ";"), ("", " ->")),
    ((" The", " is", "."), (" The", " is")),
    ((" set", " to", "\n"), (" get", " to")),
    ((" The code of", " is", "."), (" What is the code of", "? It is")),
    (("def", "():", "\n"), ("def", "():")),
)
WORD = re.compile(r"[Ġ▁][a-z]{3,12}$")
"""Vocabulary entries that are one lower-case word with its leading space (byte-level BPE or SentencePiece)."""

FAR = 512
"""Tokens beyond which the other kinds seldom ask, however long the document; far documents ask beyond them alone where
they have the room."""


@dataclass
class RecallDocument:
    """Token ids with the spans that recall alone can predict.

    Attributes:
        input_ids: the document, without BOS.
        answers: half-open spans [start, end) of the answers inside `input_ids`.
        distances: for each answer, tokens from the end of its value's last statement to the question's end.
    """

    input_ids: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    distances: list[int] = field(default_factory=list)


class RecallGenerator:
    """Makes recall documents from any tokenizer and any filler text.

    Args:
        tokenizer: a `transformers` tokenizer; its one-token lower-case words become keys and values.
        filler: token ids of ordinary text, cut at random places to fill the gaps.
        seed: everything drawn comes from this.
        far: share of the training documents that state everything before they ask for any of it, `FAR` tokens apart and
            more.
    Raises:
        ValueError: fewer than 64 one-token words in the vocabulary, or too little filler.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[int], seed: int = 0, far: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.filler = filler
        self.far = far
        vocabulary = tokenizer.get_vocab()
        self.words = sorted(index for token, index in vocabulary.items() if WORD.match(token))
        if len(self.words) < 64:
            raise ValueError(
                f"recall needs 64 one-token words in the tokenizer's vocabulary, found {len(self.words)}; "
                "use another tokenizer or leave `source: recall` out"
            )
        if len(filler) < 2048:
            raise ValueError(f"recall needs at least 2048 tokens of filler text, found {len(filler)}")

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

        self._templates = [
            (tuple(encode(piece) for piece in statement), tuple(encode(piece) for piece in question))
            for statement, question in TEMPLATES
        ]
        self._list = (encode("\nlist:"), encode("\nagain:"))
        self._repeat = (encode("\nbegin\n"), encode("\nbegin\n"))
        self._break = encode("\n")

    # ---- pieces ----------------------------------------------------------------------------------
    def text(self, length: int) -> list[int]:
        """`length` filler tokens from a random place."""
        if length <= 0:
            return []
        start = self.rng.randrange(max(1, len(self.filler) - length))
        ids = list(self.filler[start : start + length])
        while len(ids) < length:  # more than there is: the text once more from its beginning
            ids += self.filler[: length - len(ids)]
        return ids

    def _values(self, count: int, length: int) -> list[list[int]]:
        return [[self.rng.choice(self.words) for _ in range(length)] for _ in range(count)]

    # ---- documents -------------------------------------------------------------------------------
    def prompt(
        self,
        *,
        pairs: int,
        distance: int,
        span: int,
        value_length: int = 1,
        template: int | None = None,
        queries: int = 1,
    ) -> RecallDocument:
        """One question at an exact distance, for evaluation by generation.

        Args:
            pairs: keys and values stated, the asked one included.
            distance: tokens from the end of the asked statement to the end of the question.
            span: tokens of the whole document up to the answer; at least `distance` plus one statement.
            value_length: tokens of each value.
            template: index into `TEMPLATES`; None draws one.
            queries: questions asked at the end; all but the last stand answered, as many of them as the distance has
                room for.
        Returns:
            A document that ends with the answer; `answers` holds that one span.
        Raises:
            ValueError: the statements do not fit into `span` at that distance.
        """
        statement, question = self._templates[
            self.rng.randrange(len(self._templates)) if template is None else template
        ]
        if pairs > len(self.words):
            raise ValueError(f"{pairs} pairs need as many one-token words, the vocabulary has {len(self.words)}")
        keys = self.rng.sample(self.words, pairs)
        values = self._values(pairs, value_length)
        lines = [self._line(statement, key, value, statement[2]) for key, value in zip(keys, values)]
        asks = [self._break + question[0] + [key] + question[1] for key in keys]
        size, before = len(lines[0]), span - distance - len(lines[0])
        for earlier in range(min(queries, pairs) - 1, -1, -1):
            end = [piece for one in range(1, 1 + earlier) for piece in asks[one] + values[one] + statement[2]] + asks[0]
            after = distance - len(end)
            fits_before, fits_after = before // size, after // size
            if before >= 0 and after >= 0 and fits_before + fits_after >= pairs - 1:
                break
        else:
            raise ValueError(f"{pairs} pairs of {size} tokens do not fit into span {span} with distance {distance}")
        low, high = max(0, pairs - 1 - fits_after), min(pairs - 1, fits_before)
        count = min(high, max(low, round((pairs - 1) * before / max(1, before + after))))
        return self.place(
            lines[1 : 1 + count], lines[0], lines[1 + count :], end, values[0], distance=distance, span=span
        )

    def place(
        self,
        before: list[list[int]],
        stated: list[int],
        after: list[list[int]],
        ask: list[int],
        answer: list[int],
        *,
        distance: int,
        span: int,
    ) -> RecallDocument:
        """Lines scattered in text around one at an exact distance from the end of the question.

        Args:
            before, after: ids of the lines on either side of `stated`, in order.
            stated: the line from whose end the distance counts.
            ask, answer: ids of the end of the document.
        Returns:
            A document of `span` tokens and the answer; `answers` holds that one span.
        Raises:
            ValueError: there is no room for the lines.
        """
        rooms = span - distance - len(stated), distance - len(ask)
        for lines, room in zip((before, after), rooms):
            if sum(map(len, lines)) > room:
                raise ValueError(
                    f"{len(before) + 1 + len(after)} statements do not fit into span {span} with distance {distance}"
                )
        ids = self._scatter(before, rooms[0])[0] + stated
        ids += self._scatter(after, rooms[1])[0] + ask
        start = len(ids)
        return RecallDocument(ids + answer, [(start, start + len(answer))], [distance])

    def _scatter(self, lines: list[list[int]], room: int) -> tuple[list[int], list[int]]:
        """Lines in order with filler between them, `room` tokens in all, and where each line ends."""
        spare = room - sum(map(len, lines))
        cuts = sorted(self.rng.randint(0, spare) for _ in lines)
        ids: list[int] = []
        ends: list[int] = []
        last = 0
        for line, cut in zip(lines, cuts):
            ids += self.text(cut - last) + line
            ends.append(len(ids))
            last = cut
        return ids + self.text(spare - last), ends

    def document(self, length: int, *, max_pairs: int = 32) -> RecallDocument:
        """A training document of exactly `length` tokens in one of four kinds, drawn at random."""
        if self.far and self.rng.random() < self.far:
            return self._far_document(length, max_pairs)
        kind = self.rng.random()
        if kind < 0.7:
            return self._pairs_document(length, max_pairs)
        if kind < 0.85:
            return self._lists_document(length)
        return self._spans_document(length)

    def _cut(self, document: RecallDocument, length: int) -> RecallDocument:
        kept = [index for index, (_, end) in enumerate(document.answers) if end <= length]
        return RecallDocument(
            document.input_ids[:length],
            [document.answers[index] for index in kept],
            [document.distances[index] for index in kept],
        )

    def _pairs_document(self, length: int, max_pairs: int) -> RecallDocument:
        """Statements, then questions among filler; a key may be stated anew, the last value counts."""
        rng = self.rng
        statement, question = rng.choice(self._templates)
        pairs = rng.randint(2, max_pairs)
        value_length = rng.choice((1, 1, 1, 2))
        gap = rng.choice((0, 0, 4, 16, 32))
        keys = rng.sample(self.words, pairs)
        values: dict[int, list[int]] = {}
        stated: dict[int, int] = {}
        pending = list(keys)
        document = RecallDocument()
        ids = document.input_ids
        while len(ids) < length:
            ids += self.text(rng.randint(0, 2 * gap)) if gap else []
            if pending and (not stated or rng.random() < 0.6):
                key = pending.pop()
                values[key] = self._values(1, value_length)[0]
                ids += self._line(statement, key, values[key], statement[2])
                stated[key] = len(ids)
            else:
                key = min((rng.choice(list(stated)) for _ in range(2)), key=stated.__getitem__)
                ids += self._break + question[0] + [key] + question[1]
                document.answers.append((len(ids), len(ids) + value_length))
                document.distances.append(len(ids) - stated[key])
                ids += values[key] + statement[2]
                stated[key] = len(ids)
        return self._cut(document, length)

    def _far_document(self, length: int, max_pairs: int) -> RecallDocument:
        """Text, all statements, text, all questions, text.

        Between statements and questions lie from `FAR` tokens to as many as there is room for, uniform in the
        logarithm; statements and questions are scattered in `FAR` more.
        """
        rng = self.rng
        statement, question = rng.choice(self._templates)
        value_length = rng.choice((1, 1, 1, 2))
        stated, asked = (
            len(self._line(around, 0, [0] * value_length, statement[2])) for around in (statement, question)
        )
        pairs = min(rng.randint(2, max_pairs), max(1, length // (stated + asked)))
        keys, values = rng.sample(self.words, pairs), self._values(pairs, value_length)
        order = rng.sample(range(pairs), pairs)
        lines = [self._line(statement, keys[n], values[n], statement[2]) for n in range(pairs)]
        asks = [self._line(question, keys[n], values[n], statement[2]) for n in order]
        room = max(0, length - pairs * (stated + asked))
        least = min(FAR, room)
        between = round(least * (room / max(1, least)) ** rng.random())
        spread = min(FAR, room - between)
        early = rng.randint(0, spread)
        lead = rng.randint(0, room - between - spread)
        first, ends = self._scatter(lines, early + pairs * stated)
        last, asked_ends = self._scatter(asks, spread - early + pairs * asked)
        document = RecallDocument(self.text(lead) + first + self.text(between))
        for place, end in zip(order, asked_ends):
            answered = len(document.input_ids) + end - len(statement[2])
            document.answers.append((answered - value_length, answered))
            document.distances.append(answered - value_length - lead - ends[place])
        document.input_ids += last + self.text(room - between - spread - lead)
        return self._cut(document, length)

    def _line(self, around: Sequence[list[int]], key: int, value: list[int], end: list[int]) -> list[int]:
        """A statement, or a question with its answer."""
        return self._break + around[0] + [key] + around[1] + value + end

    def _lists_document(self, length: int) -> RecallDocument:
        """A list of words, filler, the same list again; as often as fits."""
        document = RecallDocument()
        ids = document.input_ids
        while len(ids) < length:
            words = [self.rng.choice(self.words) for _ in range(self.rng.randint(4, 24))]
            ids += self._list[0] + words
            stated = len(ids)
            ids += self.text(self.rng.choice((0, 0, 16, 64, 256))) + self._list[1] + words[:1]
            document.answers.append((len(ids), len(ids) + len(words) - 1))
            document.distances.append(len(ids) - stated)
            ids += words[1:]
        return self._cut(document, length)

    def _spans_document(self, length: int) -> RecallDocument:
        """A span of ordinary text, filler, the same span word for word."""
        document = RecallDocument()
        ids = document.input_ids
        while len(ids) < length:
            span = self.text(self.rng.randint(16, 96))
            ids += self._repeat[0] + span
            stated = len(ids)
            ids += self.text(self.rng.choice((0, 16, 64, 256))) + self._repeat[1] + span[:4]
            document.answers.append((len(ids), len(ids) + len(span) - 4))
            document.distances.append(len(ids) - stated)
            ids += span[4:]
        return self._cut(document, length)
