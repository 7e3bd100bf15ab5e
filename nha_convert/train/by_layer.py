"""Alignment of a few layers at a time: the others stay on disk, and what enters a layer is read from a file.

A layer's alignment needs its own gates, its own base tensors and the teacher's hidden states before it, nothing else.
So the steps of a stage are cut into spans; in each span one group of layers after the other makes all steps, reading
what the group before has written. The numbers are those of training all layers at once.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import get_scheduler
from transformers.trainer_callback import TrainerState

from ..layer_slices import LayerSlices
from .batches import BatchPlan, plan_batches
from .checkpoints import load_plain, load_tensors, trained_tensors
from .engine import Engine, load_optimizer_state, optimizer_state
from .faults import naming_a_full_disk, not_finite
from .hidden_cache import HiddenCache
from .job import StageJob
from .metrics import Meter
from .objective import Objective
from .objectives import AlignObjective
from .random_state import random_state
from .stage_rows import StageRows
from .trainer import METER, OPTIMIZER, RANDOM, SCHEDULER, clip_apart, stage_adamw, stage_arguments, write_checkpoint
from .wrapping import prepared


class SliceObjective(AlignObjective):
    """Alignment of a slice of the model, whose output is kept for the slice after it.

    Args:
        first: the place of its first layer in the whole model.
        layer_count: layers of the whole model that run NHA in this stage.
    """

    stops_early = False
    layer_count = 0

    def __init__(self, *args: Any, first: int, layer_count: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.first, self.layer_count = first, layer_count
        self.states: torch.Tensor | None = None

    def number(self, index: int) -> int:
        return self.first + index

    def seen(self, states: torch.Tensor) -> None:
        self.states = states


class LayerwiseTrainer:
    """Trains one stage of alignment as `NHATrainer` does, with checkpoints that either can go on from.

    Args:
        objective: the whole student's, whose gates are real; its base tensors are not read.
        job: the stage; `runtime.layers_at_once` and `runtime.cached_tokens` are read.
        dataset: map-style, `steps * batch_size` items.
        device: where layers compute.
        base: folder of the base model.
    """

    def __init__(self, objective: Objective, job: StageJob, dataset: Any, device: torch.device, base: Path) -> None:
        assert isinstance(objective, AlignObjective)
        settings = job.settings
        self.objective, self.job, self.dataset, self.device = objective, job, dataset, device
        self.meter, self.stopping = Meter(), False
        self.plan: BatchPlan = plan_batches(settings.batch_size, 1, job.recipe.runtime.micro_batch)
        self.slices = LayerSlices(base, objective.model.config, objective.model.dtype)
        self.learned = [tensor for group in objective.groups() for tensor in group["params"]]
        self.names = {id(tensor): name for name, tensor in objective.model.named_parameters()}
        self.optimizer = stage_adamw(objective.groups())
        arguments = stage_arguments(job, device, self.plan)
        self.scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=arguments.get_warmup_steps(settings.steps),
            num_training_steps=settings.steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        self.state = TrainerState(
            max_steps=settings.steps,
            train_batch_size=arguments.train_batch_size,
            save_steps=int(arguments.save_steps),
            logging_steps=int(arguments.logging_steps),
        )
        self.rows: StageRows | None = None

    @property
    def span(self) -> int:
        """Steps whose hidden states lie on disk at once."""
        tokens = self.job.settings.batch_size * self.job.settings.sequence_length
        return max(1, int(self.job.recipe.runtime.cached_tokens // tokens))

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """All steps, or those after a checkpoint.

        Raises:
            InputError: too little space for a span's hidden states.
            WorkError: the loss is not finite, or no space; the last checkpoint is kept.
        """
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        total = self.job.settings.steps
        self.rows = StageRows(self.job, self.meter, Engine(), total=total, done=self.state.global_step)
        while self.state.global_step < total and not self.stopping:
            start = self.state.global_step
            self._span(start, min(start + self.span, total))
            if start < self.state.global_step < total:
                self._save()

    def close(self) -> None:
        """Ends the progress line, also after an error."""
        if self.rows is not None:
            self.rows.close()

    # ---- a span of steps -----------------------------------------------------------------------
    def _span(self, start: int, end: int) -> None:
        """Steps `start` to `end - 1`, all layers; a stop on the way leaves everything as it was before the span."""
        settings, began = self.job.settings, time.monotonic()
        rates = self._rates(end - start)
        measured: list[dict[str, float]] = [{} for _ in range(start, end)]
        gates = {name: tensor for name, tensor in self.objective.model.named_parameters() if ".nha." in name}
        trained: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
        shape = settings.sequence_length, int(self.objective.model.config.hidden_size)
        rows = (end - start) * settings.batch_size
        at_once = self.job.recipe.runtime.layers_at_once or len(self.slices)
        with (
            naming_a_full_disk(self.job, "hidden states; lower runtime.cached_tokens"),
            HiddenCache(self.job.folder, rows, shape, self.slices.dtype) as cache,
        ):
            needed = 1 + max(index for index, _ in self.objective.layers)
            for first in range(0, needed, at_once):
                layers = range(first, min(first + at_once, needed))
                trained |= self._group(layers, gates, cache, range(start, end), rates, measured)
                if self.stopping:
                    return
        self._take(trained)
        self._report(start, rates, measured, (end - start) / max(time.monotonic() - began, 1e-9))

    def _group(
        self,
        layers: range,
        gates: dict[str, torch.Tensor],
        cache: HiddenCache,
        steps: range,
        rates: list[dict[str, float]],
        measured: list[dict[str, float]],
    ) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        """Some layers over all steps of a span; they are gone from memory when it returns."""
        model = self.slices.load(layers.start, len(layers), gates, self.device)
        group = _Group(self, model, layers.start, cache, steps.start)
        with prepared(model, self.job.recipe.runtime):
            for place, step in enumerate(steps):
                if self.job.stop.is_set():
                    self.stopping = True
                    return {}
                group.step(step, rates[place], measured[place])
        return group.result()

    def _rates(self, steps: int) -> list[dict[str, float]]:
        """The learning rate of each group in each of the next steps; the schedule moves on."""
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the optimizer whose rates these are makes no steps itself
            for _ in range(steps):
                found.append({group["name"]: group["lr"] for group in self.optimizer.param_groups})
                self.scheduler.step()
        return found

    @torch.no_grad()
    def _take(self, trained: dict[str, tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """The gates of the whole student, and their optimizer state, are those that a span's groups ended with."""
        for tensor in self.learned:
            value, state = trained[self.names[id(tensor)]]
            tensor.copy_(value)
            self.optimizer.state[tensor] = state

    def _report(self, start: int, rates: list[Any], measured: list[dict[str, float]], steps_per_second: float) -> None:
        assert self.rows is not None
        for step, values in enumerate(measured, start):
            items = [item for piece in self.plan.pieces(step, 0) for item in piece]
            self.meter.add({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}, items)
            self.meter.end_step()
            self.state.global_step = step + 1
            self.rows.step(step + 1, rates[step - start], steps_per_second)

    # ---- checkpoints ---------------------------------------------------------------------------
    def _save(self) -> None:
        with naming_a_full_disk(self.job, f"the checkpoint of step {self.state.global_step}"):
            plain = {
                OPTIMIZER: optimizer_state(self.optimizer),
                SCHEDULER: self.scheduler.state_dict(),
                RANDOM: [random_state()],
            }
            write_checkpoint(self.job, self.state, trained_tensors(self.objective.model), plain, self.meter, 1)

    def _load(self, folder: Path) -> None:
        load_tensors(self.objective.model, folder / "trained.safetensors")
        load_optimizer_state(self.optimizer, load_plain(folder / OPTIMIZER))
        self.scheduler.load_state_dict(load_plain(folder / SCHEDULER))
        self.meter.load(json.loads((folder / METER).read_text(encoding="utf-8")))
        self.state.global_step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step


class _Group:
    """Some layers in memory, over the steps of one span.

    Args:
        trainer: whose gates and optimizer states they start from.
        model: the layers.
        first: the place of the first of them.
        cache: holds what enters them, and takes what comes out.
        start: the span's first step.
    """

    def __init__(self, trainer: LayerwiseTrainer, model: Any, first: int, cache: HiddenCache, start: int) -> None:
        self.trainer, self.model, self.first, self.cache, self.start = trainer, model, first, cache, start
        whole, job = trainer.objective, trainer.job
        own = [index for index, _ in whole.layers if first <= index < first + model.config.num_hidden_layers]
        self.objective: SliceObjective | None = None
        if not own:  # layers that stay as they are: they only pass on what they are given
            return
        settings = job.settings.model_copy(update={"windows": None})
        self.objective = SliceObjective(
            model, settings, seed=whole.seed, first=first, layer_count=whole.layer_count
        )
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        offsets = {name: _moved(name, first) for name in names.values()}
        sources = {trainer.names[id(tensor)]: tensor for tensor in trainer.learned}
        self.optimizer = stage_adamw(self.objective.groups())
        self.learned = {
            offsets[names[id(tensor)]]: tensor for group in self.objective.groups() for tensor in group["params"]
        }
        for name, tensor in self.learned.items():
            state = trainer.optimizer.state.get(sources[name], {})
            self.optimizer.state[tensor] = {key: _on(value, key, tensor) for key, value in state.items()}

    def step(self, step: int, rates: dict[str, float], measured: dict[str, float]) -> None:
        """One optimizer step of these layers; adds what was measured."""
        trainer, plan = self.trainer, self.trainer.plan
        before = self.start * plan.rows
        if self.objective is not None:
            self.objective.begin_step(step)
        losses = []
        for piece in plan.pieces(step, 0):
            batch = default_collate([trainer.dataset[item] for item in piece])
            place = piece[0] - before
            states = trainer.slices.embed(batch["input_ids"]) if not self.first else self.cache.read(place, len(piece))
            batch = {name: tensor.to(trainer.device) for name, tensor in (batch | {"hidden_states": states}).items()}
            if self.objective is None:
                with torch.no_grad():
                    self.cache.write(place, Objective.run(self.model, batch))
                continue
            loss, values = self.objective(batch, plan.rows)
            loss.backward()
            losses.append(loss.detach())
            for name, value in {"loss": loss, **values}.items():
                measured[name] = measured.get(name, 0.0) + value.item()
            assert self.objective.states is not None
            self.cache.write(place, self.objective.states)
        if self.objective is not None:
            self._update(step, rates, torch.stack(losses), measured)

    def _update(self, step: int, rates: dict[str, float], losses: torch.Tensor, measured: dict[str, float]) -> None:
        assert self.objective is not None
        norm = clip_apart(self.objective.clipped_apart(), self.objective.layer_count)
        if not (losses.isfinite().all() and norm.isfinite()):
            errors = {int(name.rpartition("_")[2]): value for name, value in measured.items() if "/layer_" in name}
            own = {index: value for index, value in errors.items() if index >= self.first}
            worst = max(own, key=lambda index: (own[index] != own[index], own[index], -index))
            raise not_finite(
                self.trainer.job, step + 1, "gradient" if losses.isfinite().all() else "loss", worst
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def result(self) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        """Gates and their optimizer state after the span, on the CPU, by the whole student's names."""
        if self.objective is None:
            return {}
        return {
            name: (
                tensor.detach().cpu(),
                {key: value.cpu() for key, value in self.optimizer.state[tensor].items()},
            )
            for name, tensor in self.learned.items()
        }


def _moved(name: str, first: int) -> str:
    """A name of a slice's tensor as the whole model has it."""
    prefix, found, rest = name.partition("layers.")
    index, _, last = rest.partition(".")
    return f"{prefix}{found}{int(index) + first}.{last}" if found else name


def _on(value: torch.Tensor, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an optimizer's value where it needs it; step counts stay on the CPU."""
    return value.clone() if key == "step" else value.to(tensor.device, copy=True)
