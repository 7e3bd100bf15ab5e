"""What the stages that run the whole student share: one pass of teacher and student, and a weighted list of losses.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import InputError
from ...modeling.attention_nha import nha_layers
from ...stage_settings import LossSettings
from ..losses import Batch, row_errors, shifted_targets, token_errors, token_sums, weighted
from ..objective import Objective

TOKEN_FUNCTIONS = ("kl", "reverse_kl", "ce")
Terms = dict[int, torch.Tensor]


class WholeModelObjective(Objective):
    """A weighted list of losses of the student on its own inputs, mean over predicted tokens.

    The teacher is the student's own backbone in teacher mode without adapters, or a model of its own. `hidden` is the
    mean over blocks of each token's ||student - teacher||^2 / ||teacher||^2 after the block; `attention` the mean over
    NHA layers of each row's, of attention outputs, rows weighted by their predicted tokens. Tokens that predict
    nothing do not count.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if any(term.function == "attention" for term in self.terms()) and not self._layers():
            raise InputError(
                f"{self.settings.label}: losses: attention compares NHA layers, and in this stage all run full "
                "attention; remove it, or set the stage's windows to a number"
            )

    def terms(self) -> list[LossSettings]:
        """Functions, weights and temperatures."""
        raise NotImplementedError

    def sums(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sums over predicted tokens: of the loss, and of each function without its weight."""
        terms = self.terms()
        functions: list[str] = [term.function for term in terms]
        targets = shifted_targets(batch)
        there = targets >= 0  # [B,T]
        inner: list[str] = [name for name in ("hidden", "attention") if name in functions]
        theirs: dict[str, Terms] = {name: {} for name in inner}
        mine: dict[str, Terms] = {name: {} for name in inner}
        layers = self._layers()
        teacher = None
        if any(name != "ce" for name in functions):
            with self.teaching() as model, _keeping(model, layers, theirs):
                teacher = self.run(model, batch)  # [B,T,hidden]
        with _keeping(self.model, layers, mine):
            student = self.run(self.model, batch)  # [B,T,hidden]
        values: dict[str, torch.Tensor] = {name: _apart(name, mine[name], theirs[name], there) for name in inner}
        by_token: dict[str, float] = {
            term.function: term.temperature for term in terms if term.function in TOKEN_FUNCTIONS
        }
        if by_token:
            head = self.model.get_output_embeddings()
            values |= token_sums(head, student, teacher, targets, by_token)
        loss = weighted((term.weight, values[term.function]) for term in terms)
        return loss, {name: values[name].detach() for name in functions}

    def _layers(self) -> list[int]:
        """The layers that run NHA in this stage."""
        return [index for index, layer in nha_layers(self.model) if layer.nha_window is not None]


def _places(model: Any, layers: list[int], names: Any) -> Iterator[tuple[str, int, nn.Module]]:
    """(function, layer, the module whose output is compared)."""
    decoder = getattr(model, model.base_model_prefix)
    for index, block in enumerate(decoder.layers):
        if "hidden" in names:
            yield "hidden", index, block
        if "attention" in names and index in layers:
            yield "attention", index, block.self_attn


@contextmanager
def _watching(
    model: Any, layers: list[int], names: Any, see: Callable[[str, int, torch.Tensor], None]
) -> Iterator[None]:
    """Inside, `see` is told every compared output [B, T, hidden]; not of what checkpointing runs again later."""
    handles = []
    for name, index, module in _places(model, layers, names):

        def hook(module: Any, args: Any, output: Any, name: str = name, index: int = index) -> None:
            see(name, index, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeping(model: Any, layers: list[int], states: dict[str, Terms]) -> AbstractContextManager[None]:
    """Inside, outputs are put into `states`.

    They are only noted: a sum made inside a layer that checkpointing runs again would be missing the second time.
    """

    def see(name: str, index: int, output: torch.Tensor) -> None:
        states[name][index] = output

    return _watching(model, layers, states, see)


def _apart(name: str, mine: Terms, theirs: Terms, there: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the errors of `hidden` or `attention`, summed over the predicted tokens (`there`, [B, T])."""
    sums = []
    for index, output in mine.items():
        wanted = theirs.pop(index)
        if name == "hidden":
            sums.append((token_errors(output, wanted) * there).sum())
        else:
            seen = there[..., None]  # [B,T,1]
            sums.append((row_errors(output * seen, wanted * seen) * there.sum(1)).sum())
    return torch.stack(sums).mean()
