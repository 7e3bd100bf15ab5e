"""Tasks that only memory can solve, each at an exact distance: associative recall, needles, variables, copying.

Every task makes documents from any tokenizer that has one-token words and from any text: a `RecallDocument` of
`span` tokens and the answer, whose distance runs from the end of what has to be remembered to the end of the
question. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nha_convert.recall_documents import TEMPLATES, RecallDocument, RecallGenerator

TOKENS_PER_STATEMENT = 16
"""Room that a document leaves for each statement, with filler around it."""
NEEDLE = next(index for index, (statement, _) in enumerate(TEMPLATES) if statement[0] == " The code of")


class TaskGenerator(RecallGenerator):
    """What tasks draw words and text from, and the tokenizer that encodes their wording.

    Args:
        tokenizer: a `transformers` tokenizer; its one-token lower-case words become keys and values.
        filler: token ids of ordinary text.
        seed: everything drawn comes from this.
    Raises:
        ValueError: fewer than 64 one-token words in the vocabulary, or too little filler.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[int], seed: int = 0) -> None:
        super().__init__(tokenizer, filler, seed)
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of a statement or question, without BOS."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def distinct_words(self, count: int) -> list[int]:
        """
        Raises:
            ValueError: the vocabulary has fewer.
        """
        if count > len(self.words):
            raise ValueError(f"{count} words are needed, the vocabulary has {len(self.words)} of one token")
        return self.rng.sample(self.words, count)


@dataclass(frozen=True)
class RecallTask(ABC):
    """One task.

    Attributes:
        name: as in `evaluate.tasks` and eval.json.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def answer(self) -> int:
        """Tokens of every answer."""

    @property
    @abstractmethod
    def statements(self) -> int:
        """Lines that stand in the text, which the length of a document allows for."""

    @property
    def details(self) -> dict[str, int]:
        """What a cell of eval.json says beside its distance."""
        return {}

    @abstractmethod
    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        """One question.

        Args:
            distance: tokens from the end of what has to be remembered to the end of the question.
            span: tokens of the whole document up to the answer.
            index: the document's number, which chooses among surface forms.
        Returns:
            `span` tokens and the answer, which is the one span of `answers`; `distances` holds `distance`.
        Raises:
            ValueError: the statements do not fit into `span` at that distance, or the vocabulary has too few words.
        """


@dataclass(frozen=True)
class AssociativeRecall(RecallTask):
    """Keys with values; some keys are asked one after the other and the last answer counts.

    Attributes:
        pairs: keys and values stated.
        queries: questions; all but the last stand answered, as many of them as the distance has room for.
        value_length: tokens of a value.
    """

    name: ClassVar[str] = "mqar"
    pairs: int = 16
    queries: int = 4
    value_length: int = 1

    @property
    def answer(self) -> int:
        return self.value_length

    @property
    def statements(self) -> int:
        return self.pairs

    @property
    def details(self) -> dict[str, int]:
        return {"pairs": self.pairs}

    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        return generator.prompt(
            pairs=self.pairs,
            distance=distance,
            span=span,
            value_length=self.value_length,
            template=index % len(TEMPLATES),
            queries=self.queries,
        )


@dataclass(frozen=True)
class Needle(RecallTask):
    """A sentence with a code in real text; with several keys the others are distractors."""

    name: ClassVar[str] = "needle"
    keys: int = 1

    @property
    def answer(self) -> int:
        return 1

    @property
    def statements(self) -> int:
        return self.keys

    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        return generator.prompt(pairs=self.keys, distance=distance, span=span, template=NEEDLE)


@dataclass(frozen=True)
class MultiKeyNeedle(Needle):
    """The same among three sentences about other keys."""

    name: ClassVar[str] = "needle_multikey"
    keys: int = 4


@dataclass(frozen=True)
class MultiValueNeedle(RecallTask):
    """Several sentences about one key; all values are asked, in order. The first, farthest one gives the distance."""

    name: ClassVar[str] = "needle_multivalue"
    values: int = 4

    @property
    def answer(self) -> int:
        return self.values

    @property
    def statements(self) -> int:
        return self.values

    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        key, *values = generator.distinct_words(1 + self.values)
        head = [*generator.encode("\n"), *generator.encode(" A code of"), key, *generator.encode(" is")]
        lines = [[*head, value, *generator.encode(".")] for value in values]
        ask = [*generator.encode("\n"), *generator.encode(" All codes of"), key, *generator.encode(", in order:")]
        return generator.place([], lines[0], lines[1:], ask, values, distance=distance, span=span)


@dataclass(frozen=True)
class VariableTracking(RecallTask):
    """Chains of assignments: a value, then variables that take it on; the last one's value is asked.

    The value itself stands only in its chain's first line, from whose end the distance counts.

    Attributes:
        chains: chains with values of their own, the asked one included.
        hops: assignments from variable to variable in each.
    """

    name: ClassVar[str] = "variable_tracking"
    chains: int = 2
    hops: int = 2

    @property
    def answer(self) -> int:
        return 1

    @property
    def statements(self) -> int:
        return self.chains * (1 + self.hops)

    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        words = generator.distinct_words(self.chains * (2 + self.hops))
        names = [words[chain :: self.chains] for chain in range(self.chains)]  # value, then variables
        end, equals = generator.encode("\n"), generator.encode(" =")
        chains = [[[*end, new, *equals, old, *end] for old, new in zip(one, one[1:])] for one in names]
        ask = [*end, *generator.encode(" value of"), names[0][-1], *generator.encode(":")]
        size = len(chains[0][0])
        room_before = (span - distance - size) // size
        room_after = (distance - len(ask)) // size - self.hops
        before: list[list[int]] = []
        rest = [chains[0][1:]]
        for chain in chains[1:]:  # each begins on either side of the asked value, as far as there is room
            least, most = max(0, len(chain) - room_after), min(len(chain), room_before)
            if least > most:
                raise ValueError(f"{self.statements} lines do not fit into span {span} with distance {distance}")
            cut = generator.rng.randint(least, most)
            room_before, room_after = room_before - cut, room_after - len(chain) + cut
            before += chain[:cut]
            rest.append(chain[cut:])
        return generator.place(
            before,
            chains[0][0],
            list(_interleaved(rest, generator)),
            ask,
            names[0][:1],
            distance=distance,
            span=span,
        )


@dataclass(frozen=True)
class Copy(RecallTask):
    """A list of words no text would predict, real text, the list's first words again: the rest has to follow.

    Attributes:
        cue: words that the question repeats.
        length: words of the list that have to follow.
    """

    name: ClassVar[str] = "copy"
    cue: int = 1
    length: int = 8

    @property
    def answer(self) -> int:
        return self.length

    @property
    def statements(self) -> int:
        return 2

    def document(self, generator: TaskGenerator, distance: int, span: int, index: int) -> RecallDocument:
        words = generator.distinct_words(self.cue + self.length)
        end = generator.encode("\n")
        stated = [*end, *generator.encode("list:"), *words, *end]
        ask = [*end, *generator.encode("again:"), *words[: self.cue]]
        return generator.place([], stated, [], ask, words[self.cue :], distance=distance, span=span)


def _interleaved(chains: list[list[list[int]]], generator: TaskGenerator) -> Iterable[list[int]]:
    """All lines in random order, but in each chain's own."""
    left = [list(chain) for chain in chains]
    while any(left):
        chain = generator.rng.choice([one for one in left for _ in one])
        yield chain.pop(0)


TASKS: dict[str, type[RecallTask]] = {
    one.name: one for one in (AssociativeRecall, Needle, MultiKeyNeedle, MultiValueNeedle, VariableTracking, Copy)
}
"""Every task by the name it has in `evaluate.tasks`; `recall` there is the recall table of every run."""


def tasks_named(name: str, pairs: Sequence[int]) -> list[RecallTask]:
    """The tasks that a name of `evaluate.tasks` stands for: associative recall once for each number of pairs."""
    return [AssociativeRecall(pairs=count) for count in pairs] if name == AssociativeRecall.name else [TASKS[name]()]
