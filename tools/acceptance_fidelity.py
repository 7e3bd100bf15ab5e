"""Acceptance lines of fidelity: what the studies under docs/studies measured, held against their targets.

The studies take an hour and more and keep their rows (`tools/study_memory.py`, `study_init.py`, `study_layers.py`,
`study_quarter.py`); these lines read them and train nothing.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import mean
from typing import Any

from nha_convert.plan import model_dimensions
from nha_convert.recipe import load_recipe
from tools.acceptance_base import ROOT, line
from tools.study_init import spread_of
from tools.study_memory import PROTOCOLS, TEACHERS

STUDIES = ROOT / "docs" / "studies"
PAPER, DEFAULT, GOAL_TOKENS = "key", "attended", 1_000_000
CHOSEN, UNIFORM = "kl, window", "every:"


def study(name: str) -> Any:
    """What a study has measured so far."""
    path = STUDIES / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path.relative_to(ROOT)} is not there; run the study of this name in tools/ first")
    return json.loads(path.read_text(encoding="utf-8"))


def _longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each teacher and window the runs of most tokens, every seed of them."""
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        place = row["teacher"], row["window"]
        most[place] = max(row["tokens"], most.get(place, 0))
    return [row for row in rows if row["tokens"] == most[row["teacher"], row["window"]]]


@line(
    "memory",
    "every layer NHA, M 64, W 32 and 64, at most 4M tokens, align + distill, two teachers",
    "memory recovery >= 0.85, and positive in every layer's own ablation",
)
def memory() -> dict[str, Any]:
    fixed = [row for row in study("memory") if row["window"] != "random"]
    counted = [name for name, protocol in PROTOCOLS.items() if not (protocol.shared or protocol.paper)]
    rows = _longest([row for row in fixed if row["protocol"] in counted])
    parts: list[str] = []
    reached: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # by teacher and window, of each protocol
    for row in rows:
        good = row["final"]["recovery"] >= 0.85 and all(one["nll_gain"] > 0 for one in row["layers"])
        protocols = reached[row["teacher"], row["window"]]
        protocols[row["protocol"]] = protocols.get(row["protocol"], True) and good  # every seed counts
    met = len(reached) >= 4 and all(any(protocols.values()) for protocols in reached.values())
    told = rows + [row for row in fixed if row["protocol"] not in counted]  # other slots, or the paper's: not this line
    for row in told:
        low, high = row["final"]["interval"] or (math.nan, math.nan)
        positive = sum(one["nll_gain"] > 0 for one in row["layers"])
        sure = sum(bool(one["interval"]) and one["interval"][0] > 0 for one in row["layers"])
        parts.append(
            f"{'' if row in rows else 'not counted: '}"
            f"{row['teacher']}, W {row['window']}, {row['protocol']}, seed {row['seed']}: "
            f"{row['final']['recovery']:.3f} ({low:.2f} to {high:.2f}), {positive} of {len(row['layers'])} layers "
            f"positive, {sure} surely, {row['tokens'] / 1e6:.2g}M tokens"
        )
    return {"measured": "; ".join(parts), "met": met}


@line(
    "windows",
    "a model trained with random windows, at W 0, 32, 64, 256 and full, two teachers",
    "NLL monotone in W; full = the teacher within adapter drift",
)
def windows() -> dict[str, Any]:
    rows = _longest([row for row in study("memory") if "at" in row])
    parts, met = [], len({row["teacher"] for row in rows}) >= 2
    for row in rows:
        values = [cell["nll"] for cell in row["at"].values()]
        met = met and all(after <= before for before, after in zip(values, values[1:]))
        drift = 100 * (values[-1] / row["teacher_model"]["nll"] - 1)
        curve = ", ".join(f"{value:.4f}" for value in values)
        parts.append(f"{row['teacher']}, {row['protocol']}: {curve}; full {drift:+.2f} % of the teacher's")
    return {"measured": "; ".join(parts), "met": met}


def _recall(row: dict[str, Any]) -> dict[str, float]:
    return {distance: cell["exact_match"] for distance, cell in row["recall"].items()}


def _choice(seed: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of what a method, or uniform choice, chose."""
    layers = next(chosen for method, chosen in seed["choices"].items() if method.startswith(name))
    found: dict[str, Any] = seed["results"]["full " + ",".join(map(str, layers))]
    return found


def _layer_studies() -> dict[str, Any]:
    names = {"embedded": "layers", "qwen3": "layers-qwen3"}
    return {teacher: study(name) for teacher, name in names.items() if (STUDIES / f"{name}.json").is_file()}


@line(
    "quarter",
    "at most one layer in four full, chosen by `auto`, at most 4M tokens, two teachers",
    "NLL within 1 %, recall >= 0.95 of the teacher's at every distance <= 16 W",
)
def quarter() -> dict[str, Any]:
    rows, parts = _quarters(), []
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    met = len(teachers) >= 2
    for teacher in teachers:
        own = [row for row in rows if row["teacher"] == teacher]
        most = max(_spent(row) for row in own)
        own = [row for row in own if _spent(row) == most]
        trained = f"{most[0] // 1000}k tokens of distillation" if most[0] else "alignment alone"
        trained += f" ({100 * most[2]:.0f} % of recall documents ask from afar)" if most[2] else ""
        change = mean(row["final"]["nll"] / row["base"]["nll"] - 1 for row in own)
        asked = [(row["final"]["recall"], row["base"]["recall"]) for row in own]
        asked += [(row["again"]["final"], row["again"]["base"]) for row in own if "again" in row]
        ratios = {
            distance: sum(ours[distance][0] for ours, _ in asked)
            / max(sum(theirs[distance][0] for _, theirs in asked), 1e-9)
            for distance in own[0]["base"]["recall"]
        }
        met = met and abs(change) <= 0.01 and min(ratios.values()) >= 0.95
        shares = ", ".join(f"{distance}: {ratio:.2f}" for distance, ratio in ratios.items())
        seeds = ", ".join(str(row["seed"]) for row in own)
        parts.append(
            f"{teacher}, {len(own[0]['full'])} of {own[0]['layers']} layers full, rows of {most[1]}, "
            f"{trained}, seeds {seeds}: NLL {100 * change:+.2f} %, "
            f"recall / teacher's {shares}"
        )
    return {"measured": "; ".join(parts), "met": met}


def _spent(row: dict[str, Any]) -> tuple[int, int, float]:
    """Tokens of distillation, tokens of a row, share of far recall documents; rows of the most of them count."""
    return row["distill"], row["length"], row["far"]


def _quarters() -> list[dict[str, Any]]:
    """Rows of the study of a quarter; for a teacher that it lacks, what the study of layers has after alignment."""
    rows: list[dict[str, Any]] = study("quarter")
    known = {row["teacher"] for row in rows}
    for teacher, found in _layer_studies().items():
        length = load_recipe(found["settings"]["recipe"]).stages[0].sequence_length
        for seed in found["seeds"] if teacher not in known else ():
            row: dict[str, Any] = {"teacher": teacher, "seed": seed["seed"], "length": length, "distill": 0, "far": 0.0}
            row |= {"full": seed["choices"][CHOSEN], "layers": model_dimensions(TEACHERS[teacher]).layers}
            for name, result in (("base", seed["results"]["teacher"]), ("final", _choice(seed, CHOSEN))):
                row[name] = {"nll": result["nll"], "recall": {d: [share] for d, share in _recall(result).items()}}
            rows.append(row)
    return rows


@line(
    "auto",
    "`auto` against uniform choice of as many layers",
    "recall at least 10 points better, or the gap at least halved, over 3 seeds",
)
def auto() -> dict[str, Any]:
    parts, met, most = [], True, 0
    for teacher, found in _layer_studies().items():
        seeds = found["seeds"]
        chosen, uniform, whole = (
            mean(mean(_recall(row).values()) for row in rows)
            for rows in (
                [_choice(seed, CHOSEN) for seed in seeds],
                [_choice(seed, UNIFORM) for seed in seeds],
                [seed["results"]["teacher"] for seed in seeds],
            )
        )
        better = chosen - uniform >= 0.1 or (whole - chosen) <= (whole - uniform) / 2
        met, most = met and better, max(most, len(seeds))
        parts.append(
            f"{teacher}, {len(seeds)} seeds: recall {100 * chosen:.1f} % against {100 * uniform:.1f} % (teacher "
            f"{100 * whole:.1f} %)"
        )
    return {"measured": "; ".join(parts), "met": met and most >= 3}


@line(
    "start",
    "default initialisation against the paper's (rows of W_k), same everything else, 3 seeds",
    ">= 2x fewer tokens to the recovery that W_k reaches at 1M; aim 4x",
)
def start() -> dict[str, Any]:
    rows = study("gate-init")["rows"]
    parts, met = [], True
    for teacher in sorted({row["teacher"] for row in rows}):
        cells: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if row["teacher"] == teacher:
                cells.setdefault((row["method"], row["tokens"]), []).append(row["recovery"])
        goal = cells.get((PAPER, GOAL_TOKENS), [])
        if not goal:
            continue
        measured = sorted((t, values) for (method, t), values in cells.items() if method == DEFAULT)
        reached = [t for t, values in measured if mean(values) >= mean(goal)]
        curve = ", ".join(
            f"{t // 1000}k: {spread_of(values)}, {sum(value >= mean(goal) for value in values)} of {len(values)}"
            for t, values in measured
        )
        factor = GOAL_TOKENS / reached[0] if reached and reached[0] else math.inf if reached else 0.0
        met = met and factor >= 2
        parts.append(
            f"{teacher}: W_k at 1M {spread_of(goal)}, {len(goal)} seeds; default, by tokens, and how many seeds reach "
            f"that mean: {curve}; {factor:.3g}x fewer"
        )
    return {"measured": "; ".join(parts), "met": met and bool(parts)}
