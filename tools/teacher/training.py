"""The training loop of the teachers, and what is measured after each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nha_convert.errors import WorkError
from nha_convert.evaluate.nll import eval_windows, evaluating
from nha_convert.evaluate.recall import recall_by_generation
from tools.teacher.run_state import RunState
from tools.teacher.sizes import CONTEXT
from tools.teacher.stages import CircuitStage, Progress, Sources, Stage

WARMUP = 100
"""Steps over which the learning rate rises in every stage."""
DISTANCES = (64, 128, 256, 512, 1024)
"""Tokens between a value and its question in the measurement."""
HELD_OUT_TOKENS = 32_768


class TeacherTraining:
    """One run: the stages in order, from wherever the kept state stands.

    Args:
        model: trained in place, in fp32 on CPU.
        stages: run one after another; each starts with a new optimizer.
        sources: what batches are drawn from.
        state: where the run is kept.
        bound: `minutes` or `tokens`: what ends a stage.
        learning_rate: its peak in every stage.
        save_every: seconds between two saves inside a stage.
    """

    def __init__(
        self,
        model: Any,
        stages: Sequence[Stage],
        sources: Sources,
        state: RunState,
        *,
        bound: str,
        learning_rate: float = 1e-3,
        save_every: float = 60.0,
    ) -> None:
        self.model, self.stages, self.sources, self.state = model, stages, sources, state
        self.bound, self.learning_rate, self.save_every = bound, learning_rate, save_every

    def run(self, tokenizer: Any, held_out: Sequence[int]) -> None:
        """Trains all stages that are left; after each, measures, logs and keeps the model.

        Args:
            tokenizer: of the model, for the questions of the measurement.
            held_out: token ids of text that is not trained on.
        Raises:
            WorkError: the budget of the circuit stage ended before its last level was learned.
        """
        state = self.state
        kept = state.restore(self.model, self.sources)
        while state.stage < len(self.stages):
            stage = self.stages[state.stage]
            self._train(stage, kept)
            kept = None
            if isinstance(stage, CircuitStage) and not stage.complete(state.progress):
                raise WorkError(
                    f"the circuit stage learned {state.progress.level} of its {len(stage.curriculum)} levels; "
                    "give it more with --scale and run again, or try another --seed or --learning-rate"
                )
            start = time.monotonic()
            measured = measure(self.model, tokenizer, held_out)
            state.seconds += time.monotonic() - start
            state.log({"phase": "held_out", "after": stage.name, "step": state.progress.step} | measured)
            self.model.save_pretrained(state.folder / stage.name)
            state.stage, state.progress = state.stage + 1, Progress()
            state.save(self.model, None, self.sources)

    def _train(self, stage: Stage, kept: dict[str, Any] | None) -> None:
        """Steps until the stage's budget is spent or it is complete; the state is saved at its end too."""
        state, progress = self.state, self.state.progress
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay
        )
        if kept is not None:
            optimizer.load_state_dict(kept)
        last_save = time.monotonic()
        while not stage.complete(progress) and (share := stage.budget.share(progress, self.bound)) < 1.0:
            start = time.monotonic()
            factor = min(1.0, (progress.step + 1) / WARMUP) * (1 - share if stage.decays else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * factor
            input_ids, marked = stage.batch(progress, self.sources)
            loss, measures = stage.loss(self.model, input_ids, marked)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            progress.tokens += input_ids.numel()
            spent = time.monotonic() - start
            progress.seconds += spent
            state.seconds += spent
            row = stage.observe(progress, self.sources, measures)
            if row is not None:
                state.log(row)
            if time.monotonic() - last_save >= self.save_every:
                state.save(self.model, optimizer, self.sources)
                last_save = time.monotonic()
        state.save(self.model, optimizer, self.sources)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, held_out: Sequence[int], prompts: int = 56) -> dict[str, Any]:
    """Held-out text and recall by generation, 8 pairs per prompt and every surface form in turn.

    Returns:
        `text_nll` in nats per token over `HELD_OUT_TOKENS` in windows of the full context, and `recall`:
        distance in tokens -> share of exact answers.
    """
    total, count = 0.0, 0
    with evaluating(model):
        windows = eval_windows(torch.tensor(held_out[:HELD_OUT_TOKENS]), CONTEXT, tokenizer.bos_token_id, 4)
        for input_ids in windows:
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # [B,T-1,V]
            targets = input_ids[:, 1:].flatten()
            total += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            count += targets.numel()
    found = recall_by_generation(
        model, tokenizer, held_out, distances=DISTANCES, pairs=8, prompts=prompts, span=CONTEXT - 64, quiet=True
    )
    return {
        "text_nll": total / count,
        "recall": {distance: round(result["exact_match"], 3) for distance, result in found.items()},
    }
