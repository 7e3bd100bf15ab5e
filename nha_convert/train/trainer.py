"""`transformers.Trainer` with our losses, checkpoints of trained tensors, our metrics and a stop on SIGTERM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import WorkError
from ..modeling.attention_nha import nha_layers
from .checkpoints import TRAINED, begin_checkpoint, finish_checkpoint, load_tensors, trained_tensors, write_tensors
from .job import StageJob
from .metrics import Meter

METER = "meter.json"


class NHATrainer(Trainer):
    """Trains one stage; a subclass says what learns and what the loss is.

    Items are read in order, losses are means per token over equal windows, so accumulated steps equal large ones.
    A checkpoint holds the trained tensors, optimizer, schedule, random states and half-filled metrics.

    Args:
        model: plain language model; what learns has `requires_grad`.
        job: the stage.
        dataset: map-style, `steps * batch_size` items.
        groups: optimizer groups with `name`, `params` and `lr`.
        accumulation: batches per optimizer step.
    """

    def __init__(
        self, model: Any, job: StageJob, dataset: Dataset, groups: list[dict[str, Any]], accumulation: int = 1
    ) -> None:
        self.job, self.groups, self.meter = job, groups, Meter()
        self.measured: dict[str, torch.Tensor] = {}
        self.metrics_file = job.metrics()
        self.stage_callback = StageCallback(self)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        super().__init__(
            model=model,
            args=stage_arguments(job, next(model.parameters()).device, accumulation),
            train_dataset=dataset,
            data_collator=default_data_collator,
            optimizers=(optimizer, None),
            callbacks=[self.stage_callback],
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # ---- what a subclass defines ---------------------------------------------------------------
    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch [B, T], mean per token, and what else is measured, detached."""
        raise NotImplementedError

    def worst_layer(self, input_ids: torch.Tensor) -> int:
        """The first layer whose attention output is not finite, else the one with the largest."""
        peaks: dict[int, float] = {}

        def record(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                peak = output[0].detach().abs().max().item()
                peaks[index] = peak if peak == peak else float("inf")

            return hook

        handles = [layer.register_forward_hook(record(index)) for index, layer in nha_layers(self.model)]
        try:
            with torch.no_grad():
                self.decoder(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return max(peaks, key=lambda index: (peaks[index], -index))

    @property
    def decoder(self) -> nn.Module:
        """The model without its language-model head."""
        return getattr(self.model, self.model.base_model_prefix)

    # ---- Trainer's own steps -------------------------------------------------------------------
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, self.measured = self.losses(inputs["input_ids"], inputs["labels"])
        self.meter.add({"loss": loss} | self.measured)
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch forward and backward.

        Raises:
            WorkError: the loss or a gradient is not finite; no weight has been touched by it.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        gradients = [tensor.grad for group in self.optimizer.param_groups for tensor in group["params"]]
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if not bool(torch.isfinite(loss + norm)):
            what = "loss" if not bool(torch.isfinite(loss)) else "gradient"
            layer = self.worst_layer(self._prepare_inputs(inputs)["input_ids"])
            raise WorkError(
                f"stage {self.job.name}, step {self.state.global_step + 1}: the {what} is not finite, worst in layer "
                f"{layer}; lower stages.{self.job.index}.learning_rate (now {self.job.settings.learning_rate:g}) and "
                f"run into another --out; {self.job.folder} keeps what was trained before"
            )
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nothing reads it, and counting walks all parameters at each step

    # ---- checkpoints ---------------------------------------------------------------------------
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Beside first, COMPLETE last, then renamed: a kill at any point leaves the checkpoint before it."""
        step = self.state.global_step
        partial = begin_checkpoint(self.job.folder, step)
        write_tensors(partial / TRAINED, trained_tensors(self.model))
        self._save_optimizer_and_scheduler(str(partial))
        self._save_rng_state(str(partial))
        (partial / METER).write_text(json.dumps(self.meter.state()), encoding="utf-8")
        self.state.save_to_json(str(partial / "trainer_state.json"))
        finish_checkpoint(partial, {"step": step, "identity": self.job.identity()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_tensors(self.model, folder / TRAINED)
        self.meter.load(json.loads((folder / METER).read_text(encoding="utf-8")))


class StageCallback(TrainerCallback):
    """Rows of metrics.jsonl, the progress bar, and the stop that SIGTERM asks for."""

    def __init__(self, trainer: NHATrainer) -> None:
        self.trainer, self.job = trainer, trainer.job
        self.rates: dict[str, float] = {}
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            desc=self.job.name,
            total=state.max_steps,
            initial=state.global_step,
            disable=True if self.job.quiet else None,
            dynamic_ncols=True,
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: group["lr"] for group in self.trainer.optimizer.param_groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, every = state.global_step, self.job.recipe.runtime.logging_steps
        if step == 1 or step % every == 0 or step == state.max_steps:
            means = self.trainer.meter.take()
            self.trainer.metrics_file.append(
                {
                    "step": step,
                    "tokens": step * args.gradient_accumulation_steps * self._tokens_per_batch(),
                    **{name: round(value, 6) for name, value in means.items()},
                    **self.rates,
                    "seconds": round(self.trainer.meter.seconds, 1),
                }
            )
            self.bar.set_postfix(loss=f"{means['loss']:.4g}")
        self.bar.update()
        if self.job.stop.is_set():
            control.should_save = control.should_training_stop = True

    def _tokens_per_batch(self) -> int:
        return self.job.settings.batch_size * self.job.settings.sequence_length

    def close(self) -> None:
        """Ends the bar, also after an error."""
        if self.bar is not None:
            self.bar.close()


def stage_arguments(job: StageJob, device: torch.device, accumulation: int = 1) -> TrainingArguments:
    """A stage's settings as `transformers` has them; nothing is written but checkpoints."""
    stage = job.settings
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        seed=job.seed,
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=-(-stage.steps // accumulation),
        lr_scheduler_type="cosine",
        warmup_steps=round(stage.warmup * stage.steps / accumulation),
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=stage.save_steps,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device, never through nn.DataParallel
    return arguments
