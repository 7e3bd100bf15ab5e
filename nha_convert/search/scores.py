"""What each layer loses as an NHA layer, by five measures; one table for all of them.

No measure trains anything. The larger the loss, the more a layer needs full attention (loss 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..devices import input_device
from ..evaluate.nll import compare, default_batch_size, evaluating, teacher_logits_of
from ..settings_types import SEARCH_METHODS
from ..train.losses import row_errors
from .arrange import arranged, arranged_logits
from .attention_mass import far_attention
from .calibration import Calibration
from .teacher_pass import teacher_pass

Losses = dict[int, dict[int, float]]
"""Layer -> {window: loss}."""
Windows = Mapping[int, Sequence[int]]
"""Layer -> windows that it is measured with, as many for every layer."""


def layer_losses(
    method: str,
    model: Any,
    text: Calibration,
    windows: Windows,
    *,
    branch: str = "both",
    teacher: Any | None = None,
    quiet: bool = True,
) -> Losses:
    """Each layer's loss with each of its windows.

    Args:
        method: `attention`, the teacher's softmax mass beyond window and sinks; `alignment`, the error of the layer's
            output on the teacher's inputs, as stage `align` measures it; `kl`, KL(teacher || model) in nats per token
            with this layer alone as NHA; `restore`, how much of the KL with all layers as NHA goes when this one is
            full; `recall`, how much the NLL of answers that lie beyond the smallest window grows, in nats per token,
            with this layer alone as NHA.
        model: an NHA model whose layers in `windows` have gates.
        text: to measure on; `recall` needs its documents.
        windows: layer -> windows.
        branch: what NHA layers have: "both", or "window" where gates have learnt nothing.
        teacher: a model of its own for `kl` and `restore`; None is the model in teacher mode.
    Returns:
        layer -> {window: loss}.
    Raises:
        ValueError: an unknown method.
        InputError: `recall`, and no answer lies beyond the smallest window.
    """
    if method not in SEARCH_METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(SEARCH_METHODS)}")
    if method == "attention":
        return far_attention(model, text.rows, windows)
    if method == "alignment":
        return _alignment(model, text.rows, windows, branch)
    if method == "recall":
        return _recall(model, text, windows, branch)
    if method == "restore":
        return _restore(model, text, windows, branch, teacher, quiet)
    names = {(layer, window): {layer: window} for layer, choices in windows.items() for window in choices}
    found = divergences(model, text, list(names.values()), branch=branch, teacher=teacher, quiet=quiet)
    return _table(dict(zip(names, found)))


def divergences(
    model: Any,
    text: Calibration,
    arrangements: Sequence[Mapping[int, int | None]],
    *,
    branch: str = "both",
    teacher: Any | None = None,
    quiet: bool = True,
) -> list[float]:
    """KL(teacher || model), in nats per token, of several arrangements of the layers.

    Args:
        arrangements: layer -> window of the layers that run NHA, all others full.
    """
    if not arrangements:
        return []
    readers = {str(place): arranged_logits(model, one, branch) for place, one in enumerate(arrangements)}
    with evaluating(*([model] if teacher is None else [model, teacher])):
        found = compare(
            {"teacher": teacher_logits_of(model, teacher), **readers},
            text.tokens,
            text.length,
            reference="teacher",
            batch_size=default_batch_size(model, text.length),
            bos=text.bos,
            quiet=quiet,
            description="search",
        )
    return [found[name]["kl"]["mean"] for name in readers]


def _table(losses: Mapping[tuple[int, int], float]) -> Losses:
    table: Losses = {}
    for (layer, window), loss in losses.items():
        table.setdefault(layer, {})[window] = loss
    return table


def _restore(model: Any, text: Calibration, windows: Windows, branch: str, teacher: Any | None, quiet: bool) -> Losses:
    """With the k-th window of every layer: KL of all as NHA less KL with one of them full."""
    arrangements: list[dict[int, int | None]] = []
    places = []
    for choices in zip(*windows.values(), strict=True):
        every: dict[int, int | None] = dict(zip(windows, choices))
        arrangements += [every, *({**every, layer: None} for layer in windows)]
        places += [(None, 0), *zip(windows, choices)]
    found = divergences(model, text, arrangements, branch=branch, teacher=teacher, quiet=quiet)
    losses = {}
    all_nha = 0.0
    for (layer, window), value in zip(places, found):
        if layer is None:
            all_nha = value
        else:
            losses[layer, window] = all_nha - value
    return _table(losses)


def _alignment(model: Any, rows: Tensor, windows: Windows, branch: str) -> Losses:
    """||student - teacher||^2 / ||teacher||^2 of the output of each layer on the teacher's inputs, mean over rows."""
    sums = {(layer, window): 0.0 for layer, choices in windows.items() for window in choices}

    def measure(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = layer.nha_mode, layer.nha_window, layer.nha_branch
            try:
                layer.nha_mode, layer.nha_branch = "student", branch
                for window in windows[index]:
                    layer.nha_window = window
                    own = layer.forward(*args, **kwargs)[0]
                    sums[index, window] += float(row_errors(own, output[0]).sum())
            finally:
                layer.nha_mode, layer.nha_window, layer.nha_branch = before

        return hook

    teacher_pass(model, rows, windows, measure)
    return _table({key: value / len(rows) for key, value in sums.items()})


def _recall(model: Any, text: Calibration, windows: Windows, branch: str) -> Losses:
    """Growth of the NLL of answers whose value was stated beyond the smallest window."""
    nearest = min(min(choices) for choices in windows.values())
    asked = text.questions(nearest)
    with evaluating(model):
        plain = _answer_nll(model, asked, {}, branch)
        return {
            layer: {window: _answer_nll(model, asked, {layer: window}, branch) - plain for window in choices}
            for layer, choices in windows.items()
        }


def _answer_nll(
    model: Any, asked: list[tuple[list[int], list[int]]], windows: Mapping[int, int | None], branch: str
) -> float:
    """Nats per token of an answer; the head reads the places before them alone."""
    total, count = 0.0, 0
    decoder = getattr(model, model.base_model_prefix)
    with arranged(model, windows, branch):
        for ids, places in asked:
            row = torch.tensor([ids], device=input_device(model))  # [1,T]
            states = decoder(input_ids=row, use_cache=False).last_hidden_state[0]  # [T,hidden]
            before = torch.tensor(places, device=states.device) - 1
            logits = model.lm_head(states[before]).float()  # [A,V]
            total += float(functional.cross_entropy(logits, row[0, before + 1], reduction="sum"))
            count += len(places)
    return total / count
