"""Write what each shipped recipe costs into its head, from its plan on the public model's shape.

    python tools/recipe_costs.py                      all recipes (a minute on one core); no weights are read
    python tools/recipe_costs.py qwen3-8b             one of them
    python tools/recipe_costs.py --check              writes nothing; exits with 1 where a head is out of date
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from nha_convert.gpus import Machine, find_machine  # noqa: E402
from nha_convert.plan import make_plan  # noqa: E402
from nha_convert.plan_memory import stage_cost  # noqa: E402
from nha_convert.plan_time import stage_time  # noqa: E402
from nha_convert.quantities import count, size  # noqa: E402
from nha_convert.recipe import Recipe, list_recipes, load_recipe, recipe_path  # noqa: E402

TOLERANCE = 0.02
"""Numbers of a head may be off by this share: what torch keeps alive differs a little between its versions."""
LABEL = re.compile(r"# [A-Z][a-z]+:")
NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LONGER = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_QWEN3: dict[str, Any] = _QWEN2 | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
PUBLIC: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": True}
    | {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_LONGER}},
    "meta-llama/Llama-3.1-8B": _LLAMA3
    | {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_LONGER}},
    "meta-llama/Meta-Llama-3-8B": _LLAMA3,
    "Qwen/Qwen2.5-0.5B": _QWEN2,
    "Qwen/Qwen2.5-7B": _QWEN2
    | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072}
    | {"tie_word_embeddings": False},
    "Qwen/Qwen3-0.6B": _QWEN3,
    "Qwen/Qwen3-8B": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
    "Qwen/Qwen3-30B-A3B": _QWEN3
    | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False, "decoder_sparse_step": 1}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "mistralai/Mistral-7B-v0.3": _LLAMA3
    | {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
    | {"sliding_window": None, "bos_token_id": 1, "eos_token_id": 2},
}
"""What the config.json of each recipe's model says, as far as sizes go."""


def on_public_shape(name: str, folder: Path) -> Recipe:
    """A shipped recipe whose model is a folder with the public model's config.json; `embedded` stays.

    Args:
        folder: the config.json is written into it.
    """
    path = str(recipe_path(name))
    recipe = load_recipe(path)
    if recipe.model == "embedded":
        return recipe
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLIC[recipe.model]), encoding="utf-8")
    return load_recipe(path, [f"model={json.dumps(str(folder))}"])


def cost_lines(recipe: Recipe, machine: Machine) -> list[str]:
    """The lines of a recipe's head that say what it costs.

    Args:
        machine: hours are for it; left out for recipes that run on a CPU.
    """
    stages = make_plan(recipe, stage_cost)["stages"]
    times = [stage_time(recipe, index, machine) for index in range(len(stages))]
    tokens = count(sum(row["tokens"] for row in stages))
    steps = sum(row["steps"] for row in stages)
    flops = three_digits(sum(time["training_flops"] for time in times) / 1e15)
    largest = max(stages, key=lambda row: row["peak_bytes"])
    memory = f"{size(largest['peak_bytes'])} of memory in one process ({largest['stage']})"
    lines = [f"# Costs: {tokens} tokens in {steps:,} optimizer steps, {flops} PFLOP; at most {memory}."]
    if recipe.runtime.device != "cpu":
        hours = three_digits(sum(time["hours"] for time in times))
        fits = largest["peak_bytes"] <= machine.gpu.memory
        lines.append(f"#        About {hours} hours on one {machine.label}" + ("." if fits else ", had it the memory."))
    return lines


def three_digits(number: float) -> str:
    """A number in three digits, without an exponent."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def cost_place(lines: list[str], name: str) -> slice:
    """Where a file's lines say what the recipe costs: from `# Costs:` to the next label or the end of the head."""
    starts = [place for place, line in enumerate(lines) if line.startswith("# Costs:")]
    if len(starts) != 1:
        raise SystemExit(f"{name}: {len(starts)} lines start with `# Costs:`; one is needed")
    end = starts[0] + 1
    while end < len(lines) and lines[end].startswith("#") and not LABEL.match(lines[end]):
        end += 1
    return slice(starts[0], end)


def same(found: list[str], wanted: list[str]) -> bool:
    """Whether two heads say the same, their numbers within `TOLERANCE`."""
    texts = ["\n".join(lines) for lines in (found, wanted)]
    if NUMBER.sub("#", texts[0]) != NUMBER.sub("#", texts[1]):
        return False
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in texts]
    return all(abs(a - b) <= TOLERANCE * max(a, b) for a, b in zip(*numbers))


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 1 where `--check` finds a head that is out of date."""
    parser = argparse.ArgumentParser(description="what each shipped recipe costs, into its head")
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="shipped recipes; all if not given")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a head is out of date")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(list_recipes()))
    if unknown:
        parser.error(f"no shipped recipe: {', '.join(unknown)}; shipped: {', '.join(list_recipes())}")
    machine, late = find_machine(), []
    for name in given.names or list_recipes():
        path = recipe_path(name)
        lines = path.read_text(encoding="utf-8").splitlines()
        place = cost_place(lines, name)
        with tempfile.TemporaryDirectory() as folder:
            wanted = cost_lines(on_public_shape(name, Path(folder) / "model"), machine)
        if same(lines[place], wanted):
            continue
        late.append(name)
        print(f"{name}:", *wanted, sep="\n", flush=True)
        if not given.check:
            lines[place] = wanted
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"out of date: {', '.join(late) or 'none'}" + ("" if given.check or not late else "; written"))
    return int(given.check and bool(late))


if __name__ == "__main__":
    sys.exit(main())
