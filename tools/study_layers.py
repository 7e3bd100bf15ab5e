"""Layers chosen by measurement against uniform choice: same recipe, same text, several seeds.

    python tools/study_layers.py --work /tmp/layers                    write docs/studies/layers.{json,md}
    python tools/study_layers.py --work /tmp/layers --tokens 1M --seeds 0 1 2 --full 1
    python tools/study_layers.py --work /tmp/layers --recipe my.yaml --stages all
    python tools/study_layers.py [--out docs/studies/layers-qwen3]     only write the page of what was measured

A measured seed is kept in the work folder and not measured again. With stages of alignment alone one run holds the
gates of every choice, since each layer learns alone; with other stages each choice is trained on its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from nha_convert.convert import load_student  # noqa: E402
from nha_convert.data import held_out_tokens, recall_filler  # noqa: E402
from nha_convert.evaluate.recall import wilson_interval  # noqa: E402
from nha_convert.evaluate.suite import evaluate_student, evaluate_teacher  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.gate_inputs import calibrate_gates, calibration_ids  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.recipe import Recipe, load_recipe  # noqa: E402
from nha_convert.search.calibration import calibration_text  # noqa: E402
from nha_convert.search.choose import neediest  # noqa: E402
from nha_convert.search.record import naming  # noqa: E402
from nha_convert.search.scores import layer_losses  # noqa: E402
from nha_convert.search.tables import UNITS, table  # noqa: E402
from nha_convert.settings_types import DEFAULT_METHOD, NEEDS_TEXT, SEARCH_METHODS  # noqa: E402
from nha_convert.train import run_stage  # noqa: E402

Choice = tuple[int, ...]
EVERY_CHOICE = 8
"""So many choices at most are all trained and measured; of more only those that a method or uniform choice makes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--stages", choices=("align", "all"), default="align", help="alignment alone, or all stages")
    parser.add_argument("--tokens", default="200k", help="of the alignment stage")
    parser.add_argument("--full", type=int, default=1, help="layers that stay full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--work", type=Path, help="folder of runs and of measured seeds; left out, nothing is run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "studies" / "layers")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.work is None:
        found = json.loads(options.out.with_suffix(".json").read_text(encoding="utf-8"))
        write_text(options.out.with_suffix(".md"), page(found, options.out.name))
        return
    rows = []
    for seed in options.seeds:
        kept = options.work / f"seed-{seed}.json"
        if not kept.is_file():
            write_json(kept, study(study_recipe(options, seed), options.full, options.work / f"runs-{seed}"))
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    settings = {"recipe": options.recipe, "stages": options.stages, "tokens": options.tokens, "full": options.full}
    found = {"settings": settings | {"seeds": options.seeds, "set": options.overrides}, "seeds": rows}
    write_json(options.out.with_suffix(".json"), found)
    write_text(options.out.with_suffix(".md"), page(found, options.out.name))


def study_recipe(options: argparse.Namespace, seed: int) -> Recipe:
    overrides = [f"seed={seed}", f"stages.align.tokens={options.tokens}", "evaluate.tasks=[recall]", *options.overrides]
    recipe = naming(load_recipe(options.recipe, overrides), [])
    if options.stages == "align":
        recipe = recipe.model_copy(update={"stages": [one for one in recipe.stages if one.kind == "align"]})
    return recipe


def study(recipe: Recipe, count: int, work: Path) -> dict[str, Any]:
    """One seed: what every method chooses, and how good every choice is after training."""
    folder = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out, filler = held_out_tokens(recipe, tokenizer), recall_filler(recipe, tokenizer)
    measured = (tokenizer, held_out, filler, recipe.evaluate)
    model = started(recipe, folder, tokenizer)
    layers = model.config.num_hidden_layers
    window = max(size for size in recipe.nha.windows(layers) if size is not None)
    scores = {
        f"{method}, {branch}": scored(model, recipe, tokenizer, method, branch)
        for method in SEARCH_METHODS
        for branch in (("window", "both") if method != "attention" else ("window",))
    }
    choices = {name: tuple(neediest(row, count)) for name, row in scores.items()}
    choices[f"every:{layers // count}"] = tuple(range(layers // count - 1, layers, layers // count))[:count]
    every = list(itertools.combinations(range(layers), count))
    wanted = every if len(every) <= EVERY_CHOICE else sorted(set(choices.values()))
    results = {"teacher": evaluate_teacher(model, *measured, window=window, quiet=True)}
    for choice, student in students(recipe, folder, tokenizer, [(), *wanted], work, model):
        teacher = model if any(stage.changes_base for stage in recipe.stages) else None
        if teacher is not None:
            teacher.set_windows("full")
        label = key(choice)
        results[label] = evaluate_student(
            student, *measured, label=label, window=window, teacher=teacher, with_branches=False, quiet=True
        )
        if not choice:  # the finished model, searched again
            scores |= {
                f"{method}, trained": scored(student, recipe, tokenizer, method, "both")
                for method in SEARCH_METHODS
                if method != "attention"
            }
    choices |= {name: tuple(neediest(row, count)) for name, row in scores.items()}
    return {
        "seed": recipe.seed,
        "scores": scores,
        "choices": {name: list(choice) for name, choice in choices.items()},
        "results": {name: brief(row) for name, row in results.items()},
    }


def started(recipe: Recipe, folder: Path, tokenizer: Any) -> Any:
    """A student with gates as a run starts them."""
    model = load_student(folder, recipe.nha, seed=recipe.seed, length=recipe.training_length)
    if recipe.nha.gate_init in NEEDS_TEXT:
        calibrate_gates(model, recipe.nha, calibration_ids(recipe, tokenizer), seed=recipe.seed)
    return model


def scored(model: Any, recipe: Recipe, tokenizer: Any, method: str, branch: str) -> dict[int, float]:
    """Score of each layer by one method."""
    with_recall = method == "recall"
    text = calibration_text(recipe, tokenizer, model.config.max_position_embeddings, with_recall=with_recall)
    windows = recipe.nha.candidates(model.config.num_hidden_layers)
    each = {layer: [window] for layer, window in windows.items()}
    losses = layer_losses(method, model, text, each, branch=branch)
    return {layer: losses[layer][window] for layer, window in windows.items()}


def students(
    recipe: Recipe, folder: Path, tokenizer: Any, choices: list[Choice], work: Path, start: Any
) -> Iterator[tuple[Choice, Any]]:
    """A trained student for each choice of full layers; `start` is the untrained one with every layer NHA."""
    shared = all(stage.kind == "align" and not stage.changes_base for stage in recipe.stages)
    for choice in choices:
        where = work / ("every" if shared else key(choice))
        full = [] if shared else list(choice)
        of_choice = naming(recipe, full)
        student = started(of_choice, folder, tokenizer) if full else copy.deepcopy(start)

        def teacher(of_choice: Recipe = of_choice) -> Any:
            base = load_student(folder, of_choice.nha, seed=recipe.seed)
            base.set_windows("full")
            return base.eval()

        for index in range(len(recipe.stages)):
            student, _ = run_stage(
                student, tokenizer, of_choice, index, where, resume=True, quiet=True, teacher=teacher, base=folder
            )
        if shared:
            student.set_windows(dict.fromkeys(choice, "full"))
        yield choice, student


def key(choice: Choice | list[int]) -> str:
    return "full " + ("none" if not choice else ",".join(map(str, choice)))


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What a study keeps of a row."""
    kept = {name: row[name] for name in ("nll", "kl", "top1", "memory_recovery", "nll_teacher") if name in row}
    return kept | {"recall": row["recall"]}


# ---- the page ------------------------------------------------------------------------------------
def page(found: dict[str, Any], name: str) -> str:
    settings, seeds = found["settings"], found["seeds"]
    model = load_recipe(settings["recipe"], settings["set"]).model
    command = ["python tools/study_layers.py --work DIR", f"--out docs/studies/{name}"]
    command += [f"--recipe {settings['recipe']} --stages {settings['stages']} --tokens {settings['tokens']}"]
    command += [f"--full {settings['full']} --seeds {' '.join(map(str, settings['seeds']))}"]
    command += [f"--set {one}" for one in settings["set"]]
    return "\n".join(
        [
            f"# Which layers stay full: teacher `{model}`",
            "",
            f"    {' '.join(command)}",
            "",
            f"wrote this: {settings['tokens']} tokens of alignment"
            f"{'' if settings['stages'] == 'align' else ' and the other stages'}, full layers: {settings['full']}.",
            "",
            "## What each method chooses",
            "",
            "Scores (mean over seeds) with the slots hidden (`window`), with untrained slots (`both`), and of the",
            "model that was trained with every layer as NHA (`trained`); then how good its choice is. The layer with",
            "the largest score stays full; `every:N` is the uniform choice.",
            "",
            *(f"- `{method}`: {UNITS[method]}" for method in SEARCH_METHODS),
            "",
            *choice_table(seeds),
            "",
            "## How good each choice is",
            "",
            "After training; mean over seeds ± standard deviation, recall with the 95 % interval of one seed's "
            "prompts, since every seed asks the same ones.",
            "",
            *result_table(seeds),
            "",
            *verdict(seeds),
            "",
        ]
    )


def choice_table(seeds: list[dict[str, Any]]) -> list[str]:
    """What each method chose, and what became of it after training (mean over seeds)."""
    rows = []
    for name in seeds[0]["choices"]:
        chosen = "; ".join(",".join(map(str, row["choices"][name])) for row in seeds)
        results = [row["results"].get(key(row["choices"][name])) for row in seeds]
        after = ["not trained"] * 2
        if None not in results:
            after = [f"{mean(one['kl'] for one in results):.4f}", f"{100 * mean(map(recall_rate, results)):.1f} %"]
        scores = [row["scores"].get(name) for row in seeds]
        means = ""
        if scores[0] is not None:
            layers = sorted(scores[0], key=int)
            means = ", ".join(f"{mean(one[layer] for one in scores):.3g}" for layer in layers)
        rows.append([f"`{name}`", chosen, *after, means])
    header = ["method", "layers, by seed", "KL after", "recall after", "score of layers 0, 1, ..."]
    return table(header, rows)


def recall_rate(row: dict[str, Any]) -> float:
    """Exact match, mean over distances."""
    return mean(cell["exact_match"] for cell in row["recall"].values())


def result_table(seeds: list[dict[str, Any]]) -> list[str]:
    distances = sorted(seeds[0]["results"]["teacher"]["recall"], key=int)
    rows = []
    for name in seeds[0]["results"]:
        of_seeds = [row["results"][name] for row in seeds if name in row["results"]]
        above = [100 * (one["nll"] / row["results"]["teacher"]["nll"] - 1) for one, row in zip(of_seeds, seeds)]
        cells = [name, spread([one["nll"] for one in of_seeds], ".4f"), spread(above, "+.2f") + " %"]
        cells.append(spread([one["kl"] for one in of_seeds], ".4f") if "kl" in of_seeds[0] else "–")
        for distance in distances:
            cells.append(recalled([one["recall"][distance] for one in of_seeds]))
        rows.append(cells)
    header = ["choice", "NLL", "vs teacher", "KL", *(f"recall {distance}" for distance in distances)]
    return table(header, rows)


def spread(values: list[float], form: str) -> str:
    deviation = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def recalled(cells: list[dict[str, Any]]) -> str:
    """Mean over seeds, with the interval of one seed's prompts: every seed asks the same ones."""
    prompts = cells[0]["prompts"]
    share = mean(cell["exact_match"] for cell in cells)
    low, high = wilson_interval(round(share * prompts), prompts)
    return f"{share:.2f} ({low:.2f} to {high:.2f})"


def verdict(seeds: list[dict[str, Any]]) -> list[str]:
    """The default method against uniform choice, over all distances."""
    uniform = next(name for name in seeds[0]["choices"] if name.startswith("every:"))
    auto = f"{DEFAULT_METHOD}, window"
    lines = []
    for row in seeds:
        chosen, even = (key(row["choices"][name]) for name in (auto, uniform))
        results = row["results"]
        rates = [recall_rate(results[name]) for name in (chosen, even, "teacher")]
        above = [100 * (results[name]["nll"] / results["teacher"]["nll"] - 1) for name in (chosen, even)]
        lines.append(
            f"- Seed {row['seed']}: `auto` ({chosen}) recalls {100 * rates[0]:.1f} %, `{uniform}` ({even}) "
            f"{100 * rates[1]:.1f} %, the teacher {100 * rates[2]:.1f} %, mean over distances; NLL {above[0]:+.2f} % "
            f"against {above[1]:+.2f} %."
        )
    return lines


if __name__ == "__main__":
    main()
