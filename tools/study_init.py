"""How gates should start: every method of `nha.gate_init` under the same token budgets, into docs/studies/gate-init.*

    python tools/study_init.py TEACHER...                      all methods, seeds and budgets (hours on one core)
    python tools/study_init.py TEACHER --methods key,spread --seeds 0 --tokens 0,250k
    python tools/study_init.py TEACHER --methods attended:128  a start from 128 rows of text (nha.gate_init_rows)
    python tools/study_init.py                                 only writes the table of what was measured

TEACHER is a folder, a Hub id or `embedded`. Each run is `recipes/align-only.yaml` with M 64, W 32, every layer NHA and
its own number of tokens, so that its learning rate falls to 0 at its end. What is measured is kept in
docs/studies/gate-init.json, a row per teacher, method, seed and tokens; a second call goes on where the first stopped,
within a run from its last checkpoint (in --work). Two calls at once, for other methods or teachers, share the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from nha_convert.convert import load_student  # noqa: E402
from nha_convert.data import held_out_tokens, recall_filler  # noqa: E402
from nha_convert.evaluate.suite import evaluate_student, evaluate_teacher  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.gate_init import METHODS  # noqa: E402
from nha_convert.gate_inputs import calibrate_gates, calibration_ids  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.recipe import Recipe, load_recipe  # noqa: E402
from nha_convert.settings_types import NEEDS_TEXT  # noqa: E402
from nha_convert.train import run_stage  # noqa: E402
from tools.readme import write_block  # noqa: E402

OUT = ROOT / "docs" / "studies" / "gate-init"
FULL = (0, 250_000, 1_000_000, 4_000_000)
"""Budgets after which recall is measured, too."""
BETWEEN = (62_500, 125_000, 500_000, 2_000_000)
"""Budgets that are measured without recall, for the curve."""
GOAL = 1_000_000
"""What `key` reaches after so many tokens is what the others have to reach."""
PAPER = "key"
TOLD = (("key", 250_000), ("key", 1_000_000), ("attended", 250_000), ("attended", 1_000_000))
"""Starts and budgets of README's table."""
README_NAMES = {"second": "qwen3"}
"""Teachers that the other studies call so."""


def study_recipe(teacher: str, method: str, seed: int, tokens: int) -> Recipe:
    """align-only with a teacher, a start (`attended`, or `attended:128` from so many rows), a seed and a budget."""
    recipe = load_recipe("align-only")
    fields = recipe.model_dump()
    fields |= {"model": teacher, "seed": seed}
    name, _, rows = method.partition(":")
    fields["nha"] |= {"gate_init": name} | ({"gate_init_rows": int(rows)} if rows else {})
    fields["stages"][0] |= {"tokens": max(tokens, 1)}
    fields["runtime"] |= {"threads": torch.get_num_threads()}
    return Recipe.model_validate(fields)


def kept() -> dict[str, Any]:
    """What was measured so far, by this process or another."""
    path = OUT.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"teachers": {}, "rows": []}


def keep(*, row: dict[str, Any] | None = None, teachers: dict[str, Any] | None = None) -> None:
    """Adds a row, or teachers, to what was measured so far."""
    path = OUT.with_suffix(".json")
    with FileLock(path.with_suffix(".lock")):
        results = kept()
        results["rows"] += [] if row is None else [row]
        results["teachers"] |= teachers or {}
        write_json(path, results)


class Study:
    """One teacher's runs.

    Args:
        name: of the teacher in the table.
        teacher: folder, Hub id or `embedded`.
        work: where unfinished runs keep their checkpoints.
    """

    def __init__(self, name: str, teacher: str, work: Path) -> None:
        self.name, self.teacher, self.work = name, teacher, work
        self.folder = resolve_model(teacher)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        recipe = study_recipe(teacher, PAPER, 0, 0)  # the held-out text is the same for all seeds
        self.settings = recipe.evaluate
        self.held_out = held_out_tokens(recipe, self.tokenizer)
        self.filler = recall_filler(recipe, self.tokenizer)

    def measured(self, method: str, seed: int, tokens: int) -> dict[str, Any]:
        """The row of one run; made if it is not there."""
        for row in kept()["rows"]:
            if (row["teacher"], row["method"], row["seed"], row["tokens"]) == (self.name, method, seed, tokens):
                return row
        row = {"teacher": self.name, "method": method, "seed": seed, "tokens": tokens}
        row |= self._run(method, seed, tokens)
        keep(row=row)
        return row

    def _run(self, method: str, seed: int, tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        recipe = study_recipe(self.teacher, method, seed, tokens)
        model = load_student(self.folder, recipe.nha, dtype=torch.float32, seed=seed, length=recipe.training_length)
        if recipe.nha.gate_init in NEEDS_TEXT:
            ids = calibration_ids(recipe, self.tokenizer)
            calibrate_gates(model, recipe.nha, ids, seed=seed)
        start = time.perf_counter() - started
        done: dict[str, Any] = {}
        if tokens:
            folder = self.work / f"{self.name}-{method}-{seed}-{tokens}"
            folder.mkdir(parents=True, exist_ok=True)
            model, done = run_stage(model, self.tokenizer, recipe, 0, folder, resume=True, quiet=True)
            done = {"align_loss": done["last"]["loss"], "trained_tokens": done["tokens"], "seconds": done["seconds"]}
        whole = tokens in FULL
        row = evaluate_student(
            model,
            self.tokenizer,
            self.held_out,
            self.filler,
            self.settings,
            label=method,
            with_branches=False,
            with_recall=whole,
            quiet=True,
        )
        if tokens:
            shutil.rmtree(folder)
        return {
            "windows": len(self.held_out) // (self.settings.sequence_length - 1),
            "recovery": row["memory_recovery"],
            "nll": row["nll"],
            "nll_teacher": row["nll_teacher"],
            "nll_window": row["ablation"]["window"],
            "kl": row["kl"],
            "recall": {distance: cell["exact_match"] for distance, cell in row.get("recall", {}).items()},
            "slot_mass": [layer["mean"] for layer in row["slot_mass"]],
            "start_seconds": round(start, 1),
        } | done

    def teacher_row(self) -> None:
        """NLL and recall of the teacher, kept under its name."""
        if self.name not in kept()["teachers"]:
            model = load_student(self.folder, study_recipe(self.teacher, "zero", 0, 0).nha, dtype=torch.float32)
            row = evaluate_teacher(model, self.tokenizer, self.held_out, self.filler, self.settings, quiet=True)
            recall = {distance: cell["exact_match"] for distance, cell in row["recall"].items()}
            keep(teachers={self.name: {"nll": row["nll"], "recall": recall}})


def _rows(method: str) -> int:
    """Rows of text that a method's name asks for; 0 where it has the default."""
    return int(method.partition(":")[2] or 0)


# ---- the table ---------------------------------------------------------------------------------------
def spread_of(values: list[float], form: str = ".3f") -> str:
    """Mean, and where there is more than one value, their range."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{form}}"
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def tokens_to_reach(curve: dict[int, float], goal: float) -> str:
    """Where a curve of recovery against tokens first meets the goal, linear in log tokens between its points."""
    points = sorted((tokens, value) for tokens, value in curve.items() if tokens)
    before = None
    for tokens, value in points:
        if value >= goal:
            if before is None:
                return f"at most {tokens / 1000:.0f}k"
            share = (goal - before[1]) / (value - before[1])
            return f"{math.exp(math.log(before[0]) + share * math.log(tokens / before[0])) / 1000:.0f}k"
        before = (tokens, value)
    return f"more than {points[-1][0] / 1000:.0f}k" if points else "–"


def table(results: dict[str, Any], teacher: str) -> list[str]:
    """The lines of one teacher's table."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        if row["teacher"] == teacher:
            cells[row["method"], row["tokens"]].append(row)
    budgets = sorted({tokens for _, tokens in cells})
    measured = {method for method, _ in cells}
    methods = sorted(measured, key=lambda method: (METHODS.index(method.partition(":")[0]), _rows(method)))
    recoveries = {key: [row["recovery"] for row in rows] for key, rows in cells.items()}
    curves = {
        method: {tokens: sum(v) / len(v) for (name, tokens), v in recoveries.items() if name == method}
        for method in methods
    }
    goal = curves.get(PAPER, {}).get(GOAL)
    head = [f"{tokens / 1000:g}k" for tokens in budgets]
    lines = [f"| start | {' | '.join(head)} | tokens to `{PAPER}` at 1M |", "|---" * (len(head) + 2) + "|"]
    for method in methods:
        values = [spread_of(recoveries[method, t]) if (method, t) in cells else "–" for t in budgets]
        reach = "–" if goal is None else tokens_to_reach(curves[method], goal)
        lines.append(f"| `{method}` | {' | '.join(values)} | {reach} |")
    lines += ["", "Recall (share of prompts answered exactly), by distance in tokens:", ""]
    known = results["teachers"].get(teacher, {"recall": {}})["recall"]
    asked = {int(distance) for rows in cells.values() for row in rows for distance in row["recall"]}
    distances = sorted(asked | set(map(int, known)))
    lines += [f"| start | tokens | {' | '.join(map(str, distances))} |", "|---" * (len(distances) + 2) + "|"]
    lines.append(f"| teacher | | {' | '.join(f'{known[str(d)]:.2f}' if str(d) in known else '–' for d in distances)} |")
    for method in methods:
        for tokens in budgets:
            rows = [row for row in cells.get((method, tokens), []) if row["recall"]]
            if rows:
                values = [spread_of([row["recall"][str(d)] for row in rows], ".2f") for d in distances]
                lines.append(f"| `{method}` | {tokens / 1000:g}k | {' | '.join(values)} |")
    return lines


def write_study(results: dict[str, Any]) -> None:
    """docs/studies/gate-init.md: the tables, between what a person wrote before and after them."""
    path = OUT.with_suffix(".md")
    begin, end = "<!-- tables: written by tools/study_init.py -->", "<!-- end of tables -->"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# How gates should start\n\n{begin}\n{end}\n"
    parts: list[str] = []
    for teacher in sorted({row["teacher"] for row in results["rows"]}):
        seeds = sorted({row["seed"] for row in results["rows"] if row["teacher"] == teacher})
        intro = (
            "Memory recovery after so many tokens of alignment; mean, and the range where more than one of the seeds "
            f"({', '.join(map(str, seeds))}) was run."
        )
        parts += [f"## Teacher `{teacher}`", "", intro, "", *table(results, teacher), ""]
    before, _, rest = text.partition(begin)
    write_text(path, before + begin + "\n\n" + "\n".join(parts) + "\n" + end + rest.partition(end)[2])


def readme_rows(results: dict[str, Any]) -> list[list[str]]:
    """README's table: a line per teacher, a column per start and budget of `TOLD`."""
    cells: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in results["rows"]:
        cells[row["teacher"], row["method"], row["tokens"]].append(row["recovery"])

    def said(values: list[float]) -> str:
        return f"{spread_of(values)}, {len(values)} seed{'s' * (len(values) > 1)}" if values else "–"

    return [
        [README_NAMES.get(teacher, teacher), *(said(cells[teacher, method, tokens]) for method, tokens in TOLD)]
        for teacher in sorted(results["teachers"])
    ]


def tokens_given(text: str) -> list[int]:
    """`0,250k,1M` as numbers."""
    units = {"k": 10**3, "m": 10**6}
    return [int(float(one.rstrip("kKmM")) * units.get(one[-1].lower(), 1)) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teachers", nargs="*", help="NAME=MODEL, or MODEL alone")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", default=",".join(map(str, sorted(FULL + BETWEEN))))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study-init")
    options = parser.parse_args()
    logging.disable_progress_bar()
    for given in options.teachers:
        name, _, teacher = given.rpartition("=")
        study = Study(name or Path(teacher).name, teacher, options.work)
        study.teacher_row()
        for tokens in tokens_given(options.tokens):
            for seed in map(int, options.seeds.split(",")):
                for method in options.methods.split(","):
                    row = study.measured(method, seed, tokens)
                    line = f"{study.name} {method} seed {seed} {tokens} tokens: recovery {row['recovery']:.3f}"
                    print(line, flush=True)
    with FileLock(OUT.with_suffix(".lock")):
        results = kept()
        write_study(results)
        header = ["teacher", *(f"`{method}`, {tokens / 1e6:g}M tokens" for method, tokens in TOLD)]
        note = (
            "Memory recovery after alignment alone, 64 slots in each layer, window 32: mean over seeds, and their "
            "range. `key` is the paper's start, `attended` the default. Written by `python "
            "tools/study_init.py`."
        )
        write_block("start-table", header, readme_rows(results), note)


if __name__ == "__main__":
    main()
