"""A conversion that keeps one layer in four full, chosen by `auto`, on two teachers, into docs/studies/quarter.*

    python tools/study_quarter.py --work DIR                     both teachers, seed 0 (half an hour on one core)
    python tools/study_quarter.py --work DIR --only qwen3 --seed 1
    python tools/study_quarter.py --work DIR --only qwen3 --distill 1600000   with a longer distillation
    python tools/study_quarter.py --work DIR --only qwen3 --distill 1000000 --far 0.5   half of the recall documents
                                                                                  ask from afar
    python tools/study_quarter.py --work DIR --only qwen3 --distill 1000000 --far 0.5 --again   asks other prompts of a
                                                                  run that was measured before it was asked any
    python tools/study_quarter.py                                only writes the table of what was measured

Each run is the recipe `demo` on one core, with `auto:N`, its teacher, a seed, rows of 1280 tokens (the farthest
question stands at 1024 and more), and 128 recall prompts per distance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.plan import model_dimensions  # noqa: E402
from nha_convert.recipe import load_recipe  # noqa: E402
from tools.study_memory import TEACHERS, command  # noqa: E402

OUT = ROOT / "docs" / "studies" / "quarter"
PROMPTS = 128
OTHER_PROMPTS = 1
"""`evaluate.seed` of prompts that nothing was chosen by; a run's own are those of seed 0."""
LENGTHS = [512, 1024, 1280]
"""Tokens of a training row, of which a step has 2048 at most; 1280 is as far as the teachers go."""
ALIGN, DISTILL = (stage.tokens for stage in load_recipe("demo").stages)
MOST = 4_000_000
"""Tokens that a run may take."""
Run = tuple[str, int, int, int, float]
"""Teacher, seed, tokens of a row, tokens of distillation, share of far recall documents."""


def measure(teacher: str, seed: int, length: int, distill: int, far: float, work: Path) -> dict[str, Any]:
    """One run, and what is kept of its eval.json."""
    folder = run_folder(work, (teacher, seed, length, distill, far))
    layers = model_dimensions(TEACHERS[teacher]).layers
    settings = {
        "model": TEACHERS[teacher],
        "seed": seed,
        "nha.full_attention_layers": f"auto:{layers // 4}",
        "data.sources.recall.far": far,
        "evaluate.recall_prompts": PROMPTS,
        "evaluate.tasks": "[recall]",
        "evaluate.layer_ablation": "false",
        "evaluate.benchmark": "false",
        "runtime.threads": 1,
    }
    for stage, tokens in (("align", ALIGN), ("distill", distill)):
        rows = {"sequence_length": length, "batch_size": 2048 // length, "tokens": tokens}
        settings |= {f"stages.{stage}.{name}": value for name, value in rows.items()}
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    resumed = ["--resume"] if (folder / "recipe.yaml").exists() else []
    command("run", "demo", "--out", str(folder), *changes, *resumed)
    evaluation = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    chosen = json.loads((folder / "search.json").read_text(encoding="utf-8"))["full_attention_layers"]
    row: dict[str, Any] = {"teacher": teacher, "seed": seed, "layers": layers, "full": chosen, "window": 64}
    row |= {"length": length, "distill": distill, "far": far}
    for name in ("teacher", "final"):
        measured = evaluation[name]
        row["base" if name == "teacher" else name] = {"nll": measured["nll"], "recall": recalled(measured)}
    row["final"]["nll_above_teacher"] = evaluation["final"]["intervals"]["nll_above_teacher"]
    return row


def asked_again(run: Run, work: Path) -> dict[str, Any]:
    """Recall of a finished run and its teacher on OTHER_PROMPTS, as many."""
    folder = run_folder(work, run)
    kept = folder / "other_prompts.json"
    settings = [f"evaluate.seed={OTHER_PROMPTS}", f"evaluate.recall_prompts={PROMPTS}", "evaluate.layer_ablation=false"]
    options = ["--teacher", TEACHERS[run[0]], "--json", str(kept)]
    command("eval", str(folder), *options, *(part for one in settings for part in ("--set", one)))
    evaluation = json.loads(kept.read_text(encoding="utf-8"))
    return {"base": recalled(evaluation["teacher"]), "final": recalled(evaluation["final"])}


def recalled(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Distance -> share of prompts, and its interval."""
    cells = measured["recall"].items()
    return {distance: [cell["exact_match"], cell["low"], cell["high"]] for distance, cell in cells}


def run_folder(work: Path, run: Run) -> Path:
    """Where a run is kept."""
    teacher, seed, length, distill, far = run
    return work / f"{teacher}-{seed}-{length}-{distill}-{far:g}"


def key(row: dict[str, Any]) -> Run:
    """The run that a row is of."""
    return row["teacher"], row["seed"], row["length"], row["distill"], row["far"]


def page(rows: list[dict[str, Any]]) -> str:
    """docs/studies/quarter.md."""
    distances = [int(distance) for distance in rows[0]["final"]["recall"]] if rows else []
    head = ["teacher", "seed", "rows of", "far documents", "tokens", "full layers"]
    head += ["NLL against the teacher's (95 %)"]
    head += [f"recall at {distance}: teacher, student" for distance in distances]
    lines = [
        "# One layer in four full",
        "",
        "Written by `python tools/study_quarter.py --work DIR`: the recipe `demo` (W 64, M 64, "
        f"{ALIGN // 1000}k tokens of alignment, then distillation) with the layer that `auto` chooses; {PROMPTS} "
        "prompts per distance, 95 % Wilson intervals; of the NLL, a bootstrap over windows. A step has 2048 "
        "tokens, with rows of 1280 one row. Far documents: the share of recall documents that state everything before "
        "they ask for any of it, 512 tokens and more apart (`far`); the others seldom ask beyond 512 tokens.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        change, *between = (
            100 * value / row["base"]["nll"]
            for value in (row["final"]["nll"] - row["base"]["nll"], *row["final"]["nll_above_teacher"])
        )
        cells = [row["teacher"], str(row["seed"]), str(row["length"]), f"{100 * row['far']:.0f} %"]
        cells += [f"{(ALIGN + row['distill']) / 1e6:g}M", f"{row['full']} of {row['layers']}"]
        cells.append(f"{change:+.2f} % ({between[0]:+.2f} to {between[1]:+.2f})")
        cells += recall_cells(row["base"]["recall"], row["final"]["recall"], distances)
        lines.append(f"| {' | '.join(cells)} |")
    again = [row for row in rows if "again" in row]
    if again:
        lines += [
            "",
            f"## Other prompts ({PROMPTS} of `evaluate.seed={OTHER_PROMPTS}`)",
            "",
            "Nothing was chosen by these: a run is asked them once, when it is finished.",
            "",
            f"| {' | '.join(head[:5] + head[7:])} |",
            "|---" * (5 + len(distances)) + "|",
        ]
    for row in again:
        cells = [row["teacher"], str(row["seed"]), str(row["length"]), f"{100 * row['far']:.0f} %"]
        cells.append(f"{(ALIGN + row['distill']) / 1e6:g}M")
        cells += recall_cells(row["again"]["base"], row["again"]["final"], distances)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recall_cells(base: dict[str, list[float]], final: dict[str, list[float]], distances: list[int]) -> list[str]:
    """Teacher's and student's share by distance, with the student's interval."""
    shares = ((base[distance], final[distance]) for distance in map(str, distances))
    return [f"{theirs[0]:.2f}, {ours[0]:.2f} ({ours[1]:.2f} to {ours[2]:.2f})" for theirs, ours in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where runs are kept; left out, nothing is run")
    parser.add_argument("--only", nargs="*", choices=list(TEACHERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, choices=LENGTHS, default=LENGTHS[-1], help="tokens of a training row")
    parser.add_argument("--distill", type=int, default=DISTILL, help="tokens of the distillation")
    parser.add_argument("--far", type=float, default=0.0, help="share of recall documents that ask from afar")
    parser.add_argument("--again", action="store_true", help="ask other prompts of a run in DIR that has its row")
    options = parser.parse_args()
    if options.again and options.work is None:
        raise SystemExit("--again: the folder of the finished run is needed, --work DIR")
    if not 0 < options.distill <= MOST - ALIGN:
        raise SystemExit(f"--distill {options.distill}: allowed are 1 to {MOST - ALIGN}")
    path = OUT.with_suffix(".json")

    def kept() -> list[dict[str, Any]]:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    for teacher in options.only or TEACHERS if options.work else ():
        run = teacher, options.seed, options.length, options.distill, options.far
        if not any(key(row) == run for row in kept()):
            row = measure(*run, options.work)
            row["again"] = asked_again(run, options.work)
            write_json(path, [*kept(), row])
        elif options.again and not any(key(row) == run and "again" in row for row in kept()):
            again = asked_again(run, options.work)
            write_json(path, [{**row, "again": again} if key(row) == run else row for row in kept()])
    rows = sorted(kept(), key=lambda row: (list(TEACHERS).index(row["teacher"]), *key(row)[1:]))
    write_text(OUT.with_suffix(".md"), page(rows))


if __name__ == "__main__":
    main()
