"""The main job, from a recipe to an exported and verified model; every finished step is kept and not run again.

Run folder: recipe.yaml, search.json (`auto:N`), plan.json, run.json, gates.safetensors (where gates start from text),
evaluation/*.json, stages/NN-kind/, metrics.jsonl, eval.json, export_check.safetensors, export/, verify.json,
bench.json and report.html.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .bench_checkpoint import BENCH, bench_models
from .convert import load_student, new_parameter_names
from .data import held_out_tokens, recall_filler, training_dataset
from .devices import input_device, working_device, world_of
from .errors import InputError, WorkError
from .evaluate.suite import evaluate_student, evaluate_teacher
from .files import write_json, write_text
from .gate_inputs import GATES, calibrate_gates, calibration_ids
from .gpus import find_machine
from .plan import make_plan
from .plan_memory import stage_cost
from .plan_time import stage_time
from .preflight import preflight
from .provenance import PROVENANCE, provenance
from .publish.export import export_model
from .publish.verify import verify_checkpoint
from .recipe import Recipe, dump_recipe
from .report import write_report
from .search.auto import choose_for_run
from .search.student import started
from .settings_types import NEEDS_TEXT
from .streamed import is_streamed, load_streamed
from .train import run_stage
from .train.batches import plan_batches
from .train.checkpoints import load_tensors, write_tensors
from .train.engine import Engine, RankLostError, start_engine, stop_engine
from .train.faults import check_reporting


def run(recipe: Recipe, out: Path | None = None, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Convert, distil, evaluate, export, verify and report; by one process, or by all that a launcher started.

    Args:
        recipe: resolved settings; with `resume` they must be the run folder's own.
        out: the run folder, the same for all processes; None takes `recipe.output`.
        resume: go on in a folder that an earlier, killed run left.
        quiet: no progress.
    Returns:
        The content of eval.json.
    Raises:
        InputError: the recipe, the model, the folder or the engine is wrong; nothing was written.
        WorkError: a stage failed, or SIGTERM; what was done is kept and `--resume` goes on.
        SystemExit: the same on a process other than rank 0, which leaves the message to rank 0.
    """
    out = Path(out or recipe.output)
    teacher_dir = preflight(recipe, out, resume)
    check_reporting(recipe.runtime.report_to)
    place = working_device(recipe.runtime.device, recipe.runtime.threads)
    check_engine(recipe)
    with stopped_by_sigterm(out):
        engine = start_engine(recipe.runtime, place)
        try:
            return Job(recipe, out, teacher_dir, engine, place, quiet or not engine.main).run(resume)
        except RankLostError:
            raise
        except (InputError, WorkError) as error:
            if engine.main:
                raise
            raise SystemExit(2 if isinstance(error, InputError) else 1) from error
        finally:
            stop_engine()


def check_engine(recipe: Recipe) -> None:
    """
    Raises:
        InputError: a stage's rows cannot be dealt out to the processes, or it cannot run under FSDP2.
    """
    _, world, _ = world_of(os.environ)
    if recipe.runtime.layers_at_once is not None and world > 1:
        raise InputError(
            f"runtime.layers_at_once: {recipe.runtime.layers_at_once} is for one process, found {world}; start the run "
            "without a launcher, or remove it"
        )
    for index, stage in enumerate(recipe.stages):
        plan_batches(stage.batch_size, world, recipe.runtime.micro_batch, f"stages.{index}")
        if recipe.runtime.engine == "fsdp2" and stage.kind == "align" and stage.changes_base:
            raise InputError(
                f"stages.{index}.train: under runtime.engine fsdp2 alignment trains gates alone, found {stage.train}; "
                "set train: gates, or runtime.engine: ddp"
            )


@contextmanager
def stopped_by_sigterm(out: Path) -> Iterator[None]:
    """Inside, SIGTERM ends the run with a line; while a stage trains it is saved first (`StageJob`).

    Raises:
        WorkError: SIGTERM has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise WorkError(
            f"{out}: stopped by SIGTERM; finished stages and measurements are kept, go on with: nha-convert run {out} "
            "--resume"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Job:
    """One run. Rank 0 measures and writes while the others wait; all train.

    Args:
        recipe, out: what to do, and the run folder.
        teacher_dir: the base model's folder.
        engine, place: the processes that train together, and where this one computes.
        quiet: no progress.
    """

    def __init__(self, recipe: Recipe, out: Path, teacher_dir: Path, engine: Engine, place: Any, quiet: bool) -> None:
        self.recipe, self.out, self.teacher_dir = recipe, out, teacher_dir
        self.engine, self.place, self.quiet = engine, place, quiet
        self.home = torch.device("cpu") if engine.kind == "fsdp2" else place  # where the model is between measurements
        self.scratch = out / ".offloaded"
        self.rows: dict[str, dict[str, Any]] = {}
        torch.manual_seed(recipe.seed)

    def run(self, resume: bool) -> dict[str, Any]:
        """All of it; eval.json's content on every rank."""
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a killed process
        try:
            return self._run(resume)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _run(self, resume: bool) -> dict[str, Any]:
        started = time.time()
        recipe, out = self.recipe, self.out
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher_dir)
        with self.engine.main_first("data"):
            self.measure = Measurement(recipe, self.tokenizer, out / "evaluation", self.quiet)
            for index in range(len(recipe.stages)):  # refuses what cannot be read before anything is written
                training_dataset(recipe, index, self.tokenizer, quiet=self.quiet)
            if recipe.nha.gate_init in NEEDS_TEXT:
                calibration_ids(recipe, self.tokenizer, quiet=self.quiet)
        with self.engine.main_first("search"):
            main, quiet = self.engine.main, self.quiet
            recipe = choose_for_run(recipe, out, self.tokenizer, self._load_searched, main=main, quiet=quiet)
        self.recipe = self.measure.recipe = recipe
        if self.engine.main:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "recipe.yaml", dump_recipe(recipe))
            machine = find_machine(count=self.engine.world)
            write_json(out / "plan.json", make_plan(recipe, stage_cost, stage_time, machine))
            write_json(out / PROVENANCE, provenance())
        model: Any = self._load_streamed() if recipe.stages and recipe.by_layer(0) else self._student().to(self.home)
        self._measure(model, "teacher")
        self._measure(model, "swapped", last=not recipe.stages)
        seconds = 0.0
        for index in range(len(recipe.stages)):
            if is_streamed(model) and not recipe.by_layer(index):
                model = self._whole(model)
            model, done = self._stage(model, index, resume)
            seconds += done["seconds"]
            self._measure(model, self._label(index), index=index, last=index == len(recipe.stages) - 1)
        with self.engine.main_first("end"):
            if self.engine.main:
                self._finish(moved(model, self.place), seconds, started)
        return json.loads((out / "eval.json").read_text(encoding="utf-8"))

    def _load(self, recipe: Recipe | None = None) -> Any:
        recipe = recipe or self.recipe
        dtype, length = getattr(torch, recipe.runtime.dtype), recipe.training_length
        return load_student(self.teacher_dir, recipe.nha, dtype=dtype, seed=recipe.seed, length=length)

    def _student(self) -> Any:
        """The student as it starts; gates that start from text are found once, by rank 0, and kept."""
        model, recipe, path = self._load(), self.recipe, self.out / GATES
        if recipe.nha.gate_init not in NEEDS_TEXT:
            return model
        with self.engine.main_first("gates"):
            if self.engine.main and not path.exists():
                ids = calibration_ids(recipe, self.tokenizer, quiet=self.quiet)
                calibrate_gates(model.to(self.place), recipe.nha, ids, seed=recipe.seed)
                parameters = dict(model.named_parameters())
                write_tensors(path, {name: parameters[name] for name in sorted(new_parameter_names(model))})
            load_tensors(model, path)
        return model

    def _load_searched(self, recipe: Recipe) -> Any:
        """The model whose layers are measured for `auto:N`."""
        streamed = bool(recipe.stages) and recipe.by_layer(0)
        if streamed:
            return self._load_streamed(recipe)
        return started(self._load(recipe).to(self.place), recipe, self.tokenizer, quiet=self.quiet)

    def _load_streamed(self, recipe: Recipe | None = None) -> Any:
        """The student of a recipe that trains a few layers at a time: its base tensors stay on disk."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return load_streamed(
            self.teacher_dir,
            (recipe or self.recipe).nha,
            dtype=getattr(torch, self.recipe.runtime.dtype),
            device=self.place,
            scratch=self.scratch,
            seed=self.recipe.seed,
            length=self.recipe.training_length,
        )

    @torch.no_grad()
    def _whole(self, streamed: Any) -> Any:
        """The student in memory, with the gates of one whose base tensors are on disk."""
        model = self._load()
        parameters = dict(model.named_parameters())
        for name in new_parameter_names(streamed):
            parameters[name].copy_(streamed.get_parameter(name))
        return model.to(self.home)

    def _stage(self, model: Any, index: int, resume: bool) -> tuple[Any, dict[str, Any]]:
        def teacher() -> Any:
            base = self._load().to(self.home)
            base.set_windows("full")
            return base.eval()

        return run_stage(
            model,
            self.tokenizer,
            self.recipe,
            index,
            self.out,
            resume=resume,
            quiet=self.quiet,
            teacher=teacher,
            engine=self.engine,
            device=self.place,
            base=self.teacher_dir,
        )

    def _label(self, index: int) -> str:
        """The name of a stage's row in eval.json."""
        kinds = [stage.kind for stage in self.recipe.stages]
        if index == len(kinds) - 1:
            return "final"
        return "aligned" if "align" not in kinds[index + 1 :] and kinds[index] == "align" else f"stage_{index + 1}"

    def _measure(self, model: Any, label: str, *, index: int = -1, last: bool = False) -> None:
        """A row of eval.json, on rank 0, where `model` is moved to its device and back."""
        with self.engine.main_first(f"evaluation/{label}"):
            if not self.engine.main:
                return
            moved(model, self.place)
            if label == "teacher":
                self.rows[label] = self.measure.teacher(model)
            else:
                changed = any(stage.changes_base for stage in self.recipe.stages[: index + 1])
                teacher = self.measure.teacher_model(self.teacher_dir, self.place) if changed else None
                self.rows[label] = self.measure.student(model, label, teacher=teacher, last=last)
            moved(model, self.home)

    def _finish(self, model: Any, seconds: float, started: float) -> None:
        """eval.json, export, verification and report."""
        recipe, out, rows = self.recipe, self.out, self.rows
        rows.setdefault("final", rows["swapped"] | {"label": "final"})
        seconds += sum(row["seconds"] for row in rows.values())  # of a killed run's processes, too
        if recipe.stages and recipe.stages[-1].kind == "align":
            rows["aligned"] = rows["final"] | {"label": "aligned"}
        evaluation = self.measure.summary(rows, seconds=max(seconds, time.time() - started))
        write_json(out / "eval.json", evaluation)
        if not (out / "export").exists():
            _save_export_check(model, self.measure.held_out, out / "export_check.safetensors")
            export_model(
                model,
                self.tokenizer,
                out / "export",
                teacher_dir=self.teacher_dir,
                recipe=recipe,
                evaluation=evaluation,
                max_shard_size=recipe.export.max_shard_size,
            )
        expected = out / "export_check.safetensors"
        verified = verify_checkpoint(out / "export", expected=expected, offload=is_streamed(model))
        write_json(out / "verify.json", verified)
        self._benchmark(model)
        write_report(out)

    def _benchmark(self, model: Any) -> None:
        """bench.json, once; not of a model whose base tensors are read from disk at every step."""
        path, settings = self.out / BENCH, self.recipe.evaluate
        if settings.benchmark and not path.exists() and not is_streamed(model):
            write_json(path, bench_models(model, settings, quiet=self.quiet))


def moved(model: Any, device: torch.device) -> Any:
    """A model on a device; one whose base tensors are on disk stays as it is."""
    return model if is_streamed(model) else model.to(device)


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

    def teacher_model(self, teacher_dir: Path, place: torch.device) -> torch.nn.Module:
        """The teacher as its own model, needed once merged adapters have changed the student's backbone."""
        if self._teacher_model is None:
            dtype = getattr(torch, self.recipe.runtime.dtype)
            teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=dtype)
            self._teacher_model = teacher.to(place).eval()
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
    input_ids = held_out[: 2 * length].view(2, length).to(input_device(model))
    logits = model.eval()(input_ids=input_ids).logits.float().cpu()
    beside = path.with_suffix(".tmp")
    save_file({"input_ids": input_ids.cpu().contiguous(), "logits": logits.contiguous()}, beside)
    os.replace(beside, path)
