"""Stage `align`: every NHA layer learns its teacher's attention output, from the teacher's own hidden states.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..modeling.attention_nha import nha_layers, teacher_mode
from .job import StageJob
from .trainer import NHATrainer


def alignment_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """||student - teacher||^2 / ||teacher||^2 of each sequence, mean over the batch.

    Args:
        student, teacher: [B, T, hidden] attention outputs after `o_proj`.
    Returns:
        0-dim fp32; 0 is the teacher, 1 is what an output of zeros gives.
    """
    difference = (student.float() - teacher.float()).square().sum((1, 2))  # [B]
    energy = teacher.float().square().sum((1, 2))  # [B]
    return (difference / energy.clamp_min(torch.finfo(torch.float32).tiny)).mean()


def error_name(index: int) -> str:
    """The name of a layer's alignment error in metrics.jsonl."""
    return f"align/layer_{index:02d}"


class AlignTrainer(NHATrainer):
    """Trains the gates, and nothing else, on the attention outputs of all NHA layers at once.

    One pass of the frozen teacher feeds all layers. Each layer's error is differentiated while it is computed,
    so the graph of one layer at a time is alive, and the backbone has none.
    """

    def __init__(self, model: Any, job: StageJob, dataset: Dataset, accumulation: int = 1) -> None:
        model.requires_grad_(False)
        self.layers: list[tuple[int, Any]] = nha_layers(model)
        self.learned: list[nn.Parameter] = []
        for _, layer in self.layers:
            self.learned += list(layer.nha.requires_grad_(True).parameters())
        group = {"name": "lr", "params": self.learned, "lr": job.settings.learning_rate}
        super().__init__(model, job, dataset, [group], accumulation)

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over layers of `alignment_error`, and each layer's."""
        self.model.eval()
        errors: dict[str, torch.Tensor] = {}
        gradients: dict[int, torch.Tensor | None] = {}
        with torch.no_grad(), teacher_mode(self.model), self._measuring(errors, gradients):
            self.decoder(input_ids=input_ids, use_cache=False)
        loss = torch.stack(list(errors.values())).mean()
        given = [gradients[id(tensor)] for tensor in self.learned]
        return _Given.apply(loss, given, *self.learned), errors

    @contextmanager
    def _measuring(self, errors: dict[str, torch.Tensor], gradients: dict[int, torch.Tensor | None]) -> Iterator[None]:
        """Inside, a forward pass in teacher mode fills in each layer's error, and its share of the loss's gradient."""
        handles = []
        for index, layer in self.layers:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                module.nha_mode = "student"
                try:
                    with torch.enable_grad():
                        error = alignment_error(module.forward(*args, **kwargs)[0], output[0])
                        share = error / len(self.layers)
                finally:
                    module.nha_mode = "teacher"
                errors[error_name(index)] = error.detach()
                own = list(module.nha.parameters())
                shares: Any = [None] * len(own)
                if error.requires_grad:  # not where nothing has left the window
                    shares = torch.autograd.grad(share, own, allow_unused=True)
                gradients.update((id(tensor), given) for tensor, given in zip(own, shares))

            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def worst_layer(self, input_ids: torch.Tensor) -> int:
        """The layer with the largest error, the first that is not a number before all."""
        errors = [self.measured[error_name(index)].item() for index, _ in self.layers]
        sizes = [error if error == error else float("inf") for error in errors]
        return self.layers[sizes.index(max(sizes))][0]


class _Given(torch.autograd.Function):
    """A value whose gradients with regard to the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor | None], *parameters: Any) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return None, None, *(None if gradient is None else gradient * outer[0] for gradient in ctx.gradients)
