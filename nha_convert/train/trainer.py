"""`transformers.Trainer` around an objective: exact accumulation on any number of ranks, whole checkpoints, metrics.

The loss of a step is one sum over all its micro-batches and ranks, divided by what `Objective.count` found in all of
them, so neither the cut of a batch nor the number of processes changes it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

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
from .faults import naming_a_full_disk, not_finite
from .job import StageJob
from .metrics import Meter
from .objective import Objective
from .random_state import random_state, set_random_state
from .stage_rows import StageRows
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
        self.stopping = False
        self._step_batches: list[dict[str, torch.Tensor]] = []
        self._step_losses: list[torch.Tensor] = []
        self.stage_callback = StageCallback(self)
        self.groups = objective.groups()
        self.learned = [tensor for group in self.groups for tensor in group["params"]]
        optimizer = stage_adamw(self.groups)
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
        losses = torch.stack(self._step_losses)
        norm = clip_apart(self.objective.clipped_apart()).to(losses.device)
        flags = [~torch.isfinite(losses).all(), ~torch.isfinite(norm)]
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
        raise not_finite(self.job, self.state.global_step + 1, what, layer)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm  # it has been found while clipping

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nothing reads it, and counting walks all parameters at each step

    def close(self) -> None:
        """Ends the progress line, also after an error."""
        if self.stage_callback.rows is not None:
            self.stage_callback.rows.close()

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
        plain = {OPTIMIZER: optimizer, SCHEDULER: self.lr_scheduler.state_dict(), RANDOM: states}
        write_checkpoint(self.job, self.state, tensors, plain, self.meter, self.engine.world)

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
    """Tells `StageRows` of every step, and ends the training where SIGTERM asks for it."""

    def __init__(self, trainer: NHATrainer) -> None:
        self.trainer, self.job = trainer, trainer.job
        self.rates: dict[str, float] = {}
        self.rows: StageRows | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, engine = self.trainer, self.trainer.engine
        if engine.rank and not state.global_step:  # other adapters' dropout than rank 0's
            torch.manual_seed(self.job.seed * 1_003 + engine.rank)
        self.rows = StageRows(
            self.job, trainer.meter, engine, total=state.max_steps, done=state.global_step, log=trainer.log
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: group["lr"] for group in self.trainer.optimizer.param_groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.rows is not None
        self.rows.step(state.global_step, self.rates)
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True


def _columns(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without the numbers of its items."""
    return {name: tensor for name, tensor in batch.items() if name != ITEM}


def stage_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """The optimizer of every stage."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def clip_apart(parts: list[list[nn.Parameter]], of: int | None = None) -> torch.Tensor:
    """Scales the gradients of each part so that all of them together keep within `MAX_NORM`.

    Args:
        parts: each is scaled on its own.
        of: parts in all, where only some are given.
    Returns:
        0-dim norm of all gradients before that.
    """
    limit = MAX_NORM / math.sqrt(of or len(parts))
    return torch.stack([clip_gradients(part, limit).cpu() for part in parts]).norm()


def write_checkpoint(
    job: StageJob,
    state: TrainerState,
    tensors: dict[str, torch.Tensor],
    plain: dict[str, Any],
    meter: Meter,
    ranks: int,
) -> None:
    """Everything that a run needs to go on after step `state.global_step`.

    Args:
        tensors: what learns, by name.
        plain: `OPTIMIZER`, `SCHEDULER` and `RANDOM` by file name: tensors, numbers and containers of them.
        meter: rank 0's, after `fold`.
        ranks: processes.
    """
    partial = begin_checkpoint(job.folder, state.global_step)
    write_tensors(partial / TRAINED, tensors)
    for name, content in plain.items():
        with (partial / name).open("wb") as file:  # which says why a write fails; a path would not
            torch.save(content, file)
    (partial / METER).write_text(json.dumps(meter.state()), encoding="utf-8")
    state.save_to_json(str(partial / "trainer_state.json"))
    marker = {"step": state.global_step, "identity": job.identity(), "text": job.text, "ranks": ranks}
    finish_checkpoint(partial, marker)


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
