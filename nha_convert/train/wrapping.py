"""What stands around an objective while it trains: sharding's own accumulation, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..settings import RuntimeSettings


class ShardedStep(nn.Module):
    """A sharded objective as DDP would stand there: `no_sync` keeps gradients unsharded until the last micro-batch."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: dict[str, torch.Tensor], items: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`Objective.forward`."""
        return self.objective(batch, items)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, a backward pass adds to gradients and exchanges nothing."""
        self.objective.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.objective.set_requires_gradient_sync(True)


@contextmanager
def prepared(model: Any, runtime: RuntimeSettings) -> Iterator[None]:
    """Inside, a student has gradient checkpointing and compiled parts as `runtime` says; afterwards neither.

    Compiled are the feed-forward part and the norms of every decoder layer: student and teacher share them, and no
    stage looks inside.
    """
    new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.20
    parts = [
        part
        for layer in getattr(model, model.base_model_prefix).layers
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    ]
    if runtime.gradient_checkpointing:
        (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    if runtime.compile:
        for part in parts:
            part.compile()
    try:
        yield
    finally:
        if runtime.gradient_checkpointing:
            (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
        for part in parts:
            part._compiled_call_impl = None
