"""The stages of a teacher's training: what a batch holds, what its loss is, when a stage ends.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nha_convert.recall_documents import RecallGenerator
from tools.teacher.sizes import CONTEXT

IGNORE = -100
LEARNED = 0.9
"""Running accuracy at which a level of the circuit stage is left."""


@dataclass
class Sources:
    """What batches are drawn from: token ids of text, recall documents, and one generator of random numbers."""

    text: Sequence[int]
    documents: RecallGenerator
    rng: random.Random


@dataclass
class Progress:
    """How far a stage has come.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens seen.
        seconds: time spent in steps; pauses between runs do not count.
        level: level of the curriculum, from 0.
        running: exponential means of what is logged.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0
    running: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The length of a stage, bounded by one of the two.

    Attributes:
        minutes: time spent in steps; the result depends on the machine's speed.
        tokens: tokens seen; the same number of steps on every machine.
    """

    minutes: float
    tokens: float

    def share(self, progress: Progress, bound: str) -> float:
        """The part that is spent, in `minutes` or `tokens` as `bound` says; 1 ends the stage."""
        if bound == "tokens":
            return progress.tokens / self.tokens
        return progress.seconds / (60 * self.minutes)


class Stage(Protocol):
    """One stage: the training loop asks for batches and hands the measures back."""

    @property
    def name(self) -> str: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def decays(self) -> bool: ...
    @property
    def weight_decay(self) -> float: ...
    def batch(self, progress: Progress, sources: Sources) -> tuple[Tensor, Tensor]: ...
    def loss(self, model: Any, input_ids: Tensor, marked: Tensor) -> tuple[Tensor, dict[str, float]]: ...
    def observe(self, progress: Progress, sources: Sources, measures: dict[str, float]) -> dict[str, Any] | None: ...
    def complete(self, progress: Progress) -> bool: ...


@dataclass(frozen=True)
class CircuitStage:
    """Recall on bare pairs of one-token keys and values, a level up whenever 0.9 of the answers are right.

    Attributes:
        budget: the most that is spent; the stage ends as soon as the last level is learned.
        curriculum: (pairs, size of the vocabulary) of each level.
    """

    budget: Budget = Budget(minutes=20, tokens=8_000_000)
    curriculum: tuple[tuple[int, int], ...] = ((2, 8), (4, 16), (8, 64), (16, 10**6), (32, 10**6))
    name: str = "circuit"
    decays: bool = False
    weight_decay: float = 0.01

    def batch(self, progress: Progress, sources: Sources) -> tuple[Tensor, Tensor]:
        """Ids [B,T] and labels [B,T]: pairs, then all keys again in another order; only second values are labelled."""
        pairs, size = self.curriculum[progress.level]
        words, rng = sources.documents.words[:size], sources.rng
        inputs, labels = [], []
        for _ in range(max(8, min(64, 512 // pairs))):
            keys = rng.sample(words, pairs)
            table = {key: rng.choice(words) for key in keys}
            ids = [0] + [token for key in keys for token in (key, table[key])]
            targets = [IGNORE] * len(ids)
            for key in rng.sample(keys, pairs):
                ids += [key, table[key]]
                targets += [IGNORE, table[key]]
            inputs.append(ids)
            labels.append(targets)
        return torch.tensor(inputs), torch.tensor(labels)

    def loss(self, model: Any, input_ids: Tensor, marked: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy of the labelled tokens."""
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # [B,T-1,V]
        targets = marked[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        asked = targets != IGNORE
        accuracy = (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()
        return loss, {"loss": loss.item(), "accuracy": accuracy}

    def observe(self, progress: Progress, sources: Sources, measures: dict[str, float]) -> dict[str, Any] | None:
        """Counts the step's accuracy in; a row for the log every 100 steps and at the end of a level."""
        pairs, size = self.curriculum[progress.level]
        average = 0.95 * progress.running.get("accuracy", 0.0) + 0.05 * measures["accuracy"]
        learned = average > LEARNED
        progress.running["accuracy"] = 0.0 if learned else average
        progress.level += learned
        if progress.step % 100 and not learned:
            return None
        return {
            "phase": "circuit",
            "step": progress.step,
            "tokens": progress.tokens,
            "pairs": pairs,
            "vocabulary": min(size, len(sources.documents.words)),
            "loss": measures["loss"],
            "accuracy": average,
        }

    def complete(self, progress: Progress) -> bool:
        """Whether all levels are learned."""
        return progress.level >= len(self.curriculum)


@dataclass(frozen=True)
class TextStage:
    """Text and recall documents of one context length; the answers count as much again as all tokens.

    Attributes:
        budget: the stage's length.
        context: tokens of a row without BOS.
        rows: rows of a batch.
        recall_share: the part of the rows that are recall documents.
        max_pairs: most keys of a recall document.
        decays: the learning rate falls to 0 over the stage instead of staying constant.
    """

    budget: Budget
    context: int
    rows: int
    recall_share: float
    max_pairs: int
    decays: bool = False
    weight_decay: float = 0.05

    @property
    def name(self) -> str:
        """The name of the stage's folder and log rows."""
        return f"text-{self.context}"

    def batch(self, progress: Progress, sources: Sources) -> tuple[Tensor, Tensor]:
        """Text windows and recall documents side by side: ids [B,T+1], and a mask [B,T+1] of the answers."""
        rng, text = sources.rng, sources.text
        rows, answers = [], []
        for _ in range(self.rows):
            mask = [False] * (self.context + 1)
            if rng.random() < self.recall_share:
                document = sources.documents.document(self.context, max_pairs=self.max_pairs)
                ids = [0] + document.input_ids
                for begin, end in document.answers:
                    mask[begin + 1 : end + 1] = [True] * (end - begin)
            else:
                begin = rng.randrange(len(text) - self.context)
                ids = [0] + list(text[begin : begin + self.context])
            rows.append(ids)
            answers.append(mask)
        return torch.tensor(rows), torch.tensor(answers)

    def loss(self, model: Any, input_ids: Tensor, marked: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy of all tokens plus that of the answers."""
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # [B,T,V]
        targets, asked = input_ids[:, 1:], marked[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        loss = nll.mean()
        measures = {}
        text_rows = ~marked.any(1)
        if text_rows.any():
            measures["text_nll"] = nll[text_rows].mean().item()
        if asked.any():
            answers = nll[asked].mean()
            loss = loss + answers
            measures["recall_nll"] = answers.item()
            measures["recall_accuracy"] = (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()
        return loss, measures

    def observe(self, progress: Progress, sources: Sources, measures: dict[str, float]) -> dict[str, Any] | None:
        """Counts the step's measures in; a row for the log every 100 steps."""
        for name, value in measures.items():
            progress.running[name] = 0.97 * progress.running.get(name, value) + 0.03 * value
        if progress.step % 100:
            return None
        row = {"phase": "text", "context": self.context, "step": progress.step, "tokens": progress.tokens}
        return row | progress.running

    def complete(self, progress: Progress) -> bool:
        """Never before the budget is spent."""
        return False


def teacher_stages(scale: float = 1.0, circuit_minutes: float = 20) -> list[Stage]:
    """The stages of every teacher: the circuit, then text in growing context.

    The tokens of the text stages are about what the embedded teacher saw in them, by its log.

    Args:
        scale: multiplies all budgets.
        circuit_minutes: most minutes of the circuit stage, before `scale`.
    """

    def budget(minutes: float, tokens: int) -> Budget:
        return Budget(minutes * scale, tokens * scale)

    return [
        CircuitStage(budget(circuit_minutes, 8_000_000)),
        TextStage(budget(12, 2_600_000), context=256, rows=16, recall_share=0.5, max_pairs=16),
        TextStage(budget(16, 2_600_000), context=512, rows=8, recall_share=0.5, max_pairs=32),
        TextStage(budget(18, 1_600_000), context=CONTEXT, rows=4, recall_share=0.4, max_pairs=32, decays=True),
    ]
