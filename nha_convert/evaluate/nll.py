"""Likelihood by position, and agreement with the teacher, in one pass over held-out tokens.

Legend: B windows per batch, T tokens per window, V vocabulary. A window's position p is predicted from the p
tokens before it, so a bucket "64-128" holds the predictions that had 64 to 127 tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nha_convert.devices import input_device
from nha_convert.modeling.attention_nha import teacher_mode

Buckets = Sequence[tuple[int, int]]
LOGIT_BUDGET = 2**26
"""Logits per forward pass (B * T * V) that the automatic batch size aims at: 256 MB in fp32."""
POSITIONS_AT_ONCE = 256
"""Positions whose logits are held in fp32 at a time."""


def position_buckets(sequence_length: int, first: int = 16) -> list[tuple[int, int]]:
    """Half-open position ranges whose width doubles: 0-16, 16-32, ... up to `sequence_length`."""
    edges = [0]
    edge = first
    while edge < sequence_length:
        edges.append(edge)
        edge *= 2
    edges.append(sequence_length)
    return list(zip(edges[:-1], edges[1:]))


def default_batch_size(model: Any, sequence_length: int) -> int:
    """Windows per forward pass, between 1 and 16, so that the logits stay within `LOGIT_BUDGET`."""
    return max(1, min(16, LOGIT_BUDGET // (sequence_length * int(model.config.vocab_size))))


def eval_windows(tokens: Tensor, sequence_length: int, bos: int | None, batch_size: int) -> Iterator[Tensor]:
    """Windows in which every token is predicted exactly once (without BOS the very first has no context).

    With BOS a window is BOS and the next T - 1 tokens; without, neighbouring windows share one token.
    The last, shorter window comes alone, so there is no padding.

    Args:
        tokens: [N] ids of held-out text.
        bos: id put in front of every window, or None.
    Returns:
        An iterator over ids [B, T]; the last one may be [1, < T].
    Raises:
        ValueError: nothing to predict.
    """
    tokens = tokens.reshape(-1)
    if sequence_length < 2 or tokens.numel() + (bos is not None) < 2:
        raise ValueError(
            f"nothing to predict: {tokens.numel()} tokens in windows of {sequence_length}; "
            "both need to be at least 2 (data.held_out_tokens, evaluate.sequence_length)"
        )
    lead = tokens.new_tensor([] if bos is None else [bos])
    size, last = (sequence_length, tokens.numel() - 1) if bos is None else (sequence_length - 1, tokens.numel())
    starts = range(0, last, sequence_length - 1)
    windows = [torch.cat((lead, tokens[start : start + size])) for start in starts]
    whole = [window for window in windows if window.numel() == sequence_length]
    for start in range(0, len(whole), batch_size):
        yield torch.stack(whole[start : start + batch_size])  # [B,T]
    if len(whole) < len(windows):
        yield windows[-1][None]  # [1,<T]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every model gets its training flag back afterwards."""
    flags = [(model, model.training) for model in models]
    for model, _ in flags:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in flags:
            model.train(training)


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """ids [B, T] -> logits [B, T, V], in the mode and branch the model is in when called."""

    def read(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
        return logits

    return read


def teacher_logits_of(model: Any, teacher: Any | None = None) -> Callable[[Tensor], Tensor]:
    """The same for the teacher: a model of its own, or `model` itself in teacher mode."""
    if teacher is not None:
        return logits_of(teacher)

    def read(ids: Tensor) -> Tensor:
        with teacher_mode(model):
            return logits_of(model)(ids)

    return read


class PositionSums:
    """Sums of one metric over all windows by position, and over each window (fp64, on the CPU).

    Attributes:
        total, count: [T] by position.
        windows, window_counts: [N] by window, in the order of the text; empty where `add` was told no window.
    """

    def __init__(self, sequence_length: int) -> None:
        self.total = torch.zeros(sequence_length, dtype=torch.float64)
        self.count = torch.zeros(sequence_length, dtype=torch.float64)
        self.windows = torch.zeros(0, dtype=torch.float64)
        self.window_counts = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor, first_position: int, first_window: int | None = None) -> None:
        """values [B, P] belong to positions first_position .. first_position + P - 1 of B windows."""
        values = values.cpu().double()
        place = slice(first_position, first_position + values.shape[1])
        self.total[place] += values.sum(0)
        self.count[place] += values.shape[0]
        if first_window is None:
            return
        new = max(0, first_window + len(values) - len(self.windows))
        self.windows, self.window_counts = (F.pad(x, (0, new)) for x in (self.windows, self.window_counts))
        self.windows[first_window : first_window + len(values)] += values.sum(1)
        self.window_counts[first_window : first_window + len(values)] += values.shape[1]

    def result(self, buckets: Buckets) -> dict[str, Any]:
        means = {
            f"{start}-{end}": float(self.total[start:end].sum() / self.count[start:end].sum())
            for start, end in buckets
            if self.count[start:end].sum() > 0
        }
        return {"mean": float(self.total.sum() / self.count.sum()), "buckets": means}


def compare(
    readers: dict[str, Callable[[Tensor], Tensor]],
    tokens: Tensor,
    sequence_length: int,
    *,
    reference: str | None = None,
    buckets: Buckets | None = None,
    batch_size: int = 1,
    bos: int | None = None,
    quiet: bool = False,
    description: str = "evaluate",
) -> dict[str, dict[str, Any]]:
    """Several readings of the same held-out tokens in one pass; each batch is read once by each.

    Args:
        readers: name -> function from ids [B, T] to logits [B, T, V].
        tokens: [N] held-out ids.
        reference: the reader the others are compared with, or None.
        buckets: half-open position ranges; doubling widths if None.
    Returns:
        name -> {"nll": {"mean", "buckets"}, "tokens": predictions}, in nats per token, and for every reader but
        the reference {"kl": ..., "top1": ...} of the same form: KL(reference || reader) in nats and the share of
        positions where both have the same most likely token. Beside them {"windows": {"nll": [N], ...}} holds each
        metric's sum over every window, and {"window_tokens": [N]} the predictions in it, both fp64.
    """
    order = ([reference] if reference is not None else []) + [name for name in readers if name != reference]
    sums = {name: {metric: PositionSums(sequence_length) for metric in _metrics(name, reference)} for name in order}
    batches = list(eval_windows(tokens, sequence_length, bos, batch_size))
    windows = 0
    with (
        torch.no_grad(),
        tqdm(total=len(batches) * len(order), desc=description, leave=False, disable=True if quiet else None) as bar,
    ):
        for ids in batches:
            held: Tensor | None = None
            for name in order:
                logits = readers[name](ids)
                _score(logits, held, ids.to(logits.device), sums[name], windows)
                if name == reference:
                    held = logits
                bar.update()
            windows += len(ids)
    positions = list(buckets) if buckets is not None else position_buckets(sequence_length)
    results: dict[str, dict[str, Any]] = {}
    for name in order:
        results[name] = {metric: values.result(positions) for metric, values in sums[name].items()}
        results[name]["tokens"] = int(sums[name]["nll"].count.sum())
        results[name]["windows"] = {metric: values.windows for metric, values in sums[name].items()}
        results[name]["window_tokens"] = sums[name]["nll"].window_counts
    return results


def _metrics(name: str, reference: str | None) -> tuple[str, ...]:
    return ("nll",) if reference is None or name == reference else ("nll", "kl", "top1")


def _score(logits: Tensor, held: Tensor | None, ids: Tensor, sums: dict[str, PositionSums], first_window: int) -> None:
    """Adds one batch: logits [B,T,V] of one reader, `held` those of the reference."""
    length = ids.shape[1]
    for start in range(0, length - 1, POSITIONS_AT_ONCE):
        end = min(start + POSITIONS_AT_ONCE, length - 1)
        log_p = F.log_softmax(logits[:, start:end].float(), -1)  # [B,P,V]
        targets = ids[:, start + 1 : end + 1, None]  # [B,P,1]
        sums["nll"].add(-log_p.gather(-1, targets)[..., 0], start + 1, first_window)
        if "kl" in sums and held is not None:
            log_q = F.log_softmax(held[:, start:end].to(log_p.device).float(), -1)  # [B,P,V]
            sums["kl"].add((log_q.exp() * (log_q - log_p)).sum(-1), start + 1, first_window)
            sums["top1"].add((log_q.argmax(-1) == log_p.argmax(-1)).double(), start + 1, first_window)


def nll_by_position(
    model: Any,
    tokens: Tensor,
    sequence_length: int,
    buckets: Buckets | None = None,
    batch_size: int | None = None,
    *,
    bos: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Mean NLL in nats per token, whole and by position, in the mode and branch the model is in.

    Args:
        tokens: [N] held-out ids; each is predicted once.
        buckets: half-open position ranges; doubling widths if None.
        batch_size: windows per forward pass; chosen from the vocabulary if None.
        bos: id put in front of every window, or None.
    Returns:
        {"mean": float, "buckets": {"0-16": float, ...}}.
    """
    with evaluating(model):
        result = compare(
            {"model": logits_of(model)},
            tokens,
            sequence_length,
            buckets=buckets,
            batch_size=batch_size or default_batch_size(model, sequence_length),
            bos=bos,
            quiet=quiet,
            description="NLL",
        )
    nll: dict[str, Any] = result["model"]["nll"]
    return nll


def agreement(
    model: Any,
    tokens: Tensor,
    sequence_length: int,
    buckets: Buckets | None = None,
    batch_size: int | None = None,
    *,
    teacher: Any | None = None,
    bos: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """How close the model's predictions are to the teacher's, whole and by position.

    Args:
        teacher: a model of its own; None reads `model` in teacher mode, which is the teacher only while the
            backbone is untouched (before adapters are merged).
    Returns:
        {"kl": {"mean", "buckets"}, "top1": {"mean", "buckets"}}: KL(teacher || student) in nats per token and the
        share of positions with the same most likely token.
    """
    with evaluating(*([model] if teacher is None else [model, teacher])):
        result = compare(
            {"teacher": teacher_logits_of(model, teacher), "student": logits_of(model)},
            tokens,
            sequence_length,
            reference="teacher",
            buckets=buckets,
            batch_size=batch_size or default_batch_size(model, sequence_length),
            bos=bos,
            quiet=quiet,
            description="agreement",
        )
    return {"kl": result["student"]["kl"], "top1": result["student"]["top1"]}
