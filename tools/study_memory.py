"""How much memory a conversion of every layer keeps: align and distill on two teachers, into docs/studies/memory.*

    python tools/study_memory.py --work DIR                            all runs, one after the other (hours on one core)
    python tools/study_memory.py --work DIR --only embedded/32/short   one of them: TEACHER/WINDOW/PROTOCOL
    python tools/study_memory.py                                       only writes the tables of what was measured

Every layer NHA, 64 slots per key/value head, in `shared` on average. A window is a number or `random`, which draws each
layer's window of 32, 64 or 256 at every step, is measured at 64, and then at W = 0, 32, 64, 256 and full. Each run is
`nha-convert run` on a recipe that is kept beside its results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nha_convert.files import write_json, write_text  # noqa: E402
from tools.readme import write_block  # noqa: E402

OUT = ROOT / "docs" / "studies" / "memory"
TEACHERS = {"embedded": "embedded", "qwen3": str(ROOT / "recipes" / "teacher-qwen3")}
RANDOM, MEASURED_AT = [32, 64, 256], ["0", "32", "64", "256", "full"]
SLOTS = 64
SHARED = {"embedded": [32, 160, 32, 32], "qwen3": [64, 192, 32, 32, 32, 32]}
"""SLOTS a layer on average. The embedded teacher's is what `search --slots` proposes on text of training; Qwen3's is by
hand, most where `long`'s own ablation costs most, on the text of the study."""
ALIGN = 250_000
GOAL = 0.85


@dataclass(frozen=True)
class Protocol:
    """How a run is trained.

    Attributes:
        distill: for each stage of distillation after the alignment, its tokens and the sources it reads; None: all.
        gate_rate: learning rate of the gates in these stages.
        shared: the slots of all layers together are shared out as in SHARED; otherwise every layer has SLOTS.
        routed: routed gates and rotated slots (`nha.gate`, `nha.slot_rotary`).
        paper: the paper's layer and start (`nha.layer`).
    """

    sinks: int
    distill: tuple[tuple[int, str | None], ...]
    gate_rate: float
    shared: bool = False
    routed: bool = False
    paper: bool = False

    @property
    def tokens(self) -> int:
        """Of all stages together."""
        return ALIGN + sum(tokens for tokens, _ in self.distill)

    def __str__(self) -> str:
        stages = (f"{tokens / 1e3:,.0f}k of {source or 'the mix'}" for tokens, source in self.distill)
        layers = "; ".join(f"{teacher} {', '.join(map(str, slots))}" for teacher, slots in SHARED.items())
        slots = f"; as many slots in all, by layer: {layers}" if self.shared else ""
        layer = "; routed gates, rotated slots" if self.routed else "; the paper's layer and start" * self.paper
        trained = f"{', then '.join(stages)}, gates at {self.gate_rate:g}"
        return f"{self.sinks or 'no'} sinks, distilled on {trained}{slots}{layer}"


PROTOCOLS = {
    "short": Protocol(sinks=4, distill=((750_000, None),), gate_rate=3e-3),
    "middle": Protocol(sinks=0, distill=((750_000, "recall"), (500_000, None)), gate_rate=5e-3),
    "long": Protocol(sinks=0, distill=((2_250_000, "recall"), (1_500_000, None)), gate_rate=5e-3),
}
PROTOCOLS["shared"] = replace(PROTOCOLS["long"], shared=True)
PROTOCOLS["routed"] = replace(PROTOCOLS["long"], gate_rate=2e-3, routed=True)
PROTOCOLS["paper"] = replace(PROTOCOLS["short"], sinks=0, paper=True)
OWN = [PROTOCOLS[name] for name in ("short", "middle", "long")]
"""Protocols that also train with random windows."""
TOLD = {
    "long": f"{SLOTS} slots in each layer",
    "routed": "routed gates, rotated slots",
    "shared": "as many in all, shared out by layer",
}
"""Protocols of README's table, with what a reader sees."""
TOLD_SEED = 0
RUNS = [
    (teacher, window, name)
    for name, protocol in PROTOCOLS.items()
    for teacher in TEACHERS
    for window in ("32", "64", "random")[: 3 if protocol in OWN else 2]
]


def study_recipe(teacher: str, window: str, protocol: Protocol, seed: int) -> dict[str, Any]:
    """The recipe of one run, as YAML would hold it."""
    windows = {"random_windows": RANDOM} if window == "random" else {}
    common = {"sequence_length": 1024, "batch_size": 1, "save_steps": 100, **windows}
    distill = {
        "kind": "distill",
        "learning_rate": 1.0e-3,
        "gate_learning_rate": protocol.gate_rate,
        "losses": [{"function": "kl"}],
        **common,
    }
    return {
        "model": TEACHERS[teacher],
        "output": "runs/study-memory",
        "seed": seed,
        "nha": {
            "slots": SHARED[teacher] if protocol.shared else SLOTS,
            "window": 64 if window == "random" else int(window),
            **({"layer": "paper"} if protocol.paper else {"sinks": protocol.sinks, "tau": 2}),
            **({"gate": "routed", "slot_rotary": True} if protocol.routed else {}),
        },
        "data": {"sources": [{"source": "stdlib", "weight": 0.7}, {"source": "recall", "weight": 0.3}]},
        "stages": [
            {"kind": "align", "tokens": ALIGN, "learning_rate": 1.0e-2, **common},
            *(
                distill
                | {"name": f"distill-{source or 'mix'}", "tokens": tokens}
                | ({"sources": [source]} if source else {})
                for tokens, source in protocol.distill
            ),
        ],
        "evaluate": {
            "sequence_length": 1024,
            "recall_distances": [2, 4, 8, 16],
            "layer_ablation": True,
            "benchmark": False,
        },
        "runtime": {"device": "cpu", "threads": 1},
    }


def command(*arguments: str) -> None:
    """`nha-convert` with these arguments; its progress goes to this program's output."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *arguments], check=True, env=environment)


def measure(teacher: str, window: str, name: str, seed: int, work: Path) -> dict[str, Any]:
    """One run, from its recipe to what is kept of its eval.json."""
    protocol = PROTOCOLS[name]
    folder = work / f"{teacher}-{window}-{name}-{seed}"
    recipe = folder.with_suffix(".yaml")
    work.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(study_recipe(teacher, window, protocol, seed), sort_keys=False), encoding="utf-8")
    resumed = ["--resume"] if (folder / "recipe.yaml").exists() else []
    command("run", str(recipe), "--out", str(folder), *resumed)
    evaluation = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"teacher": teacher, "window": window, "protocol": name, "seed": seed}
    row["tokens"] = protocol.tokens
    for stage in ("teacher", "swapped", "aligned", "final"):
        measured = evaluation[stage]
        row["teacher_model" if stage == "teacher" else stage] = {
            "nll": measured["nll"],
            "recall": {distance: cell["exact_match"] for distance, cell in measured["recall"].items()},
        }
        if stage != "teacher":
            row[stage] |= {
                "recovery": measured["memory_recovery"],
                "interval": measured["intervals"].get("memory_recovery"),
                "nll_window": measured["ablation"]["window"],
            }
    row["layers"] = [
        {"layer": one["layer"], "nll_gain": one["nll_gain"], "interval": one["interval"]}
        for one in evaluation["final"]["layer_ablation"]
    ]
    if window == "random":
        row["at"] = {size: at_window(teacher, folder, size, work) for size in MEASURED_AT}
    return row


def at_window(teacher: str, folder: Path, window: str, work: Path) -> dict[str, Any]:
    """NLL of a finished run's model with another window, its interval and the teacher's."""
    kept = work / f"{folder.name}-at-{window}.json"
    options = ["--teacher", TEACHERS[teacher], "--set", f"nha.window={window}"]
    command("eval", str(folder), *options, "--no-recall", "--set", "evaluate.layer_ablation=false", "--json", str(kept))
    final = json.loads(kept.read_text(encoding="utf-8"))["final"]
    return {"nll": final["nll"], "interval": final["intervals"]["nll"], "kl": final["kl"]}


# ---- the page ----------------------------------------------------------------------------------------
def between(interval: list[float] | None, form: str = ".2f") -> str:
    """`low to high`."""
    return "–" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def page(rows: list[dict[str, Any]]) -> str:
    """docs/studies/memory.md."""
    lines = [
        "# Memory of a conversion of every layer",
        "",
        "Written by `python tools/study_memory.py --work DIR`: every layer NHA, 64 slots (`shared`: on average; the "
        "embedded teacher's split is what `search --slots` proposes, [training.md](training.md), Qwen3's is by hand, "
        "most where masking a layer's slots costs `long` most on the text that is measured), gates `attended` "
        f"(`paper`: `key`), {ALIGN // 1000}k tokens of alignment at 1e-2, then distillation (KL, gates and LoRA of "
        "rank 8). Teachers: the embedded Llama and [teacher-qwen3](../../recipes/teacher-qwen3/README.md). `random`: "
        f"windows of {', '.join(map(str, RANDOM))} drawn per layer and step, measured at 64. Intervals: 95 %, "
        "bootstrap over windows of held-out text. The mix: 70 % text and 30 % recall documents, as in the held-out "
        "text.",
        "",
        *(f"- `{name}`: {protocol}" for name, protocol in PROTOCOLS.items()),
        "",
        "| teacher | window | protocol | seed | recovery: started | aligned | distilled | 95 % | NLL | layers help |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        final = row["final"]
        sure = sum(one["interval"] is not None and one["interval"][0] > 0 for one in row["layers"])
        cells = [
            row["teacher"],
            row["window"],
            row["protocol"],
            str(row["seed"]),
            *(f"{row[name]['recovery']:.3f}" for name in ("swapped", "aligned", "final")),
            between(final["interval"]),
            f"{100 * (final['nll'] / row['teacher_model']['nll'] - 1):+.2f} %",
            f"{sure} of {len(row['layers'])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"NLL is against the teacher's. The aim was a recovery of {GOAL} and every layer helping: masking its slots "
        "alone costs NLL, with an interval above 0.",
        "",
        "## Recall by generation, by distance in tokens",
        "",
        "| teacher | window | protocol | model | 2 W | 4 W | 8 W | 16 W |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in ("teacher_model", "aligned", "final"):
            cells = [f"{value:.2f}" for value in row[name]["recall"].values()]
            cells += ["–"] * (4 - len(cells))
            labels = row["teacher"], row["window"], row["protocol"], name.split("_")[0]
            lines.append(f"| {' | '.join([*labels, *cells])} |")
    lines += ["", "## What each layer's slots are worth", ""]
    for row in rows:
        gains = (f"{one['layer']}: {one['nll_gain']:.4f} ({between(one['interval'], '.4f')})" for one in row["layers"])
        lines.append(f"- {row['teacher']}, window {row['window']}, {row['protocol']}: {', '.join(gains)}")
    drawn = [row for row in rows if "at" in row]
    if drawn:
        lines += ["", "## One model at many windows", "", "NLL of the models trained with random windows:", ""]
        sizes = " | ".join(f"W {size}" for size in MEASURED_AT)
        lines.append(f"| teacher | protocol | {sizes} | teacher's own | falls |")
        lines.append("|---" * (len(MEASURED_AT) + 4) + "|")
        for row in drawn:
            values = [row["at"][size]["nll"] for size in MEASURED_AT]
            monotone = all(after <= before for before, after in zip(values, values[1:]))
            cells = [f"{row['at'][size]['nll']:.4f} ({between(row['at'][size]['interval'])})" for size in MEASURED_AT]
            cells += [f"{row['teacher_model']['nll']:.4f}", "yes" if monotone else "no"]
            lines.append(f"| {row['teacher']} | {row['protocol']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """README's table: a line per teacher and window, a column per protocol of `TOLD`."""
    lines = []
    for teacher in TEACHERS:
        for window in ("32", "64"):
            own = [row for row in rows if key(row)[:2] == (teacher, window)]
            found = {row["protocol"]: row for row in own if row["seed"] == TOLD_SEED}
            cells = [
                f"{found[name]['final']['recovery']:.3f} ({between(found[name]['final']['interval'])})"
                if name in found
                else "–"
                for name in TOLD
            ]
            lines.append([teacher, window, *cells])
    return lines


def measured_rows() -> list[dict[str, Any]]:
    """What was measured so far, by this process or another."""
    path = OUT.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """The run that a row is of."""
    return row["teacher"], row["window"], row["protocol"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where runs are kept; left out, nothing is run")
    parser.add_argument("--only", nargs="*", help="TEACHER/WINDOW/PROTOCOL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wanted = RUNS if options.only is None else [tuple(name.split("/")) for name in options.only]
    for run in wanted:
        if run not in RUNS:
            raise SystemExit(f"--only {'/'.join(run)} is no run; allowed: {', '.join(map('/'.join, RUNS))}")
    for teacher, window, name in wanted if options.work else []:
        run = teacher, window, name
        if not any((key(row), row["seed"]) == (run, options.seed) for row in measured_rows()):
            row = measure(*run, options.seed, options.work)
            write_json(OUT.with_suffix(".json"), [*measured_rows(), row])
    rows = sorted(measured_rows(), key=lambda row: (RUNS.index(key(row)), row["seed"]))
    write_text(OUT.with_suffix(".md"), page(rows))
    most = max(PROTOCOLS[name].tokens for name in TOLD)
    note = (
        f"Memory recovery after {most / 1e6:g}M tokens, every layer NHA; 1 is the teacher, 0 a dead memory, the aim "
        f"was {GOAL}. One seed ({TOLD_SEED}); in brackets the 95 % interval by bootstrap over held-out windows. "
        "Written by `python tools/study_memory.py`."
    )
    write_block("memory-table", ["teacher", "window", *TOLD.values()], readme_rows(rows), note)


if __name__ == "__main__":
    main()
