"""One pass of the teacher over calibration rows, in which some of its layers are looked at."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ..evaluate.nll import evaluating, logits_of
from ..modeling.attention_nha import nha_layers, teacher_mode


def teacher_pass(
    model: Any,
    rows: Tensor,
    layers: Container[int],
    hook: Callable[[int], Callable[..., None]],
    *,
    before: bool = False,
) -> None:
    """Runs the rows one by one.

    Args:
        model: an NHA model, which is read in teacher mode.
        rows: int64 [N, T].
        layers: that are looked at.
        hook: makes the hook of a layer, with keyword arguments, as PyTorch calls it after the layer.
        before: it is called before the layer instead.
    """
    with evaluating(model), teacher_mode(model), ExitStack() as hooks:
        for index, layer in nha_layers(model):
            if index in layers:
                register = layer.register_forward_pre_hook if before else layer.register_forward_hook
                hooks.callback(register(hook(index), with_kwargs=True).remove)
        for row in rows:
            logits_of(model)(row[None])
