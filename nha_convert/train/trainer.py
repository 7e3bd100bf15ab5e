"""`transformers.Trainer` around an objective: exact accumulation on any number of ranks, whole checkpoints, metrics.

The loss of a step is one sum over all its micro-batches and ranks, divided by what `Objective.count` found in all of
them, so neither the cut of a batch nor the number of processes changes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import WorkError
from .batches import ITEM, BatchPlan, batch_loader, plan_batches
from .checkpoints import (
    TRAINED,
    begin_checkpoint,
    finish_checkpoint,
    load_plain,
    load_tensors,
    trained_tensors,
    write_tensors,
)
from .engine import Engine, clip_gradients, load_optimizer_state, optimizer_state, whole
from .faults import naming_a_full_disk
from .job import StageJob
from .metrics import Meter
from .objective import Objective
from .progress import StageProgress
from .random_state import random_state, set_random_state
from .wrapping import ShardedStep

METER, OPTIMIZER, SCHEDULER, RANDOM = "meter.json", "optimizer.pt", "scheduler.pt", "random.pt"
MAX_NORM = 1.0


class NHATrainer(Trainer):
    """Trains one stage.

    Args:
        objective: what learns and what the loss is; under FSDP2 already spread over the ranks.
        job: the stage.
        dataset: map-style, `steps * batch_size` items.
        device: where this rank computes.
        engine: the processes that train together.
    """

    loss_is_scaled_for_ga = True  # by the step's items

    def __init__(
        self, objective: Objective, job: StageJob, dataset: Dataset, device: torch.device, engine: Engine | None = None
    ) -> None:
        self.engine = engine or Engine()
        self.job, self.objective, self.meter = job, objective, Meter()
        settings, runtime = job.settings, job.recipe.runtime
        where = f"stages.{job.index}"
        self.plan = plan_batches(settings.batch_size, self.engine.world, runtime.micro_batch, where)
        self.metrics_file = job.metrics()
        self.stopping = False
        self._step_batches: list[dict[str, torch.Tensor]] = []
        self._step_losses: list[torch.Tensor] = []
        self.stage_callback = StageCallback(self)
        self.groups = objective.groups()
        self.learned = [tensor for group in self.groups for tensor in group["params"]]
        optimizer = torch.optim.AdamW(self.groups, betas=(0.9, 0.99), weight_decay=0.0)
        super().__init__(
            model=objective,
            args=stage_arguments(job, device, self.plan),
            train_dataset=dataset,
            optimizers=(optimizer, None),
            callbacks=[self.stage_callback],
        )
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # ---- data ----------------------------------------------------------------------------------
    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, in order; a resumed run skips numbers, not data."""
        pin = self.args.dataloader_pin_memory
        return batch_loader(self.train_dataset, self.plan, self.engine.rank, self.job.settings.steps, pin=pin)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """One step's micro-batches, and what they have of the loss's items over all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        count = sum(self.objective.count(_columns(batch)) for batch in batches)
        self.objective.begin_step(self.state.global_step)
        self._step_batches, self._step_losses = batches, []
        return batches, self.engine.total(torch.as_tensor(count).to(self.args.device))

    # ---- the step ------------------------------------------------------------------------------
    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """DDP is accelerate's part; a sharded model needs no more than a way to wait with the exchange."""
        return ShardedStep(self.objective) if self.engine.kind == "fsdp2" else super()._wrap_model(model, training)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.engine.kind != "fsdp2":
            super()._move_model_to_device(model, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the loss, times the ranks, since DDP and FSDP2 take the mean over them."""
        loss, measured = model(_columns(inputs), num_items_in_batch)
        self._step_losses.append(loss.detach())
        self.meter.add({"loss": loss} | measured, inputs[ITEM].tolist())
        loss = loss * self.engine.world
        return (loss, None) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clips, and agrees with all ranks on whether the step counts and whether it is the last.

        Raises:
            WorkError: the loss or a gradient is not finite; no weight has been touched by it.
        """
        self.engine.sum_whole_gradients(self.learned)
        norm = clip_gradients(self.learned, MAX_NORM)
        losses = torch.stack(self._step_losses)
        flags = [~torch.isfinite(losses).all(), ~torch.isfinite(norm).to(losses.device)]
        stop = torch.tensor(self.job.stop.is_set(), device=losses.device)
        bad_loss, bad_norm, stopping = self.engine.highest(torch.stack([*flags, stop]).int()).tolist()
        if bad_loss or bad_norm:
            self._refuse_step("loss" if bad_loss else "gradient")
        self.stopping = bool(stopping)
        self.meter.end_step()
        return norm

    def _refuse_step(self, what: str) -> None:
        """Names the layer to blame: the one that the first rank with a bad loss finds."""
        finite = [bool(torch.isfinite(loss)) for loss in self._step_losses]
        worst = finite.index(False) if False in finite else -1
        batch = self._prepare_inputs(_columns(self._step_batches[worst]))
        found = self.engine.gather((all(finite), self.objective.worst_layer(batch)))
        layer = next((layer for good, layer in found if not good), found[0][1])
        job = self.job
        raise WorkError(
            f"stage {job.name}, step {self.state.global_step + 1}: the {what} is not finite, worst in layer "
            f"{layer}; lower stages.{job.index}.learning_rate (now {job.settings.learning_rate:g}) and "
            f"run into another --out; {job.folder} keeps what was trained before"
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm  # it has been found while clipping

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nothing reads it, and counting walks all parameters at each step

    # ---- checkpoints ---------------------------------------------------------------------------
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Beside first, COMPLETE last, then renamed: a kill at any point leaves the checkpoint before it.

        Raises:
            WorkError: no space; every rank says so.
        """
        tensors = {name: whole(tensor) for name, tensor in trained_tensors(self.objective.model).items()}
        optimizer = optimizer_state(self.optimizer)
        states = self.engine.gather(random_state())
        self.meter.fold(self.engine)
        problem = None
        if self.engine.main:
            try:
                with naming_a_full_disk(self.job, f"the checkpoint of step {self.state.global_step}"):
                    self._write_checkpoint(tensors, optimizer, states)
            except WorkError as error:
                problem = str(error)
        problem = self.engine.from_main(problem)
        if problem is not None:
            raise WorkError(problem)

    def _write_checkpoint(self, tensors: dict[str, torch.Tensor], optimizer: Any, states: list[Any]) -> None:
        step = self.state.global_step
        partial = begin_checkpoint(self.job.folder, step)
        write_tensors(partial / TRAINED, tensors)
        for name, content in ((OPTIMIZER, optimizer), (SCHEDULER, self.lr_scheduler.state_dict()), (RANDOM, states)):
            with (partial / name).open("wb") as file:  # which says why a write fails; a path would not
                torch.save(content, file)
        (partial / METER).write_text(json.dumps(self.meter.state()), encoding="utf-8")
        self.state.save_to_json(str(partial / "trainer_state.json"))
        finish_checkpoint(partial, {"step": step, "identity": self.job.identity(), "ranks": self.engine.world})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_tensors(self.objective.model, folder / TRAINED)
        self.meter.load(json.loads((folder / METER).read_text(encoding="utf-8")), self.engine.main)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer_state(self.optimizer, load_plain(Path(checkpoint) / OPTIMIZER))
        self.lr_scheduler.load_state_dict(load_plain(Path(checkpoint) / SCHEDULER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each rank's own random state; where there were fewer ranks, one that depends on seed, step and rank."""
        if checkpoint is None:
            return
        states = load_plain(Path(checkpoint) / RANDOM)
        if self.engine.rank < len(states):
            set_random_state(states[self.engine.rank])
        else:
            torch.manual_seed((self.job.seed * 1_000_003 + self.state.global_step) * 1_003 + self.engine.rank)


class StageCallback(TrainerCallback):
    """Rows of metrics.jsonl, the progress line, and the stop that SIGTERM asks for."""

    def __init__(self, trainer: NHATrainer) -> None:
        self.trainer, self.job = trainer, trainer.job
        self.rates: dict[str, float] = {}
        self.progress: StageProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.engine
        if engine.rank and not state.global_step:  # other adapters' dropout than rank 0's
            torch.manual_seed(self.job.seed * 1_003 + engine.rank)
        quiet = self.job.quiet or not engine.main
        self.progress = StageProgress(self.job.name, state.max_steps, state.global_step, quiet=quiet)
        self.trainer.meter.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: group["lr"] for group in self.trainer.optimizer.param_groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, every = state.global_step, self.job.recipe.runtime.logging_steps
        if step == 1 or step % every == 0 or step == state.max_steps:
            means, items, steps_per_second = self.trainer.meter.take(self.trainer.engine)
            if self.trainer.engine.main:
                self._row(step, means, items, steps_per_second * self._tokens_per_step())
        if self.progress is not None:
            self.progress.step()
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True

    def _row(self, step: int, means: dict[str, float], items: list[list[int]], rate: float) -> None:
        row = {
            "step": step,
            "tokens": step * self._tokens_per_step(),
            **{name: round(value, 6) for name, value in means.items()},
            **self.rates,
            "tokens_per_second": round(rate, 1),
            "seconds": round(self.trainer.meter.seconds, 1),
        }
        self.trainer.metrics_file.append({**row, "items": items})
        if self.job.recipe.runtime.report_to != "none":
            self.trainer.log({f"{self.job.name}/{name}": value for name, value in row.items()})
        if self.progress is not None:
            self.progress.row(means, rate)

    def _tokens_per_step(self) -> int:
        return self.job.settings.batch_size * self.job.settings.sequence_length

    def close(self) -> None:
        """Ends the line, also after an error."""
        if self.progress is not None:
            self.progress.close()


def _columns(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without the numbers of its items."""
    return {name: tensor for name, tensor in batch.items() if name != ITEM}


def stage_arguments(job: StageJob, device: torch.device, plan: BatchPlan) -> TrainingArguments:
    """A stage's settings as `transformers` has them; nothing is written but checkpoints."""
    stage, runtime = job.settings, job.recipe.runtime
    schedules = {"cosine": "cosine", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    decay = 0.1 if stage.decay is None else stage.decay
    options = {"num_decay_steps": round(decay * stage.steps), "decay_type": "linear"}
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        seed=job.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and plan.ranks > 1 else None,
        ddp_find_unused_parameters=True,  # gates of a layer whose window held the whole text
        ddp_timeout=max(1, int(runtime.rank_timeout)),
        per_device_train_batch_size=stage.batch_size,  # `plan` says what a process really takes
        gradient_accumulation_steps=plan.accumulation,
        max_steps=stage.steps,
        lr_scheduler_type=schedules[stage.schedule],
        lr_scheduler_kwargs=options if stage.schedule == "wsd" else {},
        warmup_steps=round(stage.warmup * stage.steps),
        max_grad_norm=MAX_NORM,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=stage.save_steps,
        report_to=runtime.report_to,
        run_name=f"{job.run_dir.name}-{job.name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device, never through nn.DataParallel
    return arguments
