"""Quality against cache memory of finished models, by the windows that `search` finds, into docs/studies/curve.*

    python tools/study_memory.py --work DIR --only embedded/random/short qwen3/random/short     trains them
    python tools/study_curve.py embedded=DIR/embedded-random-short-0 qwen3=DIR/qwen3-random-short-0
    python tools/study_curve.py                                  only writes the tables of what was measured

Nothing is trained: a finished model's layers get other windows at inference. The search reads text of training; NLL and
recall are measured on held-out text, of every point of its curve and of the same window in all layers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from nha_convert import modeling  # noqa: E402, F401  (registers the NHA classes)
from nha_convert.data import held_out_tokens, recall_filler  # noqa: E402
from nha_convert.evaluate.suite import evaluate_student, evaluate_teacher  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.recipe import load_recipe  # noqa: E402
from nha_convert.search.find import find_windows  # noqa: E402
from nha_convert.search.request import SearchRequest, search_request  # noqa: E402
from nha_convert.search.tables import runs, table  # noqa: E402

OUT = ROOT / "docs" / "studies" / "curve"
WINDOWS = (32, 64, 256)
CONTEXT = 1024
UNIT = 64
"""Tokens that a recall multiple stands for, for all windows alike."""


def measured(name: str, run: Path) -> dict[str, Any]:
    """One model: its teacher, and every point with what it costs and what it keeps."""
    recipe = load_recipe(str(run / "recipe.yaml"))
    tried = ",".join(map(str, WINDOWS)) + ",full"
    request = search_request(str(run), method="kl", windows=tried, context=CONTEXT)
    found = find_windows(request)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    student = AutoModelForCausalLM.from_pretrained(run / "export", dtype="auto").eval()
    teacher = AutoModelForCausalLM.from_pretrained(resolve_model(recipe.model), dtype="auto").eval()
    asked = (tokenizer, held_out_tokens(recipe, tokenizer), recall_filler(recipe, tokenizer), recipe.evaluate)
    base = evaluate_teacher(teacher, *asked, window=UNIT, quiet=True)
    points = []
    for point in [*uniform(request), *found["curve"]]:
        student.set_windows(point["windows"])
        row = evaluate_student(
            student, *asked, label="student", window=UNIT, teacher=teacher, with_branches=False, quiet=True
        )
        kept = {key: point[key] for key in ("choice", "windows", "share")}
        points.append(kept | {"kl_search": point.get("kl"), "gap": row["intervals"]["nll_above_teacher"]} | brief(row))
        print(f"{name}, {point['choice']}, {runs(point['windows'])}: NLL {row['nll']:.4f}", flush=True)
    sizes = {"context": CONTEXT, "search_tokens": found["tokens"], "seed": found["seed"]}
    model = str(recipe.model).removeprefix(f"{ROOT}/")  # no path of this machine in what is kept
    return {"name": name, "model": model, **sizes, "teacher": brief(base), "points": points}


def uniform(request: SearchRequest) -> list[dict[str, Any]]:
    """Points with the same window in all layers."""
    slots, layers = request.recipe.nha.slots_by_layer(request.sizes.layers), sorted(request.windows)
    points = []
    for window in WINDOWS:
        size = sum(request.layer_bytes(window, slots[layer]) for layer in layers) + request.beside
        windows = [window if layer in request.windows else "full" for layer in range(request.sizes.layers)]
        points.append({"choice": f"{window} each", "windows": windows, "share": size / request.full_bytes})
    return points


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row."""
    return {key: row[key] for key in ("nll", "kl", "recall") if key in row}


# ---- the page -----------------------------------------------------------------------------------------
def page(models: list[dict[str, Any]]) -> str:
    """docs/studies/curve.md."""
    lines = [
        "# Quality against memory, chosen on a finished model",
        "",
        "Written by `python tools/study_curve.py` (its first lines have the commands). The models are those of "
        "[memory.md](memory.md) that were trained with random windows of 32, 64 and 256: every layer NHA, 64 slots, "
        "1M tokens. Nothing is trained here. `nha-convert search RUN --windows 32,64,256,full` measures on text of "
        "training what each layer loses with each window (`kl`), and goes from the smallest windows to full attention "
        "by the best gain per byte (`greedy`). Uniform choices: `every:N` keeps every N-th layer full and gives the "
        f"others the smallest window, `W each` is one window for all. Memory: the cache at {CONTEXT} tokens as a share "
        "of full attention's. NLL against the teacher's on held-out text, 95 % bootstrap interval; recall by distance "
        "in tokens, exact match of generated answers. Seed 0.",
        "",
    ]
    for model in models:
        base, distances = model["teacher"], list(model["teacher"]["recall"])
        header = ["choice", "windows", "memory", "NLL against the teacher's", *(f"recall {one}" for one in distances)]
        whole = [f"{base['recall'][one]['exact_match']:.2f}" for one in distances]
        rows = [["teacher", "full", "100 %", "", *whole]]
        for point in sorted(model["points"], key=lambda point: point["share"]):
            nll = base["nll"]
            low, high = (100 * bound / nll for bound in point["gap"])
            cells = [point["choice"], runs(point["windows"]), f"{100 * point['share']:.1f} %"]
            cells.append(f"{100 * (point['nll'] / nll - 1):+.2f} % ({low:+.2f} to {high:+.2f})")
            rows.append([*cells, *(f"{point['recall'][one]['exact_match']:.2f}" for one in distances)])
        prompts = base["recall"][distances[0]]["prompts"]
        lines += [f"## `{model['name']}`, {prompts} prompts per distance", "", *table(header, rows), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help="finished run folders")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = OUT.with_suffix(".json")
    models = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for given in options.runs:
        name, _, run = given.partition("=")
        models = [*(model for model in models if model["name"] != name), measured(name, Path(run))]
        write_json(path, models)
    write_text(OUT.with_suffix(".md"), page(models))


if __name__ == "__main__":
    main()
