"""report.html: what a run measured, on one page that needs no network.

Reads the run folder only (recipe.yaml, eval.json or evaluation/*.json, metrics.jsonl, verify.json). What is not there
yet is shown as not measured.
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from nha_convert import report_plots
from nha_convert.errors import InputError
from nha_convert.evaluate.table import NOT_MEASURED, table_header, table_notes, table_rows

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --text: #1b1f24; --soft: #5b6470; --grid: #d9dde3;
  --teacher: #1b1f24; --window-only: #8a8f98; --memory-only: #9a6fc2; --no-attention: #b08b4f; --swapped: #c8453b;
  --aligned: #d98a00; --final: #1769c2; --other: #2f8f6b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --text: #e6e9ed; --soft: #9aa3ae;
  --grid: #363c45; --teacher: #e6e9ed; --window-only: #858c96; --memory-only: #b895dd; --no-attention: #c9a96e;
  --swapped: #ef7a70; --aligned: #f0b040; --final: #6cb2ff; --other: #5fc79d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { background: var(--card); border-left: .3rem solid var(--final); border-radius: .4rem; padding: .6rem 1rem; }
.verdict p { margin: .3rem 0; } .verdict .lead { font-size: 1.2rem; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.final td { font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: .4rem; padding: .7rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; } figcaption { margin-bottom: .3rem; }
pre { overflow-x: auto; background: var(--card); border-radius: .4rem; padding: .8rem; font-size: .8rem; }
summary { cursor: pointer; }
"""


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder, finished or not.

    Args:
        run_dir: what `nha-convert run` made.
    Returns:
        The page's path; it is written beside and renamed.
    Raises:
        InputError: not a run folder.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise InputError(f"{run_dir}: no recipe.yaml, so this is not a run folder; make one with `nha-convert run`")
    evaluation = read_evaluation(run_dir)
    recipe = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    page = _page(run_dir.name, evaluation, _read_metrics(run_dir), _read_json(run_dir / "verify.json"), recipe)
    beside = run_dir / "report.html.tmp"
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, run_dir / "report.html")
    return run_dir / "report.html"


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """eval.json, or while the run is unfinished the rows that it has measured so far."""
    evaluation = _read_json(run_dir / "eval.json")
    if evaluation is not None:
        return evaluation
    rows = {path.stem: _read_json(path) for path in sorted((run_dir / "evaluation").glob("*.json"))}
    measured = {key: row for key, row in rows.items() if row}
    return measured | (measured.get("final") or {}).get("branches", {})


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that a killed run left half-written is not one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def verdict(evaluation: dict[str, Any], verification: dict[str, Any] | None) -> list[str]:
    """The run in a few sentences, the most important one first; only what was measured, and what was not."""
    teacher, final = evaluation.get("teacher") or {}, evaluation.get("final") or {}
    if "nll" not in final or "nll" not in teacher:
        sentences = ["The run is not finished: the final model is not measured."]
    else:
        change = 100 * (final["nll"] / teacher["nll"] - 1)
        side = "above" if change >= 0 else "below"
        sentences = [
            f"The student's NLL is {final['nll']:.4f}, {abs(change):.2f} % {side} the teacher's {teacher['nll']:.4f}."
        ]
    sentences += [*_recall_sentences(evaluation), *_recovery_sentences(evaluation)]
    if verification is None:
        sentences.append("The exported model is not verified.")
    elif verification.get("passed"):
        difference = verification.get("max_logit_difference")
        detail = "" if difference is None else f" (largest logit difference {difference:.1e})"
        sentences.append(f"The exported model, loaded without this package, gives the run's logits{detail}.")
    else:
        sentences.append("The exported model failed its verification.")
    return sentences


def _recall_sentences(evaluation: dict[str, Any]) -> list[str]:
    final = (evaluation.get("final") or {}).get("recall") or {}
    teacher = (evaluation.get("teacher") or {}).get("recall") or {}
    both = [distance for distance in final if distance in teacher]
    if not both:
        return ["Recall against the teacher is not measured."]
    parts = [f"{final[d]['exact_match']:.2f} at {d} tokens (teacher {teacher[d]['exact_match']:.2f})" for d in both]
    return [f"Recall beyond the window, exact match: {', '.join(parts)}."]


def _recovery_sentences(evaluation: dict[str, Any]) -> list[str]:
    recovery = evaluation.get("memory_recovery") or {
        key: row.get("memory_recovery") for key, row in evaluation.items() if isinstance(row, dict)
    }
    parts = [f"{recovery[key]:.3f} {key}" for key in ("swapped", "aligned", "final") if recovery.get(key) is not None]
    if not parts:
        return ["Memory recovery is not measured."]
    return [f"Memory recovery (1 is the teacher, 0 a dead memory): {', '.join(parts)}."]


def _page(
    name: str,
    evaluation: dict[str, Any],
    metrics: list[dict[str, Any]],
    verification: dict[str, Any] | None,
    recipe: str,
) -> str:
    lead, *rest = (html.escape(sentence) for sentence in verdict(evaluation, verification))
    seconds = evaluation.get("seconds")
    duration = f" · {seconds / 60:.1f} minutes" if isinstance(seconds, (int, float)) else ""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(name)} · nha-convert</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="soft">Softmax attention converted to Native Hybrid Attention by nha-convert{duration}</p>',
        f'<section class="verdict"><p class="lead">{lead}</p>{"".join(f"<p>{text}</p>" for text in rest)}</section>',
        "<h2>Measured</h2>",
        _table(evaluation),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_figures(evaluation, metrics))}</div>',
        "<h2>Recipe</h2>",
        f"<details open><summary>recipe.yaml, resolved</summary><pre>{html.escape(recipe)}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(parts)


def _table(evaluation: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table_header(evaluation))
    body = "".join(
        f'<tr class="{key}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for key, cells in table_rows(evaluation, complete=True)
    )
    notes = [*table_notes(evaluation), f"{NOT_MEASURED} is not measured or not defined."]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="soft">{"<br>".join(map(html.escape, notes))}</p>'
    )


def _figures(evaluation: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    losses: list[tuple[str, str | None]] = [*report_plots.loss_curves(metrics)]
    plots: list[tuple[str, str | None]] = [
        ("NLL by position in held-out text", report_plots.nll_by_position(evaluation)),
        ("Recall by distance, with 95 % intervals", report_plots.recall_by_distance(evaluation)),
        *(losses or [("Training loss", None)]),
        ("Alignment error by layer", report_plots.alignment_errors(metrics)),
        ("Slot mass by layer", report_plots.slot_masses(evaluation)),
    ]
    return [
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg or '<p>not measured</p>'}</figure>"
        for title, svg in plots
    ]
