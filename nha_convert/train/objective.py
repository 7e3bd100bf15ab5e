"""What a stage learns: the loss of a batch, what is trained, and what is left when the stage is over.

B batch, T time. A trainer (and DDP or FSDP2 around it) drives an `Objective` and knows nothing of losses.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..modeling.attention_nha import nha_layers, teacher_mode
from ..stage_settings import StageSettings
from .losses import Batch, shifted_targets
from .selection import Selection, select


class Objective(nn.Module, ABC):
    """A student, its teacher and a loss whose parts over micro-batches and ranks add up.

    Attributes:
        model: the student, with what learns in it marked by `requires_grad`.
        teacher: the teacher where it is a model of its own; None where it is the student in teacher mode.
        selection: what this stage trains.
        step: the optimizer step that `begin_step` named last, from 0.

    Args:
        model: the student as the stage before left it; `settings.windows` are set in it until `finish`.
        settings: the stage.
        seed: of the adapters' first weights and of everything that is drawn while training.
        teacher: the student as it was before any training (`load_student`), frozen here and run in teacher mode;
            needed where `Recipe.needs_teacher` says so.
    Raises:
        InputError: the stage's windows do not fit the model, or nothing in it is left to train.
    """

    def __init__(self, model: Any, settings: StageSettings, *, seed: int = 0, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.settings, self.seed, self.step = settings, seed, 0
        self._windows_before = list(model.config.nha_windows)
        if settings.windows is not None:
            set_stage_windows(model, settings)
        self.selection: Selection = select(model, settings, seed)
        self.model = model
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()

    # ---- what a trainer calls ------------------------------------------------------------------
    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: `name`, `params`, `lr`, `weight_decay`."""
        return self.selection.groups

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """What learns, in parts whose gradients are clipped each on its own."""
        return [[tensor for group in self.groups() for tensor in group["params"]]]

    def begin_step(self, step: int) -> None:
        """Told before the first micro-batch of each optimizer step, on every rank; what is drawn depends on it.

        Where the stage has `random_windows`, each layer's window of this step is drawn.

        Args:
            step: from 0, the same number again after a resume.
        """
        self.step = step
        choices = self.settings.random_windows
        if choices is not None:
            drawn = {
                index: random.Random(f"{self.seed}/windows/{step}/{self.number(index)}").choice(choices)
                for index, layer in nha_layers(self.model)
                if layer.nha_window is not None
            }
            self.model.set_windows(drawn)

    def number(self, index: int) -> int:
        """The place in the whole model of a layer of `model`."""
        return index

    def forward(self, batch: Batch, items: torch.Tensor | int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's share of the step's loss.

        Args:
            batch: input_ids, labels, position_ids, each int64 [B, T].
            items: what `count` gives, summed over all micro-batches and ranks of the step.
        Returns:
            0-dim fp32 loss, and detached 0-dim values; both add up to the step's over micro-batches and ranks.
        """
        if self.settings.random_windows is not None and not self._windows_drawn():
            self.begin_step(self.step)
        with self._precision(batch["input_ids"].device):
            loss, measured = self.sums(batch)
        scale = torch.as_tensor(items, device=loss.device).clamp_min(1)
        return loss / scale, {name: value.detach() / scale for name, value in measured.items()}

    @abstractmethod
    def sums(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`forward` before the division by the step's items."""

    def count(self, batch: Batch) -> torch.Tensor:
        """0-dim int64: what this micro-batch has of what the loss averages over; here predicted tokens."""
        return (shifted_targets(batch) >= 0).sum()

    def finish(self) -> dict[str, torch.Tensor]:
        """Merges adapters into the weights and sets the windows back.

        Returns:
            The tensors that this stage changed, under the plain model's names, detached.
        """
        tensors = self.selection.merge(self.model)
        if self.settings.windows is not None or self.settings.random_windows is not None:
            self.model.set_windows(self._windows_before)
        return tensors

    @torch.no_grad()
    def worst_layer(self, batch: Batch) -> int:
        """The first layer whose attention output is not finite, else the one with the largest value."""
        peaks: dict[int, float] = {}

        def record(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                peak = output[0].detach().abs().max().item()
                peaks.setdefault(index, peak if peak == peak else float("inf"))

            return hook

        handles = [layer.register_forward_hook(record(index)) for index, layer in nha_layers(self.model)]
        try:
            self.run(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return max(peaks, key=lambda index: (peaks[index], -index))

    def _windows_drawn(self) -> bool:
        windows = [layer.nha_window for _, layer in nha_layers(self.model) if layer.nha_window is not None]
        return all(window in self.settings.random_windows for window in windows)  # type: ignore[operator]

    # ---- what objectives share -----------------------------------------------------------------
    @staticmethod
    def run(model: Any, batch: Batch) -> torch.Tensor:
        """Final hidden states [B, T, hidden] of the model without its head; documents stand apart by position_ids.

        A batch with `hidden_states` [B, T, hidden] enters the first layer with them.
        """
        decoder = getattr(model, model.base_model_prefix)
        states = batch.get("hidden_states")
        inputs = {"input_ids": batch["input_ids"]} if states is None else {"inputs_embeds": states}
        return decoder(**inputs, position_ids=batch.get("position_ids"), use_cache=False).last_hidden_state

    @contextmanager
    def teaching(self) -> Iterator[Any]:
        """Inside, the model that is given computes the teacher's function, without a graph."""
        if self.teacher is not None:
            with torch.no_grad(), teacher_mode(self.teacher):
                yield self.teacher.eval()
            return
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), teacher_mode(self.model), self.selection.without_adapters():
                yield self.model
        finally:
            self.model.train(training)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast where the stage computes in 16 bit on weights of 32."""
        if self.settings.precision == "bfloat16" and self.model.dtype == torch.float32:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


def set_stage_windows(model: Any, settings: StageSettings) -> None:
    """Gives the model the stage's windows.

    Raises:
        InputError: they do not fit the model.
    """
    try:
        model.set_windows(settings.windows)
    except ValueError as error:
        raise InputError(f"{settings.label}: windows: {error}") from error
