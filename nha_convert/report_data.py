"""Reads what a report shows out of a run folder, finished or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nha_convert.errors import InputError
from nha_convert.files import read_json_object
from nha_convert.provenance import PROVENANCE

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class RunData:
    """The files of a run folder; None or empty where there is none.

    Attributes:
        evaluation: eval.json, or the rows measured so far.
        metrics: rows of metrics.jsonl.
        verification, bench: verify.json, bench.json.
        layers: of plan.json.
        recipe, settings: recipe.yaml as text, and read.
        facts: (name, value): command, commit, date, versions, machine, seeds.
    """

    name: str
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    verification: dict[str, Any] | None
    bench: dict[str, Any] | None
    layers: list[dict[str, Any]]
    recipe: str
    settings: dict[str, Any]
    facts: list[tuple[str, str]]


def read_run(run_dir: Path) -> RunData:
    """All of it.

    Raises:
        InputError: not a run folder, or a file of it is damaged.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir}: no recipe.yaml, so this is not a run folder; make one with `nha-convert run`")
    recipe = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{path}: not valid YAML ({said}); restore the run's own file") from error
    settings = settings if isinstance(settings, dict) else {}
    bench = _optional(run_dir / "bench.json")
    return RunData(
        name=run_dir.resolve().name,
        evaluation=read_evaluation(run_dir),
        metrics=_metrics(run_dir),
        verification=_optional(run_dir / "verify.json"),
        bench=bench,
        layers=(_optional(run_dir / "plan.json") or {}).get("layers") or [],
        recipe=recipe,
        settings=settings,
        facts=_facts(run_dir, settings, bench),
    )


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """eval.json, or while the run is unfinished the rows that it has measured so far."""
    evaluation = _optional(run_dir / "eval.json")
    if evaluation is not None:
        return evaluation
    rows = {path.stem: _optional(path) for path in sorted((run_dir / "evaluation").glob("*.json"))}
    measured = {key: row for key, row in rows.items() if row}
    return measured | (measured.get("final") or {}).get("branches", {})


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json_object(path) if path.is_file() else None


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that a killed run left half-written is not one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _facts(run_dir: Path, settings: dict[str, Any], bench: dict[str, Any] | None) -> list[tuple[str, str]]:
    made = _optional(run_dir / PROVENANCE) or {}
    versions = made.get("versions") or (_optional(run_dir / "export" / "export.json") or {}).get("versions") or {}
    evaluate = settings.get("evaluate")
    facts = [
        ("command", made.get("command", NOT_RECORDED)),
        ("begun or last resumed", made.get("date", NOT_RECORDED)),
        ("commit", made.get("commit") or NOT_RECORDED),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or NOT_RECORDED),
        ("machine", made.get("machine", NOT_RECORDED)),
        ("seed of the run", str(settings.get("seed", NOT_RECORDED))),
        ("seed of questions and intervals", str((evaluate or {}).get("seed", NOT_RECORDED))),
    ]
    if bench:
        stamp = bench["environment"]
        parts = [stamp["command"], stamp["date"], f"commit {stamp['commit'] or NOT_RECORDED}", stamp["device_name"]]
        facts.append(("times measured by", " · ".join(parts)))
    return facts
