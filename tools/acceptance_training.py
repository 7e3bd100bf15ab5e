"""Acceptance measurements of issue 5's losses and stages: memory of the losses, speed of alignment, exact cutting."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from tools.acceptance_base import ROOT, line, run

VOCABULARY, TOKENS, HIDDEN = 151_936, 4096, 256
ROUNDS = 7


@line(
    "losses",
    "KL + CE at vocabulary 151,936, 4k tokens, fp32 on CPU: peak extra memory against whole logits; difference of loss",
    "<= 10 %; <= 1e-5",
)
def loss_memory() -> dict[str, Any]:
    from nha_convert.train.losses import CHUNK
    from tests.train.loss_memory import measured

    whole = measured(0, VOCABULARY, TOKENS, HIDDEN)
    chunked = measured(CHUNK, VOCABULARY, TOKENS, HIDDEN)
    share = chunked["extra_bytes"] / whole["extra_bytes"]
    apart = abs(chunked["loss"] / whole["loss"] - 1)
    text = (
        f"{chunked['extra_bytes'] / 2**20:.0f} MiB against {whole['extra_bytes'] / 2**20:.0f} MiB: "
        f"{100 * share:.1f} %; loss {apart:.1g}"
    )
    return {"measured": text, "met": share <= 0.1 and apart <= 1e-5, "values": {"whole": whole, "chunked": chunked}}


@line("cuts", "sum over any cut of a packed, masked batch vs the whole, every stage and family", "<= 1e-5 relative")
def cutting() -> dict[str, Any]:
    done = run([sys.executable, "-m", "pytest", "-q", "tests/train/test_cutting.py"], ROOT)
    text = done.stdout.strip().splitlines()[-1].strip("= ").rsplit(" in ", 1)[0]
    return {"measured": text, "met": "failed" not in text}


def _alignment_rates(every_layer: bool) -> dict[str, float]:
    """Tokens/s of alignment steps and of the teacher's forward passes."""
    import torch

    from nha_convert.convert import load_student
    from nha_convert.modeling.attention_nha import teacher_mode
    from nha_convert.recipe import embedded_teacher, load_recipe
    from nha_convert.train.objectives import make_objective

    recipe = load_recipe("demo")
    nha = recipe.nha.model_copy(update={"full_attention_layers": []} if every_layer else {})
    model = load_student(embedded_teacher(), nha, dtype=torch.float32, seed=0)
    objective = make_objective(model, recipe.stages[0])
    ids = torch.randint(0, model.config.vocab_size, (8, 512))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(512).repeat(8, 1)}

    def align() -> None:
        objective.zero_grad()
        objective(batch, objective.count(batch))[0].backward()

    def teach() -> None:
        with torch.no_grad(), teacher_mode(model):
            model(input_ids=ids, use_cache=False)

    seconds: dict[str, list[float]] = {"align": [], "teacher": []}
    for turn in range(ROUNDS + 1):
        for name, call in (("align", align), ("teacher", teach)):
            start = time.perf_counter()
            call()
            if turn:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / statistics.median(times) for name, times in seconds.items()}


@line(
    "alignment",
    "alignment step (forward and backward) of the demo's model, T 512, batch 8, against a plain forward pass of the "
    "same module as its teacher, in turns on CPU; tokens/s, median of 7",
    ">= 0.45x",
)
def alignment_speed() -> dict[str, Any]:
    rates = {"demo": _alignment_rates(False), "every layer NHA": _alignment_rates(True)}
    shares = {name: rate["align"] / rate["teacher"] for name, rate in rates.items()}
    text = "; ".join(
        f"{name}: {shares[name]:.2f}x ({rate['align']:.0f} against {rate['teacher']:.0f})"
        for name, rate in rates.items()
    )
    return {"measured": text, "met": shares["demo"] >= 0.45, "values": rates}


@line(
    "recipes",
    "every shipped recipe: validates, plans against its model's public shapes, two steps of every stage on a shrunken "
    "random model of its family",
    "pass",
)
def recipes() -> dict[str, Any]:
    done = run([sys.executable, "-m", "pytest", "-q", "tests/train/test_shipped_recipes.py"], ROOT)
    text = done.stdout.strip().splitlines()[-1].strip("= ").rsplit(" in ", 1)[0]
    return {"measured": text, "met": "failed" not in text and "error" not in text}
