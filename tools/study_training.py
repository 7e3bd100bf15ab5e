"""What to train, on what, and which extensions of the layer help: variants of one recipe, into docs/studies/training.*

    python tools/study_training.py --work DIR                              all variants, seed 0 (an hour on one core)
    python tools/study_training.py --work DIR --teacher qwen3              on the second teacher
    python tools/study_training.py --work DIR --only "far_weight 1"        some of them
    python tools/study_training.py                                         only writes the tables of what was measured

The base is a teacher with every layer NHA, 64 slots, a window of 32, 4 sinks, gates `attended`, 250k tokens of
alignment. A variant changes settings of it; those with a second stage align for the first half of the tokens. Two calls
at once, for other variants or teachers, share the file of what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from nha_convert.convert import load_student  # noqa: E402
from nha_convert.data import held_out_tokens, recall_filler  # noqa: E402
from nha_convert.evaluate.suite import evaluate_student  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.gate_inputs import calibrate_gates, calibration_ids  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.recipe import Recipe, load_recipe  # noqa: E402
from nha_convert.settings_types import NEEDS_TEXT, PAPER_LAYER  # noqa: E402
from nha_convert.train import run_stage  # noqa: E402
from tools.study_memory import SHARED, TEACHERS  # noqa: E402

OUT = ROOT / "docs" / "studies" / "training"
TOKENS = 250_000
ALIGN = {"kind": "align", "tokens": TOKENS, "sequence_length": 1024, "batch_size": 1, "learning_rate": 1.0e-2}
HALF = {**ALIGN, "tokens": TOKENS // 2}
KL = {**HALF, "kind": "distill", "losses": [{"function": "kl"}]}
WHOLE = {**KL, "learning_rate": 1.0e-3, "gate_learning_rate": 3.0e-3}
GATES = {**KL, "learning_rate": 3.0e-3, "gate_learning_rate": None, "train": "gates"}

ROUTED = {"gate": "routed", "slot_rotary": True}
Variant = tuple[dict[str, Any], list[dict[str, Any]]]
"""Settings of `nha`, where a value may be one for each of TEACHERS by name, and the stages."""
PAPERS: dict[str, Variant] = {
    "the paper's layer and start": (PAPER_LAYER, [ALIGN]),
    "the paper's layer and start, at 3e-2": (PAPER_LAYER, [{**ALIGN, "learning_rate": 3.0e-2}]),
}
BASES: dict[str, Variant] = {"alignment": ({}, [ALIGN]), **PAPERS}
OBJECTIVES: dict[str, Variant] = {
    **BASES,
    "far_weight 1": ({}, [{**ALIGN, "far_weight": 1.0}]),
    "memory_weight 0.5": ({}, [{**ALIGN, "memory_weight": 0.5}]),
    "random windows": ({}, [{**ALIGN, "random_windows": [8, 16, 32, 64, 128]}]),
    "attention, gates": ({}, [HALF, {**GATES, "losses": [{"function": "attention"}]}]),
    "KL, gates": ({}, [HALF, GATES]),
    "KL, gates and LoRA": ({}, [HALF, WHOLE]),
    "KL, gates and q/k/v/o": ({}, [HALF, {**WHOLE, "train": ["gates", "qkvo"]}]),
    "hidden, gates and LoRA": ({}, [HALF, {k: v for k, v in WHOLE.items() if k != "losses"} | {"kind": "hidden"}]),
}
EXTENSIONS: dict[str, Variant] = {
    **BASES,
    "scale alone": ({"slot_bias": False}, [ALIGN]),
    "bias alone": ({"slot_query_scale": False}, [ALIGN]),
    "neither": ({"slot_query_scale": False, "slot_bias": False}, [ALIGN]),
    "no sinks": ({"sinks": 0}, [ALIGN]),
    "32 slots": ({"slots": 32}, [ALIGN]),
    "128 slots": ({"slots": 128}, [ALIGN]),
    "as many slots in all, most where it recalls": ({"slots": SHARED}, [ALIGN]),
    "rotated slots": ({"slot_rotary": True}, [ALIGN]),
    "routed gates": ({"gate": "routed"}, [ALIGN]),
    "routed gates, rotated slots": (ROUTED, [ALIGN]),
    "routed gates, rotated slots, no sinks": (ROUTED | {"sinks": 0}, [ALIGN]),
}
DISTILLED: dict[str, Variant] = {
    f"{name}, distilled": (EXTENSIONS[name][0], [HALF, WHOLE])
    for name in ("scale alone", "bias alone", "neither", "the paper's layer and start", "no sinks")
} | {
    "routed gates, rotated slots, no sinks, distilled": (ROUTED | {"sinks": 0}, [HALF, WHOLE]),
}
TABLES = {
    "Objectives": OBJECTIVES,
    "Extensions": EXTENSIONS,
    "Extensions after distillation": {"KL, gates and LoRA": OBJECTIVES["KL, gates and LoRA"], **DISTILLED},
}
VARIANTS = {name: variant for table in TABLES.values() for name, variant in table.items()}


def study_recipe(variant: Variant, seed: int, teacher: str = "embedded") -> Recipe:
    """A variant of align-only with one of TEACHERS."""
    nha, stages = variant
    own = {field: value[teacher] if isinstance(value, dict) else value for field, value in nha.items()}
    fields = load_recipe("align-only").model_dump()
    fields |= {"model": TEACHERS[teacher], "seed": seed, "stages": stages}
    fields["nha"] |= {"gate_init": "attended"} | own
    fields["runtime"] |= {"threads": torch.get_num_threads()}
    fields["evaluate"] |= {"layer_ablation": True}
    return Recipe.model_validate(fields)


def kept() -> list[dict[str, Any]]:
    """The rows measured so far, by this process or another."""
    path = OUT.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def keep(row: dict[str, Any]) -> None:
    """Adds a row to what was measured so far."""
    path = OUT.with_suffix(".json")
    with FileLock(path.with_suffix(".lock")):
        write_json(path, [*kept(), row])


def measured(name: str, seed: int, teacher: str, work: Path) -> dict[str, Any]:
    """One of VARIANTS, trained and measured."""
    recipe = study_recipe(VARIANTS[name], seed, teacher)
    folder = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_student(folder, recipe.nha, dtype=torch.float32, seed=seed, length=recipe.training_length)
    if recipe.nha.gate_init in NEEDS_TEXT:
        calibrate_gates(model, recipe.nha, calibration_ids(recipe, tokenizer), seed=seed)
    run_dir = work / f"{teacher}-{name.replace(' ', '-').replace('/', '')}-{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)

    def stage_teacher() -> torch.nn.Module:
        return load_student(folder, recipe.nha, dtype=torch.float32)

    def own_teacher() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    for index in range(len(recipe.stages)):
        own = stage_teacher if recipe.needs_teacher(index) else None
        model, _ = run_stage(model, tokenizer, recipe, index, run_dir, resume=True, quiet=True, teacher=own)
    text = held_out_tokens(study_recipe(VARIANTS[name], 0, teacher), tokenizer)  # the same for all seeds
    filler = recall_filler(recipe, tokenizer)
    row = evaluate_student(
        model, tokenizer, text, filler, recipe.evaluate, label=name, teacher=own_teacher(), quiet=True
    )
    shutil.rmtree(run_dir)
    return {
        "variant": name,
        "teacher": teacher,
        "seed": seed,
        "recovery": row["memory_recovery"],
        "interval": row["intervals"]["memory_recovery"],
        "nll": row["nll"],
        "nll_teacher": row["nll_teacher"],
        "nll_window": row["ablation"]["window"],
        "recall": {distance: cell["exact_match"] for distance, cell in row["recall"].items()},
        "layers": [{"nll_gain": one["nll_gain"], "interval": one["interval"]} for one in row["layer_ablation"]],
    }


# ---- the page ----------------------------------------------------------------------------------------
def page(rows: list[dict[str, Any]], before: str) -> str:
    """docs/studies/training.md: what a person wrote, then the tables."""
    lines: list[str] = []
    for title, variants in TABLES.items():
        found = [
            row
            for name in variants
            for teacher in TEACHERS
            for row in rows
            if (row["variant"], row["teacher"]) == (name, teacher)
        ]
        if not found:
            continue
        distances = sorted({int(distance) for row in found for distance in row["recall"]})
        head = ["variant", "teacher", "seed", "recovery", "95 %", "NLL", "window alone", "layers that help"]
        head += [f"recall {distance}" for distance in distances]
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in found:
            interval = "–" if row["interval"] is None else f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"
            help_ = sum(bool(one["interval"]) and one["interval"][0] > 0 for one in row["layers"])
            cells = [row["variant"], row["teacher"], str(row["seed"]), f"{row['recovery']:.3f}", interval]
            cells += [f"{row['nll']:.4f}", f"{row['nll_window']:.4f}", f"{help_} of {len(row['layers'])}"]
            cells += [f"{row['recall'][str(d)]:.2f}" if str(d) in row["recall"] else "–" for d in distances]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return before + "<!-- tables: written by tools/study_training.py -->\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where unfinished runs are kept; left out, nothing is run")
    parser.add_argument("--teacher", choices=list(TEACHERS), default="embedded")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="names of variants")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    for name in options.only if options.work else ():
        asked = (name, options.teacher, options.seed)
        if asked in [(row["variant"], row["teacher"], row["seed"]) for row in kept()]:
            continue
        row = measured(name, options.seed, options.teacher, options.work)
        keep(row)
        print(f"{name}: recovery {row['recovery']:.3f}", flush=True)
    page_path = OUT.with_suffix(".md")
    text = page_path.read_text(encoding="utf-8") if page_path.exists() else "# What to train\n\n"
    write_text(page_path, page(kept(), text.partition("<!-- tables:")[0]))


if __name__ == "__main__":
    main()
