"""Acceptance measurements of issue 4's models: families, padding, cache, beams, long decoding."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run


def _members(root: Path) -> dict[str, Path]:
    """Folder of every pico model of the family matrix."""
    from transformers.utils import logging

    from tests.conftest import FURTHER_MODELS, PICO_MODELS, make_pico

    logging.disable_progress_bar()
    return {name: make_pico(name, root / name) for name in sorted(PICO_MODELS | FURTHER_MODELS)}


def _pytest(*arguments: str) -> str:
    """Run tests; their summary line without the time."""
    done = run([sys.executable, "-m", "pytest", "-q", *arguments], ROOT)
    return re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1].strip("= "))


@line(
    "families",
    "family matrix, random weights, fp32: windows full; op at W >= T; save, reload, remote code; gradients",
    "bit for bit; <= 1e-5; equal; non-zero",
)
def families() -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from nha_convert.convert import load_student
    from nha_convert.settings import NHASettings
    from tests.modeling.test_families import IDS, in_two_pieces

    values: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        for name, folder in _members(Path(root)).items():
            wanted = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
            students = {
                "full": load_student(folder, NHASettings(window="full")),
                "set full": load_student(folder, NHASettings(window=6, slots=8)),
                "wide": load_student(folder, NHASettings(window=128, slots=8)),
            }
            students["set full"].set_windows("full")
            values[name] = {key: (model(IDS).logits - wanted).abs().max().item() for key, model in students.items()}
            values[name]["wide, in two pieces"] = (in_two_pieces(students["wide"]) - wanted).abs().max().item()
    exact = max(max(row["full"], row["set full"]) for row in values.values())
    wide = max(max(row["wide"], row["wide, in two pieces"]) for row in values.values())
    summary = _pytest("tests/modeling/test_families.py")
    text = f"{len(values)} models: full {exact:.1g}, op {wide:.2g}; {summary}"
    return {"measured": text, "met": exact == 0 and wide <= 1e-5 and "failed" not in summary, "values": values}


def _variants() -> dict[str, Any]:
    """The students of tests/modeling/test_cache.py."""
    from nha_convert.convert import load_student
    from nha_convert.settings import NHASettings
    from tests.modeling.test_cache import FAMILIES, VARIANTS, WINDOW

    with tempfile.TemporaryDirectory() as root:
        folders = _members(Path(root))
        return {
            variant: load_student(folders[name], NHASettings(**{"window": WINDOW, "slots": 8, "sinks": 2, **changes}))
            for name, (variant, changes) in zip(FAMILIES, VARIANTS.items(), strict=True)
        }


@line("padding", "logits of a row in a batch with any padding vs alone, at once and in cached pieces", "<= 1e-5")
def padding() -> dict[str, Any]:
    import torch

    from tests.modeling.test_cache import MASKS, at_once, ids, in_pieces

    worst = {}
    for variant, model in _variants().items():
        for name, rows in MASKS.items():
            mask = torch.tensor(rows)
            tokens = ids(len(mask), mask.shape[1]).masked_fill(mask == 0, 258)
            for cuts in ([], [5, 12, 13, 14]):
                logits = in_pieces(model, tokens, mask, cuts)
                for row, there in enumerate(mask.bool()):
                    if there.any():
                        alone = at_once(model, tokens[row : row + 1, there])
                        key = f"{variant}, {name}, {'pieces' if cuts else 'at once'}, row {row}"
                        worst[key] = (logits[row, there] - alone[0]).abs().max().item()
    largest = max(worst, key=lambda key: worst[key])
    text = f"{worst[largest]:.2g} ({len(worst)} rows; largest: {largest})"
    return {"measured": text, "met": worst[largest] <= 1e-5, "values": worst}


@line(
    "pieces",
    "cached one-token, many-token and chunked prefill vs full forward, at W-1, W, W+1, 5 W, with and without sinks",
    "<= 1e-5",
)
def pieces() -> dict[str, Any]:
    from tests.modeling.test_cache import BEFORE, ENDS, at_once, ids, in_pieces

    worst = {}
    for variant, model in _variants().items():
        for before in BEFORE:
            tokens = ids(2, before + 14, seed=before)
            wanted = at_once(model, tokens)
            for rest, ends in ENDS.items():
                found = in_pieces(model, tokens, None, [before + end for end in ends])
                worst[f"{variant}, {before}, {rest}"] = (found - wanted).abs().max().item()
    largest = max(worst, key=lambda key: worst[key])
    text = f"{worst[largest]:.2g} ({len(worst)} cases; largest: {largest})"
    return {"measured": text, "met": worst[largest] <= 1e-5, "values": worst}


@line("beams", "beam search with cache = without: every family, padding, several beams returned", "identical tokens")
def beams() -> dict[str, Any]:
    summary = _pytest("tests/modeling/test_generation.py", "-k", "beam")
    return {"measured": summary, "met": "failed" not in summary}


@line("splits", "random splits into chunks and steps, with random padding, give the same logits", "200 examples")
def splits() -> dict[str, Any]:
    done = run(
        [sys.executable, "-m", "pytest", "-q", "tests/modeling/test_cache.py", "-k", "any_split"]
        + ["--hypothesis-show-statistics"],
        ROOT,
    )
    counts = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", done.stdout)
    passing, failing = (sum(int(pair[place]) for pair in counts) for place in (0, 1))
    text = f"{passing} examples passed, {failing} failed (each <= 1e-5)"
    return {"measured": text, "met": passing >= 200 and not failing}


@line(
    "long",
    "decode to 100k tokens with generate, the demo's model, all layers NHA",
    "resident memory flat (+- 2 %); time per token, last tenth over first, at most +5 %",
)
def long_decode() -> dict[str, Any]:
    from tools.bench_long_decode import run as measure

    result = measure()
    judged, rows = result["judged"], result["rows"]
    text = (
        f"memory within {100 * judged['memory_spread']:.2f} %; {rows[0]['ms_per_token']:.2f} ms per token at first, "
        f"{rows[-1]['ms_per_token']:.2f} at last ({100 * judged['time_growth']:+.1f} % beside a short text's)"
    )
    return {"measured": text, "met": judged["met"], "values": result}
