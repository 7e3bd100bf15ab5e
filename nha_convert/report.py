"""report.html: what a run measured, on one page that needs no network.

Reads the run folder only (`read_run`). What is not there yet is shown as not measured.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from nha_convert import report_heatmaps, report_plots, report_tables
from nha_convert.files import write_text
from nha_convert.report_data import RunData, read_run
from nha_convert.report_style import STYLE
from nha_convert.report_verdict import Verdict, verdict

Figure = tuple[str, str | None, str]
"""Title, SVG (None: not measured), and a line that says what is seen."""


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder, finished or not.

    Args:
        run_dir: what `nha-convert run` made.
    Returns:
        The page's path; it is written beside and renamed.
    Raises:
        InputError: not a run folder, or one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    write_text(run_dir / "report.html", _page(read_run(run_dir)))
    return run_dir / "report.html"


def _page(run: RunData) -> str:
    name = html.escape(run.name)
    seconds = run.evaluation.get("seconds")
    duration = f" · {seconds / 60:.1f} minutes" if isinstance(seconds, (int, float)) else ""
    model = html.escape(str(run.settings.get("model", "a model")))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name} · nha-convert</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{name}</h1>",
        f'<p class="soft">{model} · softmax attention made Native Hybrid Attention by nha-convert{duration}</p>',
        _verdict(verdict(run.evaluation, run.verification, run.bench)),
        *_sections(run),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _verdict(said: Verdict) -> str:
    nothing = ["Nothing found in what is measured."] if said.how else []
    lists = [("What is not good", said.wrong or nothing, "wrong" if said.wrong else ""), ("What holds", said.good, "")]
    if said.missing:
        lists.append(("Not measured", [f"{what}." for what in said.missing], "soft"))
    parts = ['<section class="verdict" aria-labelledby="verdict">', '<h2 id="verdict" hidden>Verdict</h2>']
    parts.append(f'<p class="lead">{html.escape(said.lead)}</p>')
    parts += [f'<p class="soft">{html.escape(sentence)}</p>' for sentence in said.how]
    if said.how:
        definition = html.escape(said.definition)
        parts.append(f'<details class="soft"><summary>What quality means here</summary><p>{definition}</p></details>')
    for title, sentences, kind in lists:
        if sentences:
            items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
            parts.append(f'<h3 class="{kind}">{title}</h3><ul class="{kind}">{items}</ul>')
    return "".join([*parts, "</section>"])


def _sections(run: RunData) -> list[str]:
    """In the order in which they are read."""
    evaluation, final = run.evaluation, run.evaluation.get("final") or {}
    losses: list[Figure] = [(title, svg, "") for title, svg in report_plots.loss_curves(run.metrics)]
    maps: list[Figure] = [(title, svg, "") for title, svg in report_heatmaps.recall_maps(evaluation)]
    pairs = _figures(maps or [("Recall by distance and pairs", None, "")])
    recipe = f'<pre tabindex="0">{html.escape(run.recipe)}</pre>'
    contents = {
        "measured": ("Measured", report_tables.measured_tables(evaluation)),
        "training": ("Training", _figures(losses or [("Training loss", None, "")])),
        "distance": ("Text and recall by distance", _figures(_distance_figures(run)) + pairs),
        "memory": ("Alignment and memory", _figures(_memory_figures(run))),
        "cost": ("Cache memory and speed", _figures(_cost_figures(run)) + report_tables.cost_tables(run.bench)),
        "layers": ("Layers", report_tables.layer_table(final, run.layers)),
        "branches": ("Branch ablation", report_tables.branch_table(evaluation)),
        "recipe": ("Recipe", f"<details><summary>recipe.yaml, resolved</summary>{recipe}</details>"),
        "provenance": ("Where it comes from", report_tables.facts_table("This run", run.facts)),
    }
    return [
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{content}</section>'
        for key, (title, content) in contents.items()
    ]


def _distance_figures(run: RunData) -> list[Figure]:
    recall = "Exact match of generated answers, 95 % intervals."
    return [
        ("NLL by position", report_plots.by_position(run.evaluation, "nll"), "Held-out text."),
        (
            "KL by position",
            report_plots.by_position(run.evaluation, "kl"),
            "Of the teacher's prediction from the model's.",
        ),
        (
            "Top-1 by position",
            report_plots.by_position(run.evaluation, "top1"),
            "Where both find the same token likeliest.",
        ),
        ("Recall by distance", report_plots.recall_by_distance(run.evaluation), recall),
    ]


def _memory_figures(run: RunData) -> list[Figure]:
    final = run.evaluation.get("final") or {}
    error = "Error of each layer's attention output over the teacher's energy: 0 is the teacher."
    share = "Share of the softmax that goes to the slots."
    return [
        ("Alignment error", report_heatmaps.alignment_errors(run.metrics), error),
        ("Slot mass by head", report_heatmaps.slot_mass_by_head(final), share),
        ("Slot mass by position", report_heatmaps.slot_mass_by_position(final), "Mean over heads."),
    ]


def _cost_figures(run: RunData) -> list[Figure]:
    spread = "Median of the repeats; bars: its interval, of fewer than six repeats their range."
    return [
        ("Cache memory", report_plots.cache_memory(run.bench), "Bytes of all cached tensors, batch 1."),
        ("Decode latency", report_plots.decode_latency(run.bench), spread),
    ]


def _figures(figures: Sequence[Figure]) -> str:
    drawn = [
        f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(note if svg else '')}</figcaption>"
        f"{svg or '<p>not measured</p>'}</figure>"
        for title, svg, note in figures
    ]
    return f'<div class="plots">{"".join(drawn)}</div>'
