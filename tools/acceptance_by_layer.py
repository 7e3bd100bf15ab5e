"""Acceptance measurement of alignment by layer: memory and losses against training all layers at once."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run
from tools.acceptance_plan import SIZES as PLAN_SIZES
from tools.acceptance_plan import make_model, process_bytes

LAYERS, STEPS, ROWS, LENGTH = 12, 6, 1, 256
SIZES: dict[str, Any] = PLAN_SIZES | {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
}

CHILD = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
os.environ |= {{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}}
from tools.acceptance_by_layer import measured
print(json.dumps(measured(sys.argv[1], json.loads(sys.argv[2]))))
"""


def measured(model: str, layers: int | None) -> dict[str, Any]:
    """Bytes that this process grew by, at most, from before the model is loaded to the end of the stage, and what the
    stage measured; for a fresh process.

    Args:
        layers: in memory at a time; None is all.
    """
    import torch
    from transformers import AutoTokenizer

    from nha_convert.convert import load_student
    from nha_convert.data import training_dataset
    from nha_convert.recipe import load_recipe
    from nha_convert.streamed import load_streamed
    from nha_convert.train import run_stage

    torch.set_num_threads(1)
    stage = {"kind": "align", "tokens": STEPS * ROWS * LENGTH, "sequence_length": LENGTH, "batch_size": ROWS}
    changes = [
        f"model={model}",
        f"stages={json.dumps([stage])}",
        "nha.full_attention_layers=[]",
        "data.sources=[{source: stdlib}]",
        f"runtime.layers_at_once={json.dumps(layers)}",
        f"runtime.cached_tokens={STEPS * ROWS * LENGTH // 2}",
        "runtime.logging_steps=1",
    ]
    recipe = load_recipe("demo", changes)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "scratch").mkdir()
        training_dataset(recipe, 0, tokenizer)  # tokenises before anything is measured
        before = process_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        cpu = torch.device("cpu")
        student = (
            load_student(Path(model), recipe.nha, dtype=torch.float32)
            if layers is None
            else load_streamed(Path(model), recipe.nha, dtype=torch.float32, device=cpu, scratch=work / "scratch")
        )
        run_stage(student, tokenizer, recipe, 0, work, quiet=True, device=cpu, base=Path(model))
        peak = process_bytes("VmHWM") - before
        rows = [json.loads(text) for text in (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"bytes": peak, "rows": [{k: v for k, v in row.items() if k == "loss" or "layer" in k} for row in rows]}


@line(
    "by_layer",
    f"alignment one layer at a time, {LAYERS}-layer random Llama of 176M parameters, all layers NHA, CPU: growth of "
    "the process from before the model is loaded; losses of every step and layer",
    "<= 35 % of all layers at once; the same",
)
def by_layer() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("llama", Path(folder) / "model", SIZES)
        found = {}
        for name, layers in (("all", None), ("one", 1), ("three", 3)):
            done = run([sys.executable, "-c", CHILD.format(root=str(ROOT)), str(model), json.dumps(layers)], ROOT)
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    apart = max(
        abs(ours[key] - theirs[key])
        for ours, theirs in zip(found["one"]["rows"], found["all"]["rows"], strict=True)
        for key in ours | theirs
    )
    sizes = {name: row["bytes"] for name, row in found.items()}
    share = sizes["one"] / sizes["all"]
    text = (
        f"{sizes['one'] / 2**20:.0f} MiB against {sizes['all'] / 2**20:.0f} MiB: {100 * share:.0f} % "
        f"(three layers: {100 * sizes['three'] / sizes['all']:.0f} %); largest difference of a loss {apart:.1g}"
    )
    return {"measured": text, "met": share <= 0.35 and apart <= 1e-6, "values": sizes}
