"""Acceptance measurement of the plan: its peak memory against what stages take on a CPU."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run

RECIPES = {"llama-3.2-1b": "llama", "qwen2.5-0.5b": "qwen2", "qwen3-0.6b": "qwen3"}
"""Shipped recipes, and the families of their models."""
ROWS, LENGTH = 4, 1024
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}

CHILD = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
os.environ |= {{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}}
import torch
from tools.acceptance_plan import measured_peak
print(json.dumps(measured_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
"""


def shrunk(name: str, model: Path) -> Any:
    """A shipped recipe on a small random model of its family, its stages of three steps."""
    from nha_convert.recipe import load_recipe, recipe_path

    recipe = load_recipe(str(recipe_path(name)))
    changes = ["runtime.dtype=float32", "runtime.device=cpu", "data.sources=[{source: stdlib}]", f"model={model}"]
    for index in range(len(recipe.stages)):
        changes += [
            f"stages.{index}.sequence_length={LENGTH}",
            f"stages.{index}.batch_size={ROWS}",
            f"stages.{index}.tokens={3 * ROWS * LENGTH}",
        ]
    return load_recipe(str(recipe_path(name)), [*changes, f"evaluate.sequence_length={LENGTH}"])


def make_model(name: str, folder: Path, sizes: dict[str, Any] = SIZES) -> Path:
    """A random model of a family, with the embedded teacher's tokenizer."""
    import torch
    import transformers

    from nha_convert.families import FAMILIES
    from nha_convert.recipe import embedded_teacher

    config = getattr(transformers, f"{FAMILIES[name].prefix}Config")(**sizes)
    with torch.random.fork_rng():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded_teacher()).save_pretrained(folder)
    return folder


def measured_peak(name: str, index: int, model: str) -> int:
    """Bytes that this process grew by, at most, while it ran one stage; for a fresh process."""
    import torch
    from transformers import AutoTokenizer

    from nha_convert.convert import load_student
    from nha_convert.data import training_dataset
    from nha_convert.train import run_stage

    torch.set_num_threads(1)
    recipe = shrunk(name, Path(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        training_dataset(recipe, index, tokenizer)  # tokenises before anything is measured
        before = process_bytes("VmRSS")
        student = load_student(Path(model), recipe.nha, dtype=torch.float32)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        run_stage(student, tokenizer, recipe, index, Path(folder), quiet=True)
        return process_bytes("VmHWM") - before


def process_bytes(name: str) -> int:
    """A size of this process: VmRSS, what is resident now; VmHWM, the most since `clear_refs`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{name}:"))


@line("plan", "planned vs measured peak memory of every stage, three shipped recipes shrunk, CPU", "within 15 %")
def plan() -> dict[str, Any]:
    from nha_convert.plan_memory import PARTS, stage_cost

    values: dict[str, Any] = {}
    for name, family in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(family, Path(folder) / "model")
            recipe = shrunk(name, model)
            for index, stage in enumerate(recipe.stages):
                cost = stage_cost(recipe, index)
                planned = sum(cost[part] for part in PARTS)
                done = run([sys.executable, "-c", CHILD.format(root=str(ROOT)), name, str(index), str(model)], ROOT)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                values[f"{name}, {stage.kind}"] = {"planned": planned, "measured": found, "ratio": planned / found}
    ratios = {key: row["ratio"] for key, row in values.items()}
    text = ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items())
    return {"measured": text, "met": all(abs(ratio - 1) <= 0.15 for ratio in ratios.values()), "values": values}
