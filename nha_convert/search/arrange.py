"""Some layers of a student as NHA, the others as the teacher's own attention. Nothing is trained or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..evaluate.nll import logits_of
from ..modeling.attention_nha import nha_layers


@contextmanager
def arranged(model: nn.Module, windows: Mapping[int, int | None], branch: str = "both") -> Iterator[None]:
    """Inside, the layers of `windows` run NHA and every other layer the base model's attention.

    Args:
        model: an NHA model; no cache of it may be in use.
        windows: layer -> exact tokens that it sees; None, or no entry, is full attention.
        branch: what the NHA layers have, of `attention_nha.BRANCHES`.
    """
    layers = nha_layers(model)
    before = [(layer.nha_mode, layer.nha_window, layer.nha_branch) for _, layer in layers]
    try:
        for index, layer in layers:
            window = windows.get(index)
            layer.nha_mode = "teacher" if window is None else "student"
            layer.nha_window = layer.nha_window if window is None else window
            layer.nha_branch = branch
        yield
    finally:
        for (_, layer), (mode, window, kept) in zip(layers, before):
            layer.nha_mode, layer.nha_window, layer.nha_branch = mode, window, kept


def arranged_logits(model: Any, windows: Mapping[int, int | None], branch: str) -> Callable[[Tensor], Tensor]:
    """ids [B, T] -> logits [B, T, V] of the model as `arranged` has it."""

    def read(ids: Tensor) -> Tensor:
        with arranged(model, windows, branch):
            return logits_of(model)(ids)

    return read
