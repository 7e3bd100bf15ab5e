"""The main job, from a recipe to an exported and verified model; every finished step is kept and not run again.

Run folder: recipe.yaml, plan.json, evaluation/*.json, stages/NN-kind/, metrics.jsonl, eval.json,
export_check.safetensors, export/, verify.json, report.html.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .convert import load_student
from .data import held_out_tokens, recall_filler, training_dataset
from .devices import find_device
from .evaluate.suite import evaluate_student, evaluate_teacher
from .files import write_json, write_text
from .plan import make_plan
from .preflight import preflight
from .publish.export import export_model
from .publish.verify import verify_checkpoint
from .recipe import Recipe, dump_recipe
from .report import write_report
from .train import run_stage


def run(recipe: Recipe, out: Path | None = None, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Convert, distil, evaluate, export, verify and report.

    Args:
        recipe: resolved settings; with `resume` they must be the run folder's own.
        out: the run folder; None takes `recipe.output`.
        resume: go on in a folder that an earlier, killed run left.
        quiet: no progress bars.
    Returns:
        The content of eval.json.
    Raises:
        InputError: the recipe, the model or the folder is wrong; nothing was written.
        WorkError: a stage failed; what was done is kept and `--resume` goes on.
    """
    started = time.time()
    out = Path(out or recipe.output)
    teacher_dir = preflight(recipe, out, resume)
    _prepare(recipe)
    place = find_device(recipe.runtime.device)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    measure = Measurement(recipe, tokenizer, out / "evaluation", quiet)
    for index in range(len(recipe.stages)):
        training_dataset(
            recipe, index, tokenizer, quiet=quiet
        )  # refuses what cannot be read before anything is written
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    write_json(out / "plan.json", make_plan(recipe))
    model = load_student(teacher_dir, recipe.nha, dtype=getattr(torch, recipe.runtime.dtype), seed=recipe.seed)
    model.to(place)
    rows = {"teacher": measure.teacher(model)}
    rows["swapped"] = measure.student(model, "swapped", teacher=None, last=not recipe.stages)
    aligns = [index for index, stage in enumerate(recipe.stages) if stage.kind == "align"]
    seconds = 0.0
    for index, stage in enumerate(recipe.stages):
        model, done = run_stage(model, tokenizer, recipe, index, out, resume=resume, quiet=quiet)
        last = index == len(recipe.stages) - 1
        seconds += done["seconds"]
        label = "final" if last else "aligned" if index == aligns[-1] else f"stage_{index + 1}"
        teacher = None if stage.kind == "align" else measure.teacher_model(teacher_dir)
        rows[label] = measure.student(model, label, teacher=teacher, last=last)
    rows.setdefault("final", rows["swapped"] | {"label": "final"})
    seconds += sum(row["seconds"] for row in rows.values())  # of a killed run's processes, too
    if recipe.stages and recipe.stages[-1].kind == "align":
        rows["aligned"] = rows["final"] | {"label": "aligned"}
    evaluation = measure.summary(rows, seconds=max(seconds, time.time() - started))
    write_json(out / "eval.json", evaluation)
    if not (out / "export").exists():
        _save_export_check(model, measure.held_out, out / "export_check.safetensors")
        export_model(
            model,
            tokenizer,
            out / "export",
            teacher_dir=teacher_dir,
            recipe=recipe,
            evaluation=evaluation,
            max_shard_size=recipe.export.max_shard_size,
        )
    write_json(out / "verify.json", verify_checkpoint(out / "export", expected=out / "export_check.safetensors"))
    write_report(out)
    return evaluation


def _prepare(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    if recipe.runtime.threads is not None:
        torch.set_num_threads(recipe.runtime.threads)


class Measurement:
    """Measures rows of eval.json once each and keeps them, so that a resumed run measures nothing twice."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, quiet: bool) -> None:
        self.recipe, self.tokenizer, self.folder, self.quiet = recipe, tokenizer, folder, quiet
        self.held_out = held_out_tokens(recipe, tokenizer)
        self.filler = recall_filler(recipe, tokenizer)
        self._teacher_model: torch.nn.Module | None = None

    def _kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        row = measure()
        write_json(path, row)
        return row

    def teacher(self, model: torch.nn.Module) -> dict[str, Any]:
        """The teacher's row, measured with the student's own untouched backbone."""
        return self._kept(
            "teacher",
            lambda: evaluate_teacher(
                model,
                self.tokenizer,
                self.held_out,
                self.filler,
                self.recipe.evaluate,
                quiet=self.quiet,
            ),
        )

    def student(
        self, model: torch.nn.Module, label: str, *, teacher: torch.nn.Module | None, last: bool
    ) -> dict[str, Any]:
        """A student's row; the last one with every branch alone, and the window's own recall."""
        return self._kept(
            label,
            lambda: evaluate_student(
                model,
                self.tokenizer,
                self.held_out,
                self.filler,
                self.recipe.evaluate,
                teacher=teacher,
                label=label,
                with_branches=last,
                with_window_recall=last,
                quiet=self.quiet,
            ),
        )

    def teacher_model(self, teacher_dir: Path) -> torch.nn.Module:
        """The teacher as its own model, needed once merged adapters have changed the student's backbone."""
        if self._teacher_model is None:
            dtype = getattr(torch, self.recipe.runtime.dtype)
            teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=dtype)
            self._teacher_model = teacher.to(find_device(self.recipe.runtime.device)).eval()
        return self._teacher_model

    def summary(self, rows: dict[str, dict[str, Any]], *, seconds: float) -> dict[str, Any]:
        """eval.json: all rows, the final model's ablations as rows, memory recovery per student."""
        recovery = {name: row["memory_recovery"] for name, row in rows.items() if name != "teacher"}
        return {
            **rows,
            **rows["final"]["branches"],
            "memory_recovery": recovery,
            "settings": json.loads(self.recipe.model_dump_json()),
            "seconds": round(seconds, 1),
        }


@torch.no_grad()
def _save_export_check(model: torch.nn.Module, held_out: torch.Tensor, path: Path) -> None:
    """Logits of the run's own model on held-out text, that the exported folder must reproduce."""
    length = min(256, held_out.numel() // 2)
    input_ids = held_out[: 2 * length].view(2, length).to(next(model.parameters()).device)
    logits = model.eval()(input_ids=input_ids).logits.float().cpu()
    beside = path.with_suffix(".tmp")
    save_file({"input_ids": input_ids.cpu().contiguous(), "logits": logits.contiguous()}, beside)
    os.replace(beside, path)
